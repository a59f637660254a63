"""The streamed loss and local negatives, through the task."""

import math
import re

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel, model_parallel
from test_two_tower_task import SOFTMAX_CASES, call_arguments, embeddings, loss_and_gradients

from keras_rs_contrib import DistributedTwoTowerTask
from keras_rs_contrib.task import in_batch_softmax

MESHES = {
    "DataParallel(2)": (2, lambda: data_parallel(2)),
    "DataParallel(8)": (8, lambda: data_parallel(8)),
    "ModelParallel(2x4)": (2, model_parallel),
}
CATEGORICAL = keras.losses.CategoricalCrossentropy(from_logits=True)


@pytest.fixture
def two_queries_a_block(monkeypatch):
    """Streams, and lets nothing be materialised."""
    monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
    monkeypatch.setattr(in_batch_softmax, "MIN_BLOCK_QUERIES", 2)
    monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 1)
    monkeypatch.delattr(in_batch_softmax.InBatchSoftmax, "logits")


def on_mesh(distribution, array):
    layout = distribution.get_data_layout(array.shape)
    return keras.distribution.distribute_tensor(keras.ops.convert_to_tensor(array), layout)


def largest_collective(compiled):
    """The number of elements of the largest array that travels between devices."""
    operations = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    results = re.findall(rf" = (.*?) (?:{operations})(?:-start)?\(", compiled.as_text())
    shapes = [shape for result in results for shape in re.findall(r"\[([0-9,]*)\]", result)]
    return max((math.prod(int(size) for size in shape.split(",") if size) for shape in shapes), default=0)


def assert_follows(function, values, gradients):
    """Compares gradients with those of a function in NumPy, of as many arrays."""
    for place, gradient in enumerate(gradients):

        def of_one(value, place=place):
            return function(*values[:place], value, *values[place + 1 :])

        np.testing.assert_allclose(gradient, reference.gradient(of_one, values[place]), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("two_queries_a_block")
@pytest.mark.parametrize(
    ("case", "heads", "batch"), [("plain", None, 5), ("plain", None, 6), ("score mask", 3, 5), ("all", None, 7)]
)
def test_the_streamed_loss_and_its_gradients_follow_the_formulas(rng, case, heads, batch):
    constructor, names = SOFTMAX_CASES[case]
    queries, candidates = embeddings(rng, heads, batch, batch + 3)
    arguments = call_arguments(rng, names, batch, batch + 3)
    loss, *gradients = loss_and_gradients(DistributedTwoTowerTask(**constructor), queries, candidates, **arguments)

    def expected(q, c):
        return reference.softmax_loss(q, c, **constructor, **arguments)

    np.testing.assert_allclose(loss, expected(queries, candidates), rtol=1e-5)
    assert_follows(expected, (queries, candidates), gradients)


@pytest.mark.usefixtures("two_queries_a_block")
def test_probabilities_and_weights_have_gradients_where_streamed(rng):
    queries, candidates = embeddings(rng)
    given = call_arguments(rng, ("candidate_sampling_probability", "sample_weight"))
    task = DistributedTwoTowerTask()
    gradients = jax.jit(jax.grad(lambda given: 3.0 * task(queries, candidates, **given)))(given)

    def expected(probability, weight):
        return 3.0 * reference.softmax_loss(
            queries, candidates, candidate_sampling_probability=probability, sample_weight=weight
        )

    assert_follows(expected, list(given.values()), [gradients[name] for name in given])


@pytest.mark.usefixtures("two_queries_a_block")
def test_masked_rows_and_padding_that_is_no_number_leave_streamed_gradients_finite(rng):
    queries, candidates = embeddings(rng)
    arguments = call_arguments(rng, ("score_mask", "candidate_mask", "sample_weight"))
    arguments["score_mask"][2] = False
    expected = loss_and_gradients(DistributedTwoTowerTask(), queries, candidates, **arguments)
    queries[1], candidates[[1, -1]], arguments["sample_weight"][1] = np.nan, np.inf, np.nan
    result = loss_and_gradients(DistributedTwoTowerTask(), queries, candidates, **arguments)
    for value, without_nan in zip(result, expected, strict=True):
        np.testing.assert_array_equal(value, without_nan)
        assert np.isfinite(value).all()


@pytest.mark.usefixtures("two_queries_a_block")
def test_a_masked_positive_is_masked_in_the_streamed_loss(rng):
    queries, candidates = embeddings(rng)
    mask = np.ones((5, 8), bool)
    mask[0, 0] = False
    loss, *gradients = loss_and_gradients(DistributedTwoTowerTask(), queries, candidates, score_mask=mask)
    own_loss, *own = loss_and_gradients(DistributedTwoTowerTask(), queries[1:], candidates[[1, 2, 3, 4, 0, 5, 6, 7]])
    # Its logit is finite and far below all others, and so is what the row adds to the mean.
    masked = -np.finfo(np.float32).min / 100 / 5
    np.testing.assert_allclose(loss, masked + own_loss * 4 / 5, rtol=1e-6)
    np.testing.assert_allclose(gradients[0][1:], own[0] * 4 / 5, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("two_queries_a_block")
def test_bfloat16_embeddings_are_streamed_in_float32(rng):
    queries, candidates = (jax.numpy.asarray(e, "bfloat16") for e in embeddings(rng))
    loss, (of_queries, _) = jax.value_and_grad(DistributedTwoTowerTask(), argnums=(0, 1))(queries, candidates)
    assert (loss.dtype, of_queries.dtype) == ("float32", "bfloat16")
    rounded = np.asarray(queries, "float64"), np.asarray(candidates, "float64")
    np.testing.assert_allclose(loss, reference.softmax_loss(*rounded), rtol=1e-6)


def test_streaming_holds_no_matrix_of_logits_and_begins_at_the_threshold(rng, monkeypatch):
    monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 2**10)
    queries, candidates = embeddings(rng, batch=128, num_candidates=128)

    def temporary_bytes(least):
        monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", least)
        gradient = jax.jit(jax.grad(DistributedTwoTowerTask(), argnums=(0, 1)))
        return gradient.lower(queries, candidates).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(128 * 128) < 4 * 128 * 128 / 2
    assert temporary_bytes(128 * 128 + 1) >= 4 * 128 * 128


@pytest.mark.usefixtures("two_queries_a_block")
@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("mesh", MESHES)
def test_streamed_on_a_mesh_only_embeddings_travel(rng, mesh, case):
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


@pytest.mark.parametrize("how", ["streamed", "materialised", "own loss"])
@pytest.mark.parametrize(("mesh", "extra"), [("DataParallel(2)", 4), ("DataParallel(8)", 0), ("ModelParallel(2x4)", 0)])
def test_local_negatives_are_those_of_the_own_part(rng, request, mesh, extra, how):
    if how == "streamed":
        request.getfixturevalue("two_queries_a_block")
    num_parts, distribution = MESHES[mesh]
    constructor, names = SOFTMAX_CASES["all"]
    batch = 24
    queries, candidates = embeddings(rng, batch=batch, num_candidates=batch + extra)
    arguments = call_arguments(rng, names, batch, batch + extra)
    distribution = distribution()
    keras.distribution.set_distribution(distribution)
    own_loss = {"loss": CATEGORICAL} if how == "own loss" else {}
    task = DistributedTwoTowerTask(negatives="local", **own_loss, **constructor)
    given = [on_mesh(distribution, array) for array in (queries, candidates)]
    on_devices = {name: on_mesh(distribution, value) for name, value in arguments.items()}
    function = jax.jit(jax.value_and_grad(lambda q, c, a: task(q, c, **a), argnums=(0, 1)))
    compiled = function.lower(*given, on_devices).compile()
    # Without extra negatives no embedding leaves its device.
    assert largest_collective(compiled) <= (1 if extra == 0 else candidates.size // num_parts)
    loss, gradients = compiled(*given, on_devices)

    def expected(q, c):
        return reference.local_softmax_loss(q, c, num_parts, **constructor, **arguments)

    np.testing.assert_allclose(loss, expected(queries, candidates), rtol=1e-5)
    assert_follows(expected, (queries, candidates), gradients)


def test_local_negatives_are_all_of_them_on_one_device(rng):
    queries, candidates = embeddings(rng)
    local = DistributedTwoTowerTask(negatives="local")(queries, candidates)
    np.testing.assert_array_equal(local, DistributedTwoTowerTask()(queries, candidates))


def test_local_negatives_want_a_batch_that_divides(rng):
    keras.distribution.set_distribution(data_parallel(2))
    with pytest.raises(ValueError, match=r"5 queries for 2 replicas.*pad_batches"):
        DistributedTwoTowerTask(negatives="local")(*embeddings(rng))


@pytest.mark.parametrize("negatives", ["global", "local"])
def test_made_up_sizes_are_traced_on_a_mesh(negatives, monkeypatch):
    """As Keras does with a model of its own class, whose `call` it runs on sizes that divide by nothing."""
    monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
    keras.distribution.set_distribution(data_parallel(8))
    task = DistributedTwoTowerTask(negatives=negatives)
    for batch in (None, 83):
        symbolic = keras.KerasTensor((batch, 4))
        assert keras.src.backend.compute_output_spec(task.call, symbolic, symbolic).shape == ()
