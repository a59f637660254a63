"""The streamed loss and the local negatives of `DistributedTwoTowerTask`."""

import math
import re

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel, model_parallel
from softmax_cases import SOFTMAX_CASES, call_arguments, embeddings, loss_and_gradients

from keras_rs_contrib import DistributedTwoTowerTask
from keras_rs_contrib.task import in_batch_softmax

MESHES = {
    "DataParallel(2)": (2, lambda: data_parallel(2)),
    "DataParallel(8)": (8, lambda: data_parallel(8)),
    "ModelParallel(2x4)": (2, model_parallel),
}
CATEGORICAL = keras.losses.CategoricalCrossentropy(from_logits=True)


@pytest.fixture
def two_queries_per_block(monkeypatch):
    """Streams every loss in blocks of two queries, and removes the full logit matrix."""
    monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
    monkeypatch.setattr(in_batch_softmax, "MIN_BLOCK_QUERIES", 2)
    monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 1)
    monkeypatch.delattr(in_batch_softmax.InBatchSoftmax, "logits")


def on_mesh(distribution, array):
    layout = distribution.get_data_layout(array.shape)
    return keras.distribution.distribute_tensor(keras.ops.convert_to_tensor(array), layout)


def largest_collective(compiled):
    """Returns the number of elements of the largest array transferred between devices."""
    operations = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    results = re.findall(rf" = (.*?) (?:{operations})(?:-start)?\(", compiled.as_text())
    shapes = [shape for result in results for shape in re.findall(r"\[([0-9,]*)\]", result)]
    return max((math.prod(int(size) for size in shape.split(",") if size) for shape in shapes), default=0)


def assert_gradients_match(function, values, gradients):
    """Compares `gradients` with finite differences of a NumPy function at `values`, one gradient for each argument."""
    for place, gradient in enumerate(gradients):

        def of_one(value, place=place):
            return function(*values[:place], value, *values[place + 1 :])

        np.testing.assert_allclose(gradient, reference.gradient(of_one, values[place]), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("two_queries_per_block")
@pytest.mark.parametrize(
    ("case", "heads", "batch"), [("plain", None, 5), ("plain", None, 6), ("score mask", 3, 5), ("all", None, 7)]
)
def test_streamed_loss_and_gradients_match_the_reference(rng, case, heads, batch):
    constructor, names = SOFTMAX_CASES[case]
    queries, candidates = embeddings(rng, heads, batch, batch + 3)
    arguments = call_arguments(rng, names, batch, batch + 3)
    loss, *gradients = loss_and_gradients(DistributedTwoTowerTask(**constructor), queries, candidates, **arguments)

    def expected(q, c):
        return reference.softmax_loss(q, c, **constructor, **arguments)

    np.testing.assert_allclose(loss, expected(queries, candidates), rtol=1e-5)
    assert_gradients_match(expected, (queries, candidates), gradients)


@pytest.mark.usefixtures("two_queries_per_block")
def test_streamed_loss_has_gradients_for_probabilities_and_weights(rng):
    queries, candidates = embeddings(rng)
    given = call_arguments(rng, ("candidate_sampling_probability", "sample_weight"))
    # The loss jumps at 0, so finite differences there are not the gradient.
    given["candidate_sampling_probability"] += np.float32(1e-2)
    task = DistributedTwoTowerTask()
    gradients = jax.jit(jax.grad(lambda given: 3.0 * task(queries, candidates, **given)))(given)

    def expected(probability, weight):
        return 3.0 * reference.softmax_loss(
            queries, candidates, candidate_sampling_probability=probability, sample_weight=weight
        )

    assert_gradients_match(expected, list(given.values()), [gradients[name] for name in given])


@pytest.mark.usefixtures("two_queries_per_block")
def test_streamed_gradients_are_finite_with_masked_rows_and_nan_padding(rng):
    queries, candidates = embeddings(rng)
    arguments = call_arguments(rng, ("score_mask", "candidate_mask", "sample_weight"))
    arguments["score_mask"][2] = False
    expected = loss_and_gradients(DistributedTwoTowerTask(), queries, candidates, **arguments)
    queries[1], candidates[[1, -1]], arguments["sample_weight"][1] = np.nan, np.inf, np.nan
    result = loss_and_gradients(DistributedTwoTowerTask(), queries, candidates, **arguments)
    for value, without_nan in zip(result, expected, strict=True):
        np.testing.assert_array_equal(value, without_nan)
        assert np.isfinite(value).all()


@pytest.mark.usefixtures("two_queries_per_block")
def test_streamed_loss_masks_a_masked_positive(rng):
    queries, candidates = embeddings(rng)
    mask = np.ones((5, 8), bool)
    mask[0, 0] = False
    loss, *gradients = loss_and_gradients(DistributedTwoTowerTask(), queries, candidates, score_mask=mask)
    own_loss, *own = loss_and_gradients(DistributedTwoTowerTask(), queries[1:], candidates[[1, 2, 3, 4, 0, 5, 6, 7]])
    # The masked logit is finite and far below all others: its negative is the loss of the row.
    masked = -np.finfo(np.float32).min / 100 / 5
    np.testing.assert_allclose(loss, masked + own_loss * 4 / 5, rtol=1e-6)
    np.testing.assert_allclose(gradients[0][1:], own[0] * 4 / 5, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("two_queries_per_block")
def test_streamed_loss_of_bfloat16_embeddings_is_computed_in_float32(rng):
    queries, candidates = (jax.numpy.asarray(e, "bfloat16") for e in embeddings(rng))
    loss, (of_queries, _) = jax.value_and_grad(DistributedTwoTowerTask(), argnums=(0, 1))(queries, candidates)
    assert (loss.dtype, of_queries.dtype) == ("float32", "bfloat16")
    rounded = np.asarray(queries, "float64"), np.asarray(candidates, "float64")
    np.testing.assert_allclose(loss, reference.softmax_loss(*rounded), rtol=1e-6)


def test_streaming_starts_at_the_threshold_and_stores_no_logit_matrix(rng, monkeypatch):
    monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 2**10)
    queries, candidates = embeddings(rng, batch=128, num_candidates=128)

    def temporary_bytes(least):
        monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", least)
        gradient = jax.jit(jax.grad(DistributedTwoTowerTask(), argnums=(0, 1)))
        return gradient.lower(queries, candidates).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(128 * 128) < 4 * 128 * 128 / 2
    assert temporary_bytes(128 * 128 + 1) >= 4 * 128 * 128


@pytest.mark.usefixtures("two_queries_per_block")
@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("mesh", MESHES)
def test_streamed_loss_transfers_only_embeddings_between_devices(rng, mesh, case):
    _, distribution = MESHES[mesh]
    constructor, names = SOFTMAX_CASES[case]
    queries, candidates = embeddings(rng, batch=24, num_candidates=32)
    arguments = call_arguments(rng, names, 24, 32)
    task = DistributedTwoTowerTask(**constructor)
    expected = loss_and_gradients(task, queries, candidates, **arguments)
    distribution = distribution()
    keras.distribution.set_distribution(distribution)
    queries, candidates = on_mesh(distribution, queries), on_mesh(distribution, candidates)
    arguments = {name: on_mesh(distribution, value) for name, value in arguments.items()}
    function = jax.jit(jax.value_and_grad(lambda q, c, a: task(q, c, **a), argnums=(0, 1)))
    compiled = function.lower(queries, candidates, arguments).compile()
    assert 0 < largest_collective(compiled) <= candidates.size
    for value, of_one_device in zip(jax.tree.leaves(compiled(queries, candidates, arguments)), expected, strict=True):
        np.testing.assert_allclose(value, of_one_device, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "extra", "how"),
    [
        ("DataParallel(2)", 4, "streamed"),
        ("DataParallel(2)", 4, "full logits"),
        ("DataParallel(2)", 4, "custom loss"),
        ("ModelParallel(2x4)", 0, "streamed"),
    ],
)
def test_local_negatives_come_from_the_same_part_of_the_batch(rng, request, mesh, extra, how):
    if how == "streamed":
        request.getfixturevalue("two_queries_per_block")
    num_parts, distribution = MESHES[mesh]
    constructor, names = SOFTMAX_CASES["all"]
    batch = 24
    queries, candidates = embeddings(rng, batch=batch, num_candidates=batch + extra)
    arguments = call_arguments(rng, names, batch, batch + extra)
    distribution = distribution()
    keras.distribution.set_distribution(distribution)
    custom_loss = {"loss": CATEGORICAL} if how == "custom loss" else {}
    task = DistributedTwoTowerTask(negatives="local", **custom_loss, **constructor)
    given = [on_mesh(distribution, array) for array in (queries, candidates)]
    on_devices = {name: on_mesh(distribution, value) for name, value in arguments.items()}
    function = jax.jit(jax.value_and_grad(lambda q, c, a: task(q, c, **a), argnums=(0, 1)))
    compiled = function.lower(*given, on_devices).compile()
    # Without extra negatives, only the scalar loss travels between devices.
    assert largest_collective(compiled) <= (1 if extra == 0 else candidates.size // num_parts)
    loss, gradients = compiled(*given, on_devices)

    def expected(q, c):
        return reference.local_softmax_loss(q, c, num_parts, **constructor, **arguments)

    np.testing.assert_allclose(loss, expected(queries, candidates), rtol=1e-5)
    assert_gradients_match(expected, (queries, candidates), gradients)


def test_local_negatives_equal_global_negatives_on_one_device(rng):
    queries, candidates = embeddings(rng)
    local = DistributedTwoTowerTask(negatives="local")(queries, candidates)
    np.testing.assert_array_equal(local, DistributedTwoTowerTask()(queries, candidates))


def test_local_negatives_require_a_divisible_batch(rng):
    keras.distribution.set_distribution(data_parallel(2))
    with pytest.raises(ValueError, match=r"must divide the batch size.*5 queries for 2 replicas.*pad_batches"):
        DistributedTwoTowerTask(negatives="local")(*embeddings(rng))


@pytest.mark.parametrize("negatives", ["global", "local"])
def test_placeholder_sizes_can_be_traced_on_a_mesh(negatives, monkeypatch):
    """Keras traces the `call` of a subclassed model with placeholder sizes, such as 83, that 8 does not divide."""
    monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
    keras.distribution.set_distribution(data_parallel(8))
    task = DistributedTwoTowerTask(negatives=negatives)
    for batch in (None, 83):
        symbolic = keras.KerasTensor((batch, 4))
        assert keras.src.backend.compute_output_spec(task.call, symbolic, symbolic).shape == ()
