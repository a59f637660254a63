"""Arguments by position: the order of TFRS and Keras RS is another one, so most arguments must be named."""

import inspect

import keras
import numpy as np
import pytest

from keras_rs_contrib import (
    CrossBatchMemory,
    DistributedTwoTowerTask,
    MeanReciprocalRank,
    MixedNegatives,
    NDCGAtK,
    RecallAtK,
    RowSparseEmbedding,
    ShardedEmbedding,
    StreamingSamplingProbability,
    TwoTowerModel,
)

EMBEDDINGS = np.eye(3, 4, dtype="float32")
IDS = np.arange(3)


def counts():
    return StreamingSamplingProbability(4, counts=[1, 2, 3, 4])


# A call with one argument too many by position, and how its error names the callable, what it takes and what to name.
CALLS = {
    "task, as in TFRS": (
        lambda: DistributedTwoTowerTask()(EMBEDDINGS, EMBEDDINGS, np.ones(3)),
        r"`DistributedTwoTowerTask` takes only `query_embeddings` and `candidate_embeddings` by position. "
        r"Received: 3 arguments by position. Name the others: `labels=`, `sample_weight=`, `candidate_ids=`",
    ),
    "task, all of TFRS": (
        lambda: DistributedTwoTowerTask()(EMBEDDINGS, EMBEDDINGS, np.ones(3), np.ones(3), IDS),
        "Received: 5 arguments by position.*`candidate_sampling_probability=`",
    ),
    "symbolic task": (
        lambda: DistributedTwoTowerTask()(keras.Input((4,)), keras.Input((4,)), keras.Input(())),
        "`DistributedTwoTowerTask`.*Received: 3 arguments.*`sample_weight=`",
    ),
    "new task": (
        lambda: DistributedTwoTowerTask(None, None, None),
        "`DistributedTwoTowerTask` takes only `loss` by position.*Received: 3.*`similarity=`, `temperature=`",
    ),
    "memory": (
        lambda: CrossBatchMemory(4)(EMBEDDINGS, IDS, training=True),
        "`CrossBatchMemory` takes only `candidate_embeddings`.*Received: 2 arguments.*`candidate_ids=`",
    ),
    "new memory": (lambda: CrossBatchMemory(4, 2), "`CrossBatchMemory` takes only `capacity`.*`warmup_steps=`"),
    "mixed negatives": (
        lambda: MixedNegatives(counts(), 2)(IDS, np.ones(3, bool)),
        "`MixedNegatives` takes only `candidate_ids`.*`candidate_mask=`, `training=`",
    ),
    "new mixed negatives": (
        lambda: MixedNegatives(counts(), 2, 7),
        "`MixedNegatives` takes only `sampling_probability` and `num_negatives`.*Received: 3.*`seed=`, `exclude_ids=`",
    ),
    "probability": (
        lambda: counts()(IDS, np.ones(3, bool)),
        "`StreamingSamplingProbability` takes only `candidate_ids`.*`candidate_mask=`, `training=`",
    ),
    "new probability": (
        lambda: StreamingSamplingProbability(4, [1, 2, 3, 4]),
        "`StreamingSamplingProbability` takes only `num_candidates`.*`window=`, `counts=`",
    ),
    "metric, as in Keras RS": (
        lambda: RecallAtK(2).update_state(np.array([1, 0]), np.array([0.9, 0.1])),
        "`RankMetric.update_state` takes only `ranks` by position. Received: 2 arguments.*`sample_weight=`",
    ),
    "called metric": (lambda: MeanReciprocalRank()([1, 0], [0.9, 0.1]), "takes only `ranks`"),
}


@pytest.mark.parametrize("case", CALLS)
def test_too_many_arguments_by_position_raise_with_the_names_of_the_others(case):
    function, words = CALLS[case]
    with pytest.raises(TypeError, match=words):
        function()


def test_a_surplus_argument_leaves_the_state_unchanged():
    layer, metric = StreamingSamplingProbability(4), NDCGAtK(2)
    with pytest.raises(TypeError, match="candidate_mask="):
        layer(IDS, np.ones(3, bool), training=True)
    with pytest.raises(TypeError, match="sample_weight="):
        metric.update_state([0], [1.0])
    assert all((np.asarray(weight) == 0).all() for weight in [*layer.weights, *metric.variables])


def test_the_first_arguments_may_be_passed_by_position():
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    assert DistributedTwoTowerTask(loss, temperature=2.0).loss is loss
    np.testing.assert_allclose(
        DistributedTwoTowerTask()(EMBEDDINGS, EMBEDDINGS),
        DistributedTwoTowerTask()(query_embeddings=EMBEDDINGS, candidate_embeddings=EMBEDDINGS),
    )
    assert CrossBatchMemory(4)(EMBEDDINGS).candidate_embeddings.shape == (3, 4)
    assert MixedNegatives(counts(), 2)(IDS).candidate_ids.shape == (3,)
    metric = RecallAtK(1)
    metric.update_state([0, 1])
    assert float(metric.result()) == 0.5


def test_other_mistakes_keep_the_error_of_python():
    with pytest.raises(TypeError, match="missing"):
        CrossBatchMemory()
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight'"):
        NDCGAtK(2).update_state([0], weight=[1.0])


@pytest.mark.parametrize("layer", [DistributedTwoTowerTask, CrossBatchMemory, MixedNegatives, RecallAtK])
def test_signatures_show_the_names(layer):
    function = layer.update_state if layer is RecallAtK else layer.__init__
    parameters = inspect.signature(function).parameters.values()
    assert any(parameter.kind == parameter.KEYWORD_ONLY for parameter in parameters)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ShardedEmbedding(10, 4, "zeros"),
        lambda: RowSparseEmbedding(10, 4, "adagrad", "zeros", "batch"),
        lambda: TwoTowerModel(*[keras.layers.Embedding(10, 4)] * 2, "user", "movie", "movie"),
    ],
)
def test_constructors_take_their_own_options_by_name(call):
    with pytest.raises(TypeError, match=r"by position. Received: \d arguments by position. Name the others"):
        call()
