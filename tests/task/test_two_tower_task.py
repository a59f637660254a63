import copy
import functools

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel
from softmax_cases import (
    BATCH,
    DIMENSION,
    NUM_CANDIDATES,
    SOFTMAX_CASES,
    call_arguments,
    embeddings,
    loss_and_gradients,
)

from keras_rs_contrib import DistributedTwoTowerTask


@pytest.mark.parametrize(("case", "heads"), [*((case, 3) for case in SOFTMAX_CASES), ("plain", None), ("all", None)])
def test_softmax_loss_and_gradients_match_the_reference(rng, case, heads):
    constructor, names = SOFTMAX_CASES[case]
    queries, candidates = embeddings(rng, heads)
    arguments = call_arguments(rng, names)
    task = DistributedTwoTowerTask(**constructor)
    loss, query_gradient, candidate_gradient = loss_and_gradients(task, queries, candidates, **arguments)
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, reference.softmax_loss(queries, candidates, **constructor, **arguments), rtol=1e-5)
    of_queries = reference.gradient(
        lambda q: reference.softmax_loss(q, candidates, **constructor, **arguments), queries
    )
    of_candidates = reference.gradient(
        lambda c: reference.softmax_loss(queries, c, **constructor, **arguments), candidates
    )
    np.testing.assert_allclose(query_gradient, of_queries, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(candidate_gradient, of_candidates, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("names", [(), ("sample_weight",), ("sample_weight", "candidate_mask")])
@pytest.mark.parametrize(
    "constructor", [{}, {"similarity": "cosine", "temperature": 0.5}, {"similarity": "biased_cosine"}]
)
def test_pointwise_loss_and_gradients_match_the_reference(rng, names, constructor, heads):
    queries, candidates = embeddings(rng, heads, num_candidates=BATCH)
    labels = rng.random(BATCH).astype("float32")
    arguments = call_arguments(rng, names, num_candidates=BATCH)
    task = DistributedTwoTowerTask(**constructor)
    loss, query_gradient, candidate_gradient = loss_and_gradients(task, queries, candidates, labels=labels, **arguments)

    def expected(q, c):
        return reference.squared_error_loss(q, c, labels, **constructor, **arguments)

    np.testing.assert_allclose(loss, expected(queries, candidates), rtol=1e-5)
    np.testing.assert_allclose(
        query_gradient, reference.gradient(lambda q: expected(q, candidates), queries), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        candidate_gradient, reference.gradient(lambda c: expected(queries, c), candidates), rtol=1e-4, atol=1e-6
    )


@functools.cache
def on_one_device():
    """Returns arrays whose sizes all device counts divide, with their loss and gradients on one device."""
    rng, batch, num_candidates = np.random.default_rng(0), 24, 48
    constructor, names = SOFTMAX_CASES["all"]
    queries, candidates = embeddings(rng, batch=batch, num_candidates=num_candidates)
    arguments = call_arguments(rng, names, batch, num_candidates)
    expected = loss_and_gradients(DistributedTwoTowerTask(**constructor), queries, candidates, **arguments)
    return queries, candidates, arguments, expected


def test_loss_and_gradients_equal_those_of_one_device(distribution):
    keras.distribution.set_distribution(None)
    queries, candidates, arguments, expected = on_one_device()
    task = DistributedTwoTowerTask(**SOFTMAX_CASES["all"][0])
    if distribution is not None:
        keras.distribution.set_distribution(distribution)

        def distributed(array):
            layout = distribution.get_data_layout(array.shape)
            return keras.distribution.distribute_tensor(keras.ops.convert_to_tensor(array), layout)

        queries, candidates = distributed(queries), distributed(candidates)
        arguments = {name: distributed(value) for name, value in arguments.items()}
    for value, of_one_device in zip(loss_and_gradients(task, queries, candidates, **arguments), expected, strict=True):
        np.testing.assert_allclose(value, of_one_device, rtol=1e-5, atol=1e-6)


def test_negatives_come_from_every_replica(rng):
    """With local negatives, each of the 8 queries would have its positive only, and the loss would be 0."""
    queries, candidates = embeddings(rng, batch=8, num_candidates=8)
    distribution = data_parallel(8)
    keras.distribution.set_distribution(distribution)
    layout = distribution.get_data_layout(queries.shape)
    queries, candidates = (
        keras.distribution.distribute_tensor(jax.numpy.asarray(e), layout) for e in (queries, candidates)
    )
    assert float(DistributedTwoTowerTask()(queries, candidates)) > 0.5


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_reduction_is_respected(rng, reduction, masked):
    queries, candidates = embeddings(rng)
    arguments = call_arguments(rng, ("sample_weight", "candidate_mask") if masked else ("sample_weight",))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, reduction=reduction)
    value = np.asarray(DistributedTwoTowerTask(loss=loss)(queries, candidates, **arguments))
    valid = arguments["candidate_mask"][:BATCH] if masked else np.ones(BATCH, bool)
    weight = arguments["sample_weight"] * valid
    mask = {"candidate_mask": arguments["candidate_mask"]} if masked else {}
    rows = np.array(
        [-row[0] + np.log(np.sum(np.exp(row))) for row in reference.softmax_rows(queries, candidates, **mask)]
    )
    expected = {
        "sum_over_batch_size": np.sum(rows * weight) / valid.sum(),
        "mean": np.sum(rows * weight) / valid.sum(),
        "sum": np.sum(rows * weight),
        "mean_with_sample_weight": np.sum(rows * weight) / weight.sum(),
        "none": rows * weight,
    }[reduction]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_custom_loss_sees_tfrs_logits(rng):
    """Masked logits have the same value as in TFRS, so a custom loss has the same result."""
    queries, candidates = embeddings(rng)
    ids = np.zeros(NUM_CANDIDATES, "int32")
    task = DistributedTwoTowerTask(loss=keras.losses.MeanAbsoluteError(reduction="none"), remove_accidental_hits=True)
    masked = np.finfo(np.float32).min / 100
    scores = queries.astype("float64") @ candidates.T.astype("float64")
    expected = [
        np.mean([abs(1 - scores[i, j]) if i == j else abs(masked) for j in range(NUM_CANDIDATES)]) for i in range(BATCH)
    ]
    np.testing.assert_allclose(task(queries, candidates, candidate_ids=ids), expected, rtol=1e-6)


def test_pointwise_loss_can_be_replaced(rng):
    queries, candidates = embeddings(rng, num_candidates=BATCH)
    labels = np.array([0, 1, 1, 0, 1], "float32")
    task = DistributedTwoTowerTask(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    scores = np.sum(queries * candidates, axis=1)
    expected = np.mean(np.log1p(np.exp(scores)) - labels * scores)
    np.testing.assert_allclose(task(queries, candidates, labels=labels), expected, rtol=1e-5)


@pytest.mark.parametrize("with_labels", [False, True])
def test_values_in_padding_rows_are_ignored(rng, with_labels):
    queries, candidates = embeddings(rng, num_candidates=BATCH)
    weight = np.ones(BATCH, "float32")
    arguments = {"labels": rng.random(BATCH).astype("float32")} if with_labels else {}
    task = DistributedTwoTowerTask()
    expected = loss_and_gradients(task, queries[:3], candidates[:3], **{k: v[:3] for k, v in arguments.items()})
    queries[3:], candidates[3:], weight[3:] = np.nan, np.inf, np.nan
    if with_labels:
        arguments["labels"][3:] = np.nan
    mask = np.arange(BATCH) < 3
    loss, *gradients = loss_and_gradients(
        task, queries, candidates, sample_weight=weight, candidate_mask=mask, **arguments
    )
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    for gradient, of_valid_rows in zip(gradients, expected[1:], strict=True):
        np.testing.assert_allclose(gradient[:3], of_valid_rows, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(gradient[3:], 0)


@pytest.mark.parametrize("labels", [None, np.zeros(0, "float32")])
def test_empty_batch_has_loss_zero(labels):
    empty = np.zeros((0, DIMENSION), "float32")
    assert float(DistributedTwoTowerTask()(empty, empty, labels=labels)) == 0.0


def test_batch_of_padding_has_loss_zero(rng):
    queries, candidates = embeddings(rng)
    mask = np.zeros(NUM_CANDIDATES, bool)
    assert float(DistributedTwoTowerTask()(queries, candidates, candidate_mask=mask)) == 0.0


@pytest.mark.parametrize("num_hard_negatives", [None, 1])
def test_single_row_has_loss_zero(rng, num_hard_negatives):
    queries, candidates = embeddings(rng, batch=1, num_candidates=1)
    assert float(DistributedTwoTowerTask(num_hard_negatives=num_hard_negatives)(queries, candidates)) == 0.0


@pytest.mark.parametrize("arguments", [{}, {"labels": np.arange(BATCH) / 4}])
def test_loss_of_bfloat16_towers_is_computed_in_float32(rng, arguments):
    queries, candidates = (jax.numpy.asarray(e, "bfloat16") for e in embeddings(rng, num_candidates=BATCH))
    loss = DistributedTwoTowerTask(dtype="mixed_bfloat16")(queries, candidates, **arguments)
    assert loss.dtype == np.float32
    rounded = np.asarray(queries, "float64"), np.asarray(candidates, "float64")
    expected = reference.squared_error_loss if arguments else reference.softmax_loss
    np.testing.assert_allclose(loss, expected(*rounded, **arguments), rtol=1e-6)


def test_mixed_precision_does_not_round_probabilities(rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    queries, candidates = embeddings(rng)
    probability = np.full(NUM_CANDIDATES, 1.0, "float32")
    probability[0] = 0.1001
    loss = DistributedTwoTowerTask()(queries, candidates, candidate_sampling_probability=probability)
    expected = reference.softmax_loss(queries, candidates, candidate_sampling_probability=probability)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_float64_and_lists_are_accepted(rng):
    queries, candidates = embeddings(rng, num_candidates=BATCH)
    labels = [0.0, 0.25, 0.5, 0.75, 1.0]
    loss = DistributedTwoTowerTask()(queries.astype("float64"), candidates, labels=labels)
    np.testing.assert_allclose(loss, reference.squared_error_loss(queries, candidates, labels), rtol=1e-5)


def test_tower_masks_cause_no_warning():
    towers = keras.layers.Embedding(9, 4, mask_zero=True), keras.layers.Embedding(9, 4, mask_zero=True)
    ids = np.arange(5)
    assert np.isfinite(DistributedTwoTowerTask()(towers[0](ids), towers[1](ids)))


@pytest.mark.parametrize(
    "constructor",
    [
        {},
        {"similarity": "cosine", "temperature": 0.25, "num_hard_negatives": 3, "remove_accidental_hits": True},
        {"negatives": "local"},
        {"loss": keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1, reduction="sum")},
    ],
)
@pytest.mark.parametrize("how", ["config", "serialize", "copy", "deepcopy"])
def test_copies_compute_the_same_loss(rng, constructor, how):
    task = DistributedTwoTowerTask(name="the_task", **constructor)
    other = {
        "config": lambda: DistributedTwoTowerTask.from_config(task.get_config()),
        "serialize": lambda: keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(task)),
        "copy": lambda: copy.copy(task),
        "deepcopy": lambda: copy.deepcopy(task),
    }[how]()
    assert other.name == "the_task"
    assert other.get_config() == task.get_config()
    queries, candidates = embeddings(rng)
    ids = call_arguments(rng, ("candidate_ids",))
    np.testing.assert_array_equal(other(queries, candidates, **ids), task(queries, candidates, **ids))


def functional_model(**constructor):
    users = keras.Input((), dtype="int32", name="user")
    movies = keras.Input((), dtype="int32", name="movie")
    weights = keras.Input((), name="weight")
    loss = DistributedTwoTowerTask(**constructor)(
        keras.layers.Embedding(9, 4)(users),
        keras.layers.Embedding(9, 4)(movies),
        sample_weight=weights,
        candidate_ids=movies,
    )
    return keras.Model([users, movies, weights], loss)


def test_functional_model_trains_on_the_loss():
    model = functional_model(remove_accidental_hits=True)
    model.compile("adam", loss=lambda _, task_loss: task_loss)
    inputs = [np.arange(8), np.arange(8)[::-1], np.ones(8, "float32")]
    losses = model.fit(inputs, np.zeros(8), batch_size=4, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_functional_model_has_a_scalar_loss_and_can_be_saved(tmp_path):
    model = functional_model(remove_accidental_hits=True, temperature=0.5)
    assert model.output_shape == ()
    assert model.output.dtype == "float32"
    inputs = [np.array([1, 2, 3]), np.array([4, 4, 5]), np.array([1.0, 2.0, 0.5], "float32")]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), model(inputs))


def test_unreduced_loss_has_one_value_for_each_query():
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, reduction=None)
    assert functional_model(loss=loss).output_shape == (None,)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"temperature": -1}, ValueError, "temperature=-1"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan"),
        ({"temperature": 1e-40}, ValueError, "temperature=1e-40"),
        ({"temperature": "cold"}, TypeError, "temperature='cold'"),
        ({"similarity": "euclidean"}, ValueError, "similarity='euclidean'"),
        ({"num_hard_negatives": 0}, ValueError, "num_hard_negatives=0"),
        ({"num_hard_negatives": 2.5}, TypeError, "num_hard_negatives=2.5"),
        ({"remove_accidental_hits": "yes"}, TypeError, "remove_accidental_hits='yes'"),
        ({"loss": "mse"}, TypeError, "loss='mse'"),
        ({"negatives": "near"}, ValueError, "negatives='near'"),
    ],
)
def test_invalid_constructor_arguments_raise(arguments, error, words):
    with pytest.raises(error, match=words):
        DistributedTwoTowerTask(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"query_embeddings": np.zeros(4)}, r"\(4,\)"),
        ({"query_embeddings": np.zeros((5, 2, 3, 4))}, r"\(5, 2, 3, 4\)"),
        ({"candidate_embeddings": np.zeros((5, 1, 4))}, r"\(5, 1, 4\)"),
        ({"candidate_embeddings": np.zeros((5, 3))}, "4 for the queries and 3 for the candidates"),
        ({"candidate_embeddings": np.zeros((4, 4))}, "5 queries and 4 candidates"),
        ({"sample_weight": np.ones(4)}, r"`sample_weight`.*\(4,\)"),
        ({"sample_weight": np.ones((5, 1))}, r"`sample_weight`.*\(5, 1\)"),
        ({"candidate_ids": np.arange(5)}, r"`candidate_ids`.*\(5,\).*Include the ids of the extra negatives"),
        ({"candidate_sampling_probability": np.ones(5)}, r"`candidate_sampling_probability`.*\(5,\)"),
        ({"score_mask": np.ones((8, 5), bool)}, r"`score_mask`.*\(8, 5\)"),
        ({"candidate_mask": np.ones(5, bool)}, r"`candidate_mask`.*\(5,\)"),
        ({"labels": np.ones(5)}, "5 queries and 8 candidates"),
        ({"labels": np.ones((5, 1))}, r"`labels`.*\(5, 1\)"),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_inconsistent_call_arguments_raise(arguments, words, symbolic):
    arguments = {
        "query_embeddings": np.zeros((BATCH, 4)),
        "candidate_embeddings": np.zeros((NUM_CANDIDATES, 4)),
        **arguments,
    }
    if symbolic:
        arguments = {name: keras.KerasTensor(value.shape, str(value.dtype)) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=words):
        DistributedTwoTowerTask()(**arguments)


def test_accidental_hits_require_ids(rng):
    with pytest.raises(ValueError, match="candidate_ids=None"):
        DistributedTwoTowerTask(remove_accidental_hits=True)(*embeddings(rng))


@pytest.mark.parametrize(
    ("constructor", "name"),
    [
        ({}, "candidate_ids"),
        ({}, "candidate_sampling_probability"),
        ({}, "score_mask"),
        ({"num_hard_negatives": 2}, "num_hard_negatives"),
        ({"remove_accidental_hits": True}, "remove_accidental_hits"),
        ({"negatives": "local"}, "negatives"),
    ],
)
def test_labels_with_arguments_for_negatives_raise(rng, constructor, name):
    queries, candidates = embeddings(rng, num_candidates=BATCH)
    arguments = {} if constructor else call_arguments(rng, (name,), num_candidates=BATCH)
    with pytest.raises(ValueError, match=f"`labels` together with `{name}`"):
        DistributedTwoTowerTask(**constructor)(queries, candidates, labels=np.ones(BATCH), **arguments)


def test_sample_weight_as_a_dict_raises_with_the_fix(rng):
    queries, candidates = embeddings(rng, num_candidates=BATCH)
    with pytest.raises(TypeError, match=r"a dict with the keys \['rating'\].*Pass one of its values"):
        DistributedTwoTowerTask()(queries, candidates, sample_weight={"rating": np.ones(BATCH)})


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (np.array(["a", "b", "c", "d", "e"]), TypeError),
        (np.arange(5.0), TypeError),
        (np.arange(5) + 2**31, ValueError),
    ],
)
def test_ids_that_are_not_int32_raise(rng, ids, error):
    queries, candidates = embeddings(rng, num_candidates=BATCH)
    with pytest.raises(error, match="candidate_ids"):
        DistributedTwoTowerTask(remove_accidental_hits=True)(queries, candidates, candidate_ids=ids)


def test_probability_of_padding_has_zero_gradient(rng):
    queries, candidates = rng.normal(size=(4, 3)).astype("float32"), rng.normal(size=(5, 3)).astype("float32")
    probability = np.full(5, 0.1, "float32")
    probability[4] = np.nan
    mask = np.arange(5) < 4

    def loss(probability):
        task = DistributedTwoTowerTask()
        return task(queries, candidates, candidate_sampling_probability=probability, candidate_mask=mask)

    gradient = np.asarray(jax.grad(loss)(probability))
    assert gradient[4] == 0
    assert np.abs(gradient[:4]).min() > 0
