import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel
from models import NegativesModel

from keras_rs_contrib import (
    CrossBatchMemory,
    DistributedTwoTowerTask,
    MixedNegatives,
    StreamingSamplingProbability,
    mixed_sampling_probability,
)


def zipf(num_candidates):
    probabilities = 1 / np.arange(1, num_candidates + 1)
    return probabilities / probabilities.sum()


def state_of(layer):
    return [np.asarray(variable.value) for variable in layer.non_trainable_variables]


@pytest.mark.parametrize("exclude_ids", [(), (0,), (2, 3, 7, 11)])
def test_probabilities_are_those_of_the_mixture_distribution(rng, exclude_ids):
    counts = rng.random(12)
    layer = MixedNegatives(StreamingSamplingProbability(12, counts=counts), 40, exclude_ids=exclude_ids)
    batch = np.array([3, 0, 3, 11, 5])
    result = layer(batch, training=True)
    assert [value.dtype for value in result] == ["int32", "float32", "bool"]
    ids = np.asarray(result.candidate_ids)
    np.testing.assert_array_equal(ids[:5], batch)
    np.testing.assert_array_equal(result.candidate_mask, [True] * 45)
    expected = reference.mixed_sampling_probability(ids, counts / counts.sum(), 12, 5, 40, exclude_ids)
    np.testing.assert_allclose(result.candidate_sampling_probability, expected, rtol=1e-5)


def test_padding_does_not_count_as_a_draw(rng):
    counts = rng.random(12)
    layer = MixedNegatives(StreamingSamplingProbability(12, counts=counts), 6)
    mask = np.array([True, False, True, False])
    result = layer(np.array([3, 0, 7, 0]), candidate_mask=mask, training=True)
    np.testing.assert_array_equal(result.candidate_mask, [*mask, *[True] * 6])
    expected = reference.mixed_sampling_probability(np.asarray(result.candidate_ids), counts / counts.sum(), 12, 2, 6)
    np.testing.assert_allclose(result.candidate_sampling_probability, expected, rtol=1e-5)


def test_batch_is_counted_once_before_probabilities_are_computed(rng):
    layer = MixedNegatives(StreamingSamplingProbability(9, window=30), 50)
    batches = rng.integers(0, 9, (3, 8))
    masks = rng.random((3, 8)) < 0.8
    estimates = reference.sampling_probability(batches, 9, 30, masks)
    for batch, mask, estimate in zip(batches, masks, estimates, strict=True):
        result = layer(batch, candidate_mask=mask, training=True)
        expected = reference.mixed_sampling_probability(np.asarray(result.candidate_ids), estimate, 9, mask.sum(), 50)
        np.testing.assert_allclose(result.candidate_sampling_probability, expected, rtol=1e-4)


@pytest.mark.parametrize("exclude_ids", [(), (0, 1, 5, 19)])
def test_draws_are_uniform_over_ids_that_are_not_excluded(exclude_ids):
    layer = MixedNegatives(StreamingSamplingProbability(20), 20_000, seed=3, exclude_ids=exclude_ids)
    result = layer(np.array([1]), training=True)
    shares = np.bincount(np.asarray(result.candidate_ids)[1:], minlength=20) / 20_000
    expected = np.ones(20)
    expected[list(exclude_ids)] = 0
    expected /= expected.sum()
    # The tolerance is five standard deviations.
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(expected.max() / 20_000))
    np.testing.assert_array_equal(shares[list(exclude_ids)], 0)


def test_draws_differ_between_batches_and_repeat_with_the_seed():
    layers = [MixedNegatives(StreamingSamplingProbability(1000), 30, seed=seed) for seed in (5, 5, 6)]
    draws = [[np.asarray(layer(np.array([1]), training=True).candidate_ids) for _ in range(2)] for layer in layers]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0][0] != draws[0][1]).any()
    assert (draws[0][0] != draws[2][0]).any()


@pytest.mark.parametrize("training", [False, None])
def test_nothing_is_drawn_or_counted_outside_training(training):
    layer = MixedNegatives(StreamingSamplingProbability(4, counts=[4, 0, 1, 3]), 3)
    before = state_of(layer)
    result = layer(np.array([3, 0, 2]), training=training)
    np.testing.assert_array_equal(result.candidate_ids, [3, 0, 2])
    np.testing.assert_array_equal(result.candidate_sampling_probability, [0.375, 0.5, 0.125])
    np.testing.assert_array_equal(result.candidate_mask, [True] * 3)
    for value, expected in zip(state_of(layer), before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_probability_without_draws_is_zero():
    np.testing.assert_array_equal(mixed_sampling_probability(np.array([0.5, 0.1]), 0.1, 0, 0), [0, 0])


def test_mixed_negatives_approximate_the_full_softmax_better_than_either_kind():
    """Half of the queries prefer candidates in proportion to their popularity; the other half ignore popularity.

    The test compares the task's gradient with respect to the scores with that of the softmax over the corpus. Each kind
    of negatives has the same number of candidates per query.
    """
    num_candidates, batch, num_negatives = 400, 32, 32
    rng = np.random.default_rng(0)
    popularity = zipf(num_candidates)
    taste = np.where(np.arange(batch) % 2, 1.0, 0.0)[:, None]
    scores = taste * np.log(popularity * num_candidates) + 0.5 * rng.standard_normal((batch, num_candidates))
    scores = scores.astype("float32")
    full = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    task, corpus = DistributedTwoTowerTask(remove_accidental_hits=True), np.eye(num_candidates, dtype="float32")
    layer = MixedNegatives(StreamingSamplingProbability(num_candidates, counts=popularity), num_negatives, seed=1)

    @jax.jit
    def gradient(ids, probability, score_mask):
        # Candidate embeddings are rows of the identity matrix, so a query embedding is the vector of its scores.
        return jax.grad(
            lambda queries: task(
                queries,
                keras.ops.take(corpus, ids, axis=0),
                candidate_ids=ids,
                candidate_sampling_probability=probability,
                score_mask=score_mask,
            )
        )(scores)

    errors = {kind: [] for kind in ("in-batch", "uniform", "mixed")}
    errors_of_partition = {kind: [] for kind in errors}
    log_partition = np.log(np.exp(scores).sum(axis=1))
    for _ in range(60):
        positives = rng.choice(num_candidates, batch, p=popularity).astype("int32")
        more = rng.choice(num_candidates, num_negatives, p=popularity).astype("int32")
        uniform = rng.integers(0, num_candidates, batch + num_negatives - 1).astype("int32")
        in_batch, uniform = np.concatenate([positives, more]), np.concatenate([positives, uniform])
        mixed = layer(positives, training=True)
        everything = np.ones((batch, batch + num_negatives), bool)
        # Among the candidates of the batch, each query sees only its positive.
        own = np.concatenate([np.eye(batch, dtype=bool), np.ones((batch, len(uniform) - batch), bool)], axis=1)
        drawn = {
            "in-batch": (in_batch, popularity[in_batch].astype("float32"), everything),
            "uniform": (uniform, np.full(len(uniform), 1 / num_candidates, "float32"), own),
            "mixed": (mixed.candidate_ids, mixed.candidate_sampling_probability, everything),
        }
        expected = (full - corpus[positives]) / batch
        for kind, arguments in drawn.items():
            errors[kind].append(np.sum((gradient(*arguments) - expected) ** 2))
            # The uniform draws follow the candidates of the batch.
            ids, probability = (np.asarray(part)[batch if kind == "uniform" else 0 :] for part in arguments[:2])
            estimate = np.log(np.mean(np.exp(scores[:, ids]) / probability, axis=1))
            errors_of_partition[kind].append(np.mean((estimate - log_partition) ** 2))
    for values, share in ((errors, 0.75), (errors_of_partition, 0.5)):
        error = {kind: np.mean(value) for kind, value in values.items()}
        assert error["mixed"] < share * min(error["in-batch"], error["uniform"]), error


def trained(distribution):
    keras.utils.set_random_seed(1)
    keras.distribution.set_distribution(distribution)
    rng = np.random.default_rng(2)
    users, movies = rng.integers(0, 20, 48), rng.integers(0, 30, 48)
    model = NegativesModel(
        20, 30, MixedNegatives(StreamingSamplingProbability(30), 11, exclude_ids=[0], seed=4), CrossBatchMemory(27)
    )
    model.compile(keras.optimizers.SGD(5.0))
    losses = model.fit(users, movies, batch_size=16, epochs=2, shuffle=False, verbose=0).history["loss"]
    return model, losses, model.evaluate(users, movies, batch_size=16, verbose=0)


def test_training_on_two_devices_equals_training_on_one():
    """The model also has a `CrossBatchMemory`."""
    model, losses, evaluated = trained(None)
    parallel, parallel_losses, parallel_evaluated = trained(data_parallel(2))
    np.testing.assert_allclose([*parallel_losses, parallel_evaluated], [*losses, evaluated], rtol=1e-5)
    for value, expected in zip(parallel.variables, model.variables, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=value.path)


def test_loaded_model_draws_identically(tmp_path):
    model, _, _ = trained(None)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.mixed_negatives.get_config() == model.mixed_negatives.get_config()
    for _ in range(2):
        expected = model.mixed_negatives(np.arange(16), training=True)
        for values, of_model in zip(loaded.mixed_negatives(np.arange(16), training=True), expected, strict=True):
            np.testing.assert_array_equal(values, of_model)


def test_counts_are_saved(tmp_path):
    ids = keras.Input((), dtype="int32")
    layer = MixedNegatives(StreamingSamplingProbability(4, counts=[4, 0, 1, 3]), 3, seed=2, exclude_ids=[1])
    model = keras.Model(ids, list(layer(ids)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for training in (False, True):
        results = zip(loaded(np.arange(4), training=training), model(np.arange(4), training=training), strict=True)
        for values, expected in results:
            np.testing.assert_array_equal(values, expected)
    assert values.shape == (7,)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"sampling_probability": 5}, TypeError, "sampling_probability"),
        ({"num_negatives": 0}, ValueError, "num_negatives"),
        ({"num_negatives": 1.5}, ValueError, "num_negatives"),
        ({"exclude_ids": [5]}, ValueError, "exclude_ids"),
        ({"exclude_ids": [-1]}, ValueError, "exclude_ids"),
        ({"exclude_ids": range(5)}, ValueError, "leave at least one candidate to draw"),
        ({"exclude_ids": [0.5]}, TypeError, "exclude_ids"),
    ],
)
def test_invalid_constructor_arguments_raise(arguments, error, match):
    with pytest.raises(error, match=match):
        MixedNegatives(**{"sampling_probability": StreamingSamplingProbability(5), "num_negatives": 2, **arguments})


@pytest.mark.parametrize(
    ("ids", "mask", "error", "match"),
    [
        (np.ones(3), None, TypeError, "candidate_ids"),
        (np.array([1, 2**31]), None, ValueError, "candidate_ids"),
        (np.ones((3, 1), "int32"), None, ValueError, "candidate_ids"),
        (np.arange(3), np.array([True]), ValueError, "candidate_mask"),
    ],
)
def test_invalid_batches_raise_and_draw_nothing(ids, mask, error, match):
    layer = MixedNegatives(StreamingSamplingProbability(5), 2)
    before = state_of(layer)
    with pytest.raises(error, match=match):
        layer(ids, candidate_mask=mask, training=True)
    for value, expected in zip(state_of(layer), before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_an_id_out_of_range_raises_or_has_no_probability_in_a_compiled_function():
    layer = MixedNegatives(StreamingSamplingProbability(3, counts=[1, 1, 1]), 2, exclude_ids=[2])
    with pytest.raises(ValueError, match=r"must be in \[0, 2\]. Received: 3 in row 0"):
        layer(np.array([3, 1, -1]), training=True)
    drawn = layer.draw()
    result = jax.jit(lambda ids: layer.with_drawn(ids, drawn))(np.array([3, 1, -1]))
    np.testing.assert_array_equal(np.isnan(result.candidate_sampling_probability), [True, False, True, False, False])
