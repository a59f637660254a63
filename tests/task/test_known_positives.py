"""`positive_ids`: what a query is known to like is not one of its negatives."""

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel
from softmax_cases import BATCH, NUM_CANDIDATES, call_arguments, embeddings, loss_and_gradients

from keras_rs_contrib import CrossBatchMemory, DistributedTwoTowerTask, MixedNegatives, StreamingSamplingProbability
from keras_rs_contrib.task import in_batch_softmax
from keras_rs_contrib.task import logits as batch_logits


def hits_of(candidate_ids, positive_ids, first_query=0):
    numbers = batch_logits.number_ids(np.asarray(candidate_ids, "int32"), np.asarray(positive_ids, "int32"))
    labels = batch_logits.positive_labels(np.zeros((len(positive_ids), len(candidate_ids))), first_query)
    return np.asarray(batch_logits.known_positives(labels, *numbers))


@pytest.mark.parametrize("m", [0, 1, 3, 40])
@pytest.mark.parametrize("first_query", [0, 2])
def test_hits_match_a_loop(rng, m, first_query):
    candidate_ids = rng.choice([-7, -1, 0, 3, 2**31 - 1, -(2**31), 12, 13], 9)
    positive_ids = rng.choice([-7, -1, -1, 3, 2**31 - 1, -(2**31), 12, 99, 4], (5, m))
    expected = [
        [i + first_query != j and c != -1 and c in row for j, c in enumerate(candidate_ids)]
        for i, row in enumerate(positive_ids.tolist())
    ]
    np.testing.assert_array_equal(hits_of(candidate_ids, positive_ids, first_query), expected)


@pytest.mark.parametrize("remove_accidental_hits", [False, True])
def test_the_positive_of_the_row_stays(rng, remove_accidental_hits):
    """All other candidates are known positives, so that the positive is the only candidate."""
    queries, candidates = embeddings(rng)
    ids = np.arange(NUM_CANDIDATES)
    task = DistributedTwoTowerTask(remove_accidental_hits=remove_accidental_hits)
    arguments = {"candidate_ids": ids, "positive_ids": np.tile(ids, (BATCH, 1))}
    loss, *gradients = loss_and_gradients(task, queries, candidates, **arguments)
    assert loss == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)
    arguments["positive_ids"][:, 3] = -1
    expected = reference.softmax_loss(queries, candidates, **arguments)
    assert expected > 0
    np.testing.assert_allclose(task(queries, candidates, **arguments), expected, rtol=1e-5)


def test_minus_one_is_the_id_of_none(rng):
    queries, candidates = embeddings(rng)
    ids = np.array([4, -1, 5, -1, 6, -1, 7, -1])
    loss = DistributedTwoTowerTask()(queries, candidates, candidate_ids=ids, positive_ids=np.full((BATCH, 2), -1))
    np.testing.assert_allclose(loss, DistributedTwoTowerTask()(queries, candidates), rtol=1e-6)


def test_rows_without_columns_mask_nothing(rng):
    queries, candidates = embeddings(rng)
    arguments = {"candidate_ids": np.arange(NUM_CANDIDATES), "positive_ids": np.zeros((BATCH, 0), "int32")}
    loss = DistributedTwoTowerTask()(queries, candidates, **arguments)
    np.testing.assert_array_equal(loss, DistributedTwoTowerTask()(queries, candidates))


def test_an_empty_batch_has_loss_zero():
    empty = np.zeros((0, 4), "float32")
    arguments = {"candidate_ids": np.zeros(0, "int32"), "positive_ids": np.zeros((0, 3), "int32")}
    assert float(DistributedTwoTowerTask()(empty, empty, **arguments)) == 0


def test_candidates_of_the_memory_and_drawn_ones_are_masked_too(rng):
    ids, positive_ids = rng.integers(0, 6, BATCH), rng.integers(0, 9, (BATCH, 2))
    table = rng.normal(size=(9, 4)).astype("float32")
    queries = embeddings(rng)[0]
    task = DistributedTwoTowerTask()
    drawn = MixedNegatives(StreamingSamplingProbability(9, counts=np.ones(9)), 6, seed=1)(ids, training=True)
    expected = reference.softmax_loss(
        queries, table[drawn.candidate_ids], positive_ids=positive_ids, **jax.tree.map(np.asarray, drawn._asdict())
    )
    loss = task(queries, table[drawn.candidate_ids], positive_ids=positive_ids, **drawn._asdict())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    memory = CrossBatchMemory(10)
    for _ in range(2):
        kept = memory(table[ids], candidate_ids=ids, training=True)
    loss = task(queries, positive_ids=positive_ids, **kept._asdict())
    both, twice = np.concatenate([ids, ids]), np.concatenate([table[ids], table[ids]])
    expected = reference.softmax_loss(queries, twice, candidate_ids=both, positive_ids=positive_ids)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("m", [1, 64])
def test_streaming_stores_no_matrix_of_candidates_and_positives(rng, m, monkeypatch):
    monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
    monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 2**10)
    size = 256
    queries, candidates = embeddings(rng, batch=size, num_candidates=size)
    arguments = {"candidate_ids": np.arange(size), "positive_ids": rng.integers(0, size, (size, m))}

    def temporary_bytes(**arguments):
        gradient = jax.jit(jax.grad(lambda q, c, a: DistributedTwoTowerTask()(q, c, **a), argnums=(0, 1)))
        return gradient.lower(queries, candidates, arguments).compile().memory_analysis().temp_size_in_bytes

    added = temporary_bytes(**arguments) - temporary_bytes()
    # A few copies of the positives and of a block, with no term of `size * size`, let alone `size * size * m`.
    assert added < 32 * (size * m + 2**10) < 4 * size * size * m


@pytest.mark.parametrize("negatives", ["global", "local"])
@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_devices_agree(rng, num_devices, negatives, monkeypatch):
    monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
    monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 64)
    queries, candidates = embeddings(rng, batch=24, num_candidates=28)
    arguments = call_arguments(rng, ("candidate_ids", "positive_ids", "candidate_mask"), 24, 28)
    distribution = data_parallel(num_devices)
    keras.distribution.set_distribution(distribution)

    def on_devices(array):
        layout = distribution.get_data_layout(array.shape)
        whole = len(array) % num_devices
        return array if whole else keras.distribution.distribute_tensor(keras.ops.convert_to_tensor(array), layout)

    task = DistributedTwoTowerTask(negatives=negatives)
    loss = jax.jit(lambda q, c, a: task(q, c, **a))(*jax.tree.map(on_devices, (queries, candidates, arguments)))
    num_parts = num_devices if negatives == "local" else 1
    np.testing.assert_allclose(
        loss, reference.local_softmax_loss(queries, candidates, num_parts, **arguments), rtol=1e-5
    )


def test_functional_model_takes_positive_ids_and_can_be_saved(rng, tmp_path):
    inputs = [keras.Input((4,)), keras.Input((4,)), keras.Input((), dtype="int32"), keras.Input((3,), dtype="int32")]
    model = keras.Model(inputs, DistributedTwoTowerTask()(*inputs[:2], candidate_ids=inputs[2], positive_ids=inputs[3]))
    queries, candidates = embeddings(rng, num_candidates=BATCH)
    arguments = call_arguments(rng, ("candidate_ids", "positive_ids"), num_candidates=BATCH)
    batch = [queries, candidates, *arguments.values()]
    expected = reference.softmax_loss(queries, candidates, **arguments)
    np.testing.assert_allclose(model(batch), expected, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "model.keras")(batch), expected, rtol=1e-5)


IDS = np.arange(NUM_CANDIDATES)
ROWS = np.zeros((BATCH, 2), "int64")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"positive_ids": ROWS}, ValueError, "candidate_ids=None"),
        ({"positive_ids": ROWS[0], "candidate_ids": IDS}, ValueError, r"`positive_ids`.*\[5, m\].*shape \(2,\)"),
        ({"positive_ids": ROWS[:4], "candidate_ids": IDS}, ValueError, r"`positive_ids`.*\(4, 2\).*padded with -1"),
        ({"positive_ids": ROWS + 0.5, "candidate_ids": IDS}, TypeError, "`positive_ids` must be integers"),
        ({"positive_ids": ROWS + 2**31, "candidate_ids": IDS}, ValueError, "`positive_ids`.*2147483648"),
        ({"positive_ids": [[1], [1, 2], [], [], []], "candidate_ids": IDS}, TypeError, "rows of equal length"),
    ],
)
def test_invalid_positive_ids_raise(rng, arguments, error, words):
    with pytest.raises(error, match=words):
        DistributedTwoTowerTask()(*embeddings(rng), **arguments)


def test_labels_exclude_positive_ids(rng):
    arguments = {"positive_ids": ROWS, "labels": np.ones(BATCH)}
    with pytest.raises(ValueError, match="`labels` together with `positive_ids`"):
        DistributedTwoTowerTask()(*embeddings(rng, num_candidates=BATCH), **arguments)
