import re

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel, model_parallel
from jax.sharding import NamedSharding, PartitionSpec

from keras_rs_contrib import StreamingSamplingProbability


def state_of(layer):
    return [np.asarray(variable.value) for variable in layer.non_trainable_variables]


def count(layer, batches):
    """Counts `[num_batches, batch]` ids in one compiled program and returns the result of each call."""

    @jax.jit
    def run(state, batches):
        def step(state, ids):
            result, state = layer.stateless_call([], state, ids, training=True)
            return state, result

        return jax.lax.scan(step, state, batches)

    state, results = run([variable.value for variable in layer.non_trainable_variables], batches)
    for variable, value in zip(layer.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return np.asarray(results)


def zipf(num_candidates):
    probabilities = 1 / np.arange(1, num_candidates + 1)
    return probabilities / probabilities.sum()


def test_frequent_candidates_of_a_long_tail_have_the_documented_error(rng):
    probabilities = zipf(10_000)
    places = rng.permutation(10_000)
    batches = places[np.searchsorted(probabilities.cumsum() / probabilities.sum(), rng.random((3_000, 1_000)))]
    layer = StreamingSamplingProbability(10_000)
    count(layer, batches.astype("int32"))
    estimated = np.asarray(layer(places[:100]))
    relative = estimated / probabilities[:100] - 1
    assert np.abs(relative).max() < 0.1
    # The documented error: a larger one means more noise, a smaller one a window longer than documented.
    promised = 1 / np.sqrt(2 * 1_000_000 * probabilities[:100])
    assert 0.75 < np.sqrt(np.mean((relative / promised) ** 2)) < 1.25
    np.testing.assert_allclose(np.sum(layer(np.arange(10_000, dtype="int32"))), 1, rtol=1e-3)


def test_estimate_follows_a_shift_of_the_distribution(rng):
    """After 100 batches, half of the candidates disappear and as many new ones appear."""
    before = rng.integers(0, 40, (100, 500)).astype("int32")
    after = rng.integers(20, 60, (100, 500)).astype("int32")
    layer, window = StreamingSamplingProbability(60, window=10_000), 10_000
    count(layer, before)
    at_shift = np.asarray(layer(np.arange(60, dtype="int32")))
    np.testing.assert_allclose(at_shift[:40], 1 / 40, rtol=0.15)
    np.testing.assert_array_equal(at_shift[40:], 0)
    last = at_shift
    for part in np.split(after, 5):
        count(layer, part)
        now = np.asarray(layer(np.arange(60, dtype="int32")))
        # The share of a candidate that no longer occurs decays with the number of examples.
        np.testing.assert_allclose(now[:20], last[:20] * np.exp(-part.size / window), rtol=1e-2)
        assert now[40:].sum() > last[40:].sum()
        last = now
    assert last[:20].sum() < 0.01
    np.testing.assert_allclose(last[20:], 1 / 40, rtol=0.15)


@pytest.mark.parametrize("window", [1, 30, 5_000])
@pytest.mark.parametrize("is_masked", [False, True])
def test_estimates_match_the_moving_average_of_the_reference(rng, window, is_masked):
    batches = rng.integers(0, 12, (20, 16)).astype("int32")
    batches[3], batches[7] = 5, np.repeat([2, 9], 8)
    masks = rng.random((20, 16)) < 0.6 if is_masked else None
    if is_masked:
        # Batches of padding only, including the first.
        masks[0] = masks[11] = False
    layer = StreamingSamplingProbability(13, window=window)
    expected = reference.sampling_probability(batches, 13, window, masks)
    for number, batch in enumerate(batches):
        mask = None if masks is None else masks[number]
        result = layer(batch, candidate_mask=mask, training=True)
        assert result.dtype == "float32"
        np.testing.assert_allclose(result, expected[number][batch], rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(layer(np.arange(13)), expected[number], rtol=1e-4, atol=1e-9)


def test_small_batches_in_a_large_window_are_not_lost_to_rounding(rng):
    """Each of these batches is only 1e-5 of the window."""
    batches = rng.integers(0, 6, (3_000, 10)).astype("int32")
    batches[:, 0] = 0
    layer = StreamingSamplingProbability(6, window=1_000_000)
    count(layer, batches)
    expected = np.bincount(batches.ravel()) / batches.size
    np.testing.assert_allclose(layer(np.arange(6)), expected, rtol=0.02)


def test_batches_can_differ_in_size(rng):
    batches = [rng.integers(0, 5, size) for size in (1, 30, 1, 7)]
    layer = StreamingSamplingProbability(5, window=20)
    for batch in batches:
        layer(batch, training=True)
    np.testing.assert_allclose(
        layer(np.arange(5)), reference.sampling_probability(batches, 5, 20)[-1], rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_estimates_do_not_depend_on_the_number_of_devices(rng, num_devices):
    batches = rng.integers(0, 12, (6, 24)).astype("int32")
    masks = rng.random((6, 24)) < 0.8
    expected = reference.sampling_probability(batches, 12, 100, masks)
    keras.distribution.set_distribution(data_parallel(num_devices))
    layer = StreamingSamplingProbability(12, window=100)
    mesh = keras.distribution.distribution().device_mesh.backend_mesh

    @jax.jit
    def step(state, ids, mask):
        return layer.stateless_call([], state, ids, candidate_mask=mask, training=True)

    state = [variable.value for variable in layer.non_trainable_variables]
    for number, batch in enumerate(zip(batches, masks, strict=True)):
        ids, mask = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))
        result, state = step(state, ids, mask)
        np.testing.assert_allclose(result, expected[number][batches[number]], rtol=1e-5, atol=1e-7)
        # The same call in eager mode.
        np.testing.assert_allclose(layer(ids, candidate_mask=mask, training=True), result, rtol=1e-6)
    for value, variable in zip(state, layer.non_trainable_variables, strict=True):
        np.testing.assert_allclose(value, variable.value, rtol=1e-6, atol=1e-7)
        assert variable.value.sharding.is_fully_replicated


def test_inference_does_not_change_the_estimate(rng):
    layer = StreamingSamplingProbability(8, window=50)
    np.testing.assert_array_equal(layer(np.arange(8)), 0)
    layer(np.array([3, 0, 3, 1]), training=True)
    before = state_of(layer)
    for training in (False, None):
        np.testing.assert_allclose(layer(np.array([3, 7, 1]), training=training), [0.5, 0, 0.25], rtol=1e-6)
        layer(rng.integers(0, 8, 100), candidate_mask=np.ones(100, bool), training=training)
    for value, expected in zip(state_of(layer), before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_padding_is_not_counted(rng):
    ids, padded = np.array([1, 2, 2]), np.array([1, 2, 2, 2, 4, 4])
    layers = [StreamingSamplingProbability(5, window=10) for _ in range(2)]
    for _ in range(3):
        layers[0](ids, training=True)
        layers[1](padded, candidate_mask=np.arange(6) < 3, training=True)
    np.testing.assert_allclose(layers[1](np.arange(5)), layers[0](np.arange(5)), rtol=1e-6)
    assert int(layers[1].now) == 9


@pytest.mark.parametrize("counts", [[4, 0, 1, 3], np.array([4, 0, 1, 3], "int64"), np.array([1.0, 0.0, 0.25, 0.75])])
def test_probabilities_from_counts_are_exact_and_fixed(counts):
    layer = StreamingSamplingProbability(4, counts=counts)
    for training in (False, True, True):
        result = layer(np.array([3, 0, 1, 0, 2]), training=training)
        np.testing.assert_array_equal(result, np.array([0.375, 0.5, 0, 0.5, 0.125], "float32"))
    assert len(layer.weights) == 1
    assert layer.trainable_weights == []


def test_counts_can_be_larger_than_float32_represents_exactly():
    layer = StreamingSamplingProbability(2, counts=[2**40 + 1, 2**40 - 1])
    np.testing.assert_allclose(layer(np.arange(2)), [0.5, 0.5], rtol=1e-7)


def test_probabilities_stay_float32_under_mixed_precision(rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    batches = rng.integers(0, 7, (5, 33))
    layer = StreamingSamplingProbability(7)
    for batch in batches:
        result = layer(batch, training=True)
    assert result.dtype == layer.share.dtype == "float32"
    expected = np.bincount(batches.ravel()) / batches.size
    np.testing.assert_allclose(layer(np.arange(7)), expected, rtol=1e-3)


# Saving.


def model_of(layer):
    ids = keras.Input((), dtype="int32")
    return keras.Model(ids, layer(ids))


def test_loaded_model_continues_counting_identically(tmp_path, rng):
    batches = rng.integers(0, 12, (6, 16)).astype("int32")
    model = model_of(StreamingSamplingProbability(12, window=40, name="sampling"))
    assert model.output.shape == (None,)
    for batch in batches[:3]:
        model(batch, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    layer, restored = model.get_layer("sampling"), loaded.get_layer("sampling")
    assert restored.get_config() == layer.get_config()
    for batch in batches[3:]:
        np.testing.assert_array_equal(loaded(batch, training=True), model(batch, training=True))
    for value, expected in zip(state_of(restored), state_of(layer), strict=True):
        np.testing.assert_array_equal(value, expected)
    expected = reference.sampling_probability(batches, 12, 40)[-1]
    np.testing.assert_allclose(loaded(np.arange(12)), expected, rtol=1e-5, atol=1e-9)


def test_counts_are_saved(tmp_path):
    model = model_of(StreamingSamplingProbability(4, counts=[4, 0, 1, 3]))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(np.arange(4), training=True), [0.5, 0, 0.125, 0.375])


def test_layer_from_config_has_no_state():
    layer = StreamingSamplingProbability(6, window=7, name="sampling")
    layer(np.arange(6), training=True)
    restored = StreamingSamplingProbability.from_config(layer.get_config())
    assert (restored.num_candidates, restored.window, restored.name) == (6, 7.0, "sampling")
    np.testing.assert_array_equal(restored(np.arange(6)), 0)


def test_count_of_examples_can_wrap_around(rng):
    """The same stream, with a count that starts at 0 and one that starts just below the largest int32."""
    batches = rng.integers(0, 12, (12, 16)).astype("int32")
    layer, late = (StreamingSamplingProbability(12, window=40) for _ in range(2))
    late.now.assign(2**31 - 50)
    late.updated_at.assign(np.full(12, 2**31 - 50, "int32"))
    for batch in batches:
        np.testing.assert_array_equal(late(batch, training=True), layer(batch, training=True))
        np.testing.assert_array_equal(late(np.arange(12)), layer(np.arange(12)))
    assert int(late.now) < 0 < int(layer.now)


def test_probability_stays_zero_after_more_than_int32_examples():
    """The candidates last occurred more than 2**31 examples ago, a difference that int32 cannot represent."""
    layer = StreamingSamplingProbability(2, window=1_000)
    layer(np.array([0, 1]), training=True)
    layer.now.assign(np.array(3_000_000_000, "uint32").astype("int32"))
    np.testing.assert_array_equal(layer(np.arange(2)), [0, 0])


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_candidates": 0}, ValueError, "num_candidates=0"),
        ({"num_candidates": 2.5}, ValueError, "num_candidates=2.5"),
        ({"window": 0}, ValueError, "window=0"),
        ({"window": 0.5}, ValueError, "window=0.5"),
        ({"window": np.inf}, ValueError, "window=inf"),
        ({"window": np.nan}, ValueError, "window=nan"),
        ({"window": "1000"}, TypeError, "window='1000'"),
        ({"window": True}, TypeError, "window=True"),
        ({"window": None}, TypeError, "window=None"),
        ({"counts": ["a", "b", "c"]}, TypeError, "dtype <U1"),
        ({"counts": [True, True, False]}, TypeError, "dtype bool"),
        ({"counts": [1, 2]}, ValueError, r"shape \(2,\) for 3 candidates"),
        ({"counts": [[1, 2, 3]]}, ValueError, r"shape \(1, 3\) for 3 candidates"),
        ({"counts": [1, -2, 3]}, ValueError, "-2 for candidate 1"),
        ({"counts": [1, 2, np.nan]}, ValueError, "nan for candidate 2"),
        ({"counts": [np.inf, 2, 0]}, ValueError, "inf for candidate 0"),
        ({"counts": [0, 0, 0]}, ValueError, "3 zeros"),
    ],
)
def test_invalid_constructor_arguments_raise(arguments, error, words):
    with pytest.raises(error, match=words):
        StreamingSamplingProbability(**{"num_candidates": 3, **arguments})


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([0.0, 1.0], TypeError, "dtype float64"),
        (jax.numpy.ones(2), TypeError, "dtype float32"),
        (["a"], TypeError, "must be integers"),
        ([[0, 1]], ValueError, r"shape \(1, 2\)"),
        (np.array(3), ValueError, r"shape \(\)"),
        ([0, 2**31], ValueError, "2147483648"),
    ],
)
def test_invalid_ids_raise_and_are_not_counted(ids, error, words):
    layer = StreamingSamplingProbability(3)
    with pytest.raises(error, match=words):
        layer(ids, training=True)
    assert all((value == 0).all() for value in state_of(layer))


def test_an_id_out_of_range_raises_or_has_no_probability_in_a_compiled_function():
    layer = StreamingSamplingProbability(3, name="counts")
    layer(np.array([0, 1]), training=True)
    for wrong in (3, -1):
        ids = np.array([0, wrong, 1])
        with pytest.raises(ValueError, match=rf"`candidate_ids` of 'counts'.*\[0, 2\]. Received: {wrong} in row 1"):
            layer(ids, training=True)
        np.testing.assert_allclose(jax.jit(layer)(ids), [0.5, np.nan, 0.5], rtol=1e-6)
        padded = layer(ids, candidate_mask=np.array([True, False, True]))
        np.testing.assert_allclose(padded, [0.5, np.nan, 0.5], rtol=1e-6)


def test_mask_of_another_length_raises():
    with pytest.raises(ValueError, match="candidate_mask"):
        StreamingSamplingProbability(4)(np.array([1, 3, 3]), candidate_mask=np.array([True]), training=True)


def test_window_can_be_far_larger_than_a_batch():
    layer = StreamingSamplingProbability(4, window=1e9)
    np.testing.assert_allclose(layer(np.array([0, 1, 1, 3]), training=True), [0.25, 0.5, 0.5, 0.25], rtol=1e-5)


def test_masked_batches_have_the_right_weight_in_a_large_window(rng):
    batches, masks = rng.integers(0, 12, (20, 16)).astype("int32"), rng.random((20, 16)) < 0.6
    layer = StreamingSamplingProbability(12, window=1_000_000)
    for batch, mask in zip(batches, masks, strict=True):
        layer(batch, candidate_mask=mask, training=True)
    expected = reference.sampling_probability(batches, 12, 1_000_000, masks)[-1]
    np.testing.assert_allclose(layer(np.arange(12)), expected, rtol=1e-4)


def test_rounding_errors_do_not_accumulate(rng):
    """Candidate 0 is half of each batch."""
    batches = rng.integers(1, 101, (50_000, 64)).astype("int32")
    batches[:, :32] = 0
    layer = StreamingSamplingProbability(101, window=1_000_000)
    count(layer, batches)
    result = np.asarray(layer(np.arange(101)))
    np.testing.assert_allclose([result[0], result.sum()], [0.5, 1], rtol=2e-3)


def test_a_layout_map_that_does_not_fit_the_probabilities_raises():
    keras.distribution.set_distribution(model_parallel(pattern=".*sampling.*"))
    with pytest.raises(ValueError, match=r"as many axes.*\('model', None\) for 'sampling/share'.*layout map"):
        StreamingSamplingProbability(4, name="sampling")


def test_a_step_writes_the_state_in_place():
    """A copy would let a step take longer, the more candidates there are."""
    layer = StreamingSamplingProbability(1009)

    def step(state, ids):
        return layer.stateless_call([], state, ids, training=True)

    state = [variable.value for variable in layer.non_trainable_variables]
    program = jax.jit(step, donate_argnums=0).lower(state, np.zeros(16, "int32")).compile().as_text()
    assert "[1009]" in program
    assert not re.findall(r"\[1009\]\S* copy\(", program)


def test_padding_leaves_the_estimate_as_it_was():
    layer = StreamingSamplingProbability(10, window=100)
    layer(np.array([2, 3]), training=True)
    before = keras.tree.map_structure(keras.ops.convert_to_numpy, [layer.share.value, layer.updated_at.value])
    layer(np.array([2, 5, 3]), candidate_mask=np.array([False, True, False]), training=True)
    after = [keras.ops.convert_to_numpy(value) for value in (layer.share.value, layer.updated_at.value)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.delete(new, 5), np.delete(old, 5))
