import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel, model_parallel
from models import NegativesModel

from keras_rs_contrib import CrossBatchMemory, DistributedTwoTowerTask

DIMENSION = 3


def batches_of(rng, sizes):
    """Returns batches of random embeddings, ids and probabilities."""
    return [
        (rng.standard_normal((size, DIMENSION)).astype("float32"), rng.integers(0, 999, size), rng.random(size))
        for size in sizes
    ]


def by_name(embeddings, ids, probabilities, **others):
    """Returns a batch as the arguments of a call."""
    return {
        "candidate_embeddings": embeddings,
        "candidate_ids": ids,
        "candidate_sampling_probability": probabilities,
        **others,
    }


def state_of(layer):
    return {variable.name: np.asarray(variable.value) for variable in layer.non_trainable_variables}


@pytest.mark.parametrize("capacity", [1, 6, 20])
@pytest.mark.parametrize("is_masked", [False, True])
def test_memory_holds_the_most_recent_candidates(rng, capacity, is_masked):
    sizes = [4, 4, 9, 4, 9, 4]
    batches = batches_of(rng, sizes)
    masks = [rng.random(size) < 0.6 if is_masked else np.ones(size, bool) for size in sizes]
    # A batch of padding only.
    masks[3] &= not is_masked
    held = reference.cross_batch_memory([list(zip(*batch, strict=True)) for batch in batches], capacity, masks)
    layer = CrossBatchMemory(capacity)
    layer.build((None, DIMENSION))
    step = jax.jit(lambda state, batch: layer.stateless_call([], state, **batch, training=True))
    state = [variable.value for variable in layer.non_trainable_variables]
    for batch, mask, before in zip(batches, masks, held, strict=False):
        result, state = step(state, by_name(*batch, candidate_mask=mask if is_masked else None))
        filled = np.array([row is not None for row in before])
        np.testing.assert_array_equal(result.candidate_mask, np.concatenate([mask, filled]))
        for part, (values, given) in enumerate(zip(result[:3], batch, strict=True)):
            np.testing.assert_array_equal(values[: len(mask)], given.astype(values.dtype))
            for value, row in zip(np.asarray(values[len(mask) :]), before, strict=True):
                if row is not None:
                    np.testing.assert_array_equal(value, np.asarray(row[part], value.dtype))
    named = {variable.name: value for variable, value in zip(layer.non_trainable_variables, state, strict=True)}
    np.testing.assert_array_equal(named["ids"], [-1 if row is None else row[1] for row in held[-1]])
    assert int(named["num_filled"]) == sum(row is not None for row in held[-1])


@pytest.mark.parametrize("extra", [0, 3])
def test_loss_and_gradient_equal_those_of_one_larger_batch(rng, extra):
    """The candidates of the batch have a gradient, including extra negatives. Stored embeddings have none."""
    queries = rng.standard_normal((4, DIMENSION)).astype("float32")
    earlier, now = (
        (
            rng.standard_normal((4 + extra, DIMENSION)).astype("float32"),
            rng.integers(0, 5, 4 + extra),
            rng.random(4 + extra),
        )
        for _ in range(2)
    )
    layer, task = CrossBatchMemory(10), DistributedTwoTowerTask(remove_accidental_hits=True)
    layer(**by_name(*earlier), training=True)

    @jax.jit
    def loss_of(embeddings, state):
        candidates, state = layer.stateless_call([], state, **by_name(embeddings, *now[1:]), training=True)
        return task(queries, **candidates._asdict()), state

    state = [variable.value for variable in layer.non_trainable_variables]
    floats = [number for number, value in enumerate(state) if value.dtype == "float32"]

    def of_floats(embeddings, values):
        whole = list(state)
        for number, value in zip(floats, values, strict=True):
            whole[number] = value
        return loss_of(embeddings, whole)[0]

    loss, (gradient, of_state) = jax.value_and_grad(of_floats, argnums=(0, 1))(now[0], [state[n] for n in floats])
    arguments = {
        "candidate_ids": np.concatenate([now[1], earlier[1]]),
        "candidate_sampling_probability": np.concatenate([now[2], earlier[2]]),
        "remove_accidental_hits": True,
    }

    def expected(embeddings):
        return reference.softmax_loss(queries, np.concatenate([embeddings, earlier[0]]), **arguments)

    np.testing.assert_allclose(loss, expected(now[0]), rtol=1e-5)
    np.testing.assert_allclose(gradient, reference.gradient(expected, now[0]), atol=1e-5)
    # Only the gradient of stored embeddings is checked: stored probabilities are constants in training.
    np.testing.assert_array_equal(of_state[0], 0)


@pytest.mark.parametrize("training", [False, None])
def test_memory_is_neither_used_nor_changed_outside_training(rng, training):
    (embeddings, ids, probabilities), other = batches_of(rng, [4, 4])
    layer = CrossBatchMemory(6)
    layer(**by_name(*other), training=True)
    before = state_of(layer)
    result = layer(**by_name(embeddings, ids, probabilities), training=training)
    np.testing.assert_array_equal(result.candidate_embeddings, embeddings)
    np.testing.assert_array_equal(result.candidate_ids, ids)
    np.testing.assert_array_equal(result.candidate_mask, [True] * 4)
    # Outside training, arguments that training batches have may be missing.
    assert layer(embeddings, training=training)[1:3] == (None, None)
    for name, value in state_of(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_warmup_fills_the_memory_without_using_it(rng):
    layer = CrossBatchMemory(4, warmup_steps=2)
    used = [np.asarray(layer(rows, training=True).candidate_mask)[2:] for rows, _, _ in batches_of(rng, [2] * 4)]
    np.testing.assert_array_equal(used, [[False] * 4, [False] * 4, [True] * 4, [True] * 4])


def test_ids_and_probabilities_are_optional(rng):
    layer = CrossBatchMemory(2)
    for rows, _, _ in batches_of(rng, [3, 3]):
        result = layer(rows, training=True)
    assert result.candidate_ids is None
    assert result.candidate_sampling_probability is None
    assert result.candidate_embeddings.shape == (5, DIMENSION)


def test_memory_is_float32_and_output_has_the_dtype_of_the_input(rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = CrossBatchMemory(3)
    rows = rng.standard_normal((3, DIMENSION)).astype("float32")
    others = {"candidate_ids": np.arange(3), "candidate_sampling_probability": np.full(3, 0.3), "training": True}
    assert layer(rows, **others).candidate_embeddings.dtype == "float32"
    np.testing.assert_array_equal(layer.embeddings, rows)
    result = layer(keras.ops.cast(rows, "bfloat16"), **others)
    assert result.candidate_embeddings.dtype == "bfloat16"
    assert result.candidate_sampling_probability.dtype == layer.probabilities.dtype == "float32"
    np.testing.assert_array_equal(result.candidate_sampling_probability, np.full(6, 0.3, "float32"))


def test_nan_padding_is_not_stored(rng):
    layer = CrossBatchMemory(4)
    rows = rng.standard_normal((3, DIMENSION)).astype("float32")
    rows[1] = np.nan
    mask = np.array([True, False, True])
    layer(**by_name(rows, np.arange(3), np.array([0.1, np.nan, 0.1]), candidate_mask=mask), training=True)
    assert np.isfinite(layer.embeddings).all()
    assert np.isfinite(layer.probabilities).all()
    np.testing.assert_array_equal(layer.ids, [0, 2, -1, -1])


def trained(distribution, epochs=2):
    keras.utils.set_random_seed(1)
    keras.distribution.set_distribution(distribution)
    rng = np.random.default_rng(2)
    users, movies = rng.integers(0, 20, 48), rng.integers(0, 12, 48)
    model = NegativesModel(20, 12, memory=CrossBatchMemory(21, warmup_steps=1))
    model.compile(keras.optimizers.SGD(5.0))
    losses = model.fit(users, movies, batch_size=16, epochs=epochs, shuffle=False, verbose=0).history["loss"]
    return model, losses, model.evaluate(users, movies, batch_size=16, verbose=0)


def test_training_does_not_depend_on_the_number_of_devices():
    model, losses, evaluated = trained(None)
    expected = state_of(model.memory)
    assert expected["num_filled"] == 21
    for num_devices in (2, 8):
        parallel, parallel_losses, parallel_evaluated = trained(data_parallel(num_devices))
        np.testing.assert_allclose([*parallel_losses, parallel_evaluated], [*losses, evaluated], rtol=1e-5)
        for variable in parallel.memory.non_trainable_variables:
            assert variable.value.sharding.is_fully_replicated
            np.testing.assert_allclose(variable.value, expected[variable.name], atol=1e-6)
        np.testing.assert_allclose(parallel.movie_embedding.embeddings, model.movie_embedding.embeddings, atol=1e-6)


def test_evaluation_loss_does_not_use_the_memory():
    model, _, evaluated = trained(None, epochs=1)
    model.memory = None
    rng = np.random.default_rng(2)
    users, movies = rng.integers(0, 20, 48), rng.integers(0, 12, 48)
    model.compile()
    np.testing.assert_allclose(model.evaluate(users, movies, batch_size=16, verbose=0), evaluated, rtol=1e-6)


def test_loaded_model_continues_training_identically(tmp_path):
    model, _, _ = trained(None, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.memory.get_config() == model.memory.get_config()
    # The loaded memory knows which arguments earlier batches had.
    with pytest.raises(ValueError, match="candidate_ids"):
        loaded.memory(np.ones((2, 4), "float32"), training=True)
    users, movies = np.arange(16), np.arange(16) % 12
    for each in (model, loaded):
        each.fit(users, movies, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for name, value in state_of(loaded.memory).items():
        np.testing.assert_array_equal(value, state_of(model.memory)[name])
    np.testing.assert_array_equal(loaded.movie_embedding.embeddings, model.movie_embedding.embeddings)


def test_functional_model_does_not_fix_the_number_of_candidates(rng):
    inputs = [keras.Input((DIMENSION,)), keras.Input((), dtype="int32"), keras.Input(())]
    kept = CrossBatchMemory(4)(**by_name(*inputs))
    loss = DistributedTwoTowerTask(remove_accidental_hits=True)(inputs[0], **kept._asdict())
    model = keras.Model(inputs, [loss, kept.candidate_embeddings])
    batch = [rng.standard_normal((2, DIMENSION)).astype("float32"), np.arange(2), np.full(2, 0.1, "float32")]
    assert model(batch, training=True)[1].shape == (6, DIMENSION)
    assert model(batch)[1].shape == (2, DIMENSION)
    with pytest.raises(ValueError, match="functional"):
        CrossBatchMemory(4)(inputs[0])


# Errors.


@pytest.mark.parametrize("capacity", [0, -1, 2.5, True, "8"])
def test_capacity_must_be_a_positive_int(capacity):
    with pytest.raises(ValueError, match="capacity"):
        CrossBatchMemory(capacity)


@pytest.mark.parametrize("warmup_steps", [-1, 2.5, True])
def test_warmup_steps_must_be_an_int_of_at_least_0(warmup_steps):
    with pytest.raises(ValueError, match="warmup_steps"):
        CrossBatchMemory(4, warmup_steps=warmup_steps)


WRONG = {
    "float ids": ({"candidate_ids": np.ones(3)}, TypeError, "candidate_ids"),
    "ids beyond int32": ({"candidate_ids": np.array([1, 2**31, 3])}, ValueError, "candidate_ids"),
    "fewer ids": ({"candidate_ids": np.arange(2)}, ValueError, "candidate_ids"),
    "ids in a column": ({"candidate_ids": np.zeros((3, 1), "int32")}, ValueError, "candidate_ids"),
    "more probabilities": ({"candidate_sampling_probability": np.ones(4)}, ValueError, "probability"),
    "a mask of one": ({"candidate_mask": np.array([True])}, ValueError, "candidate_mask"),
    "flat embeddings": ({"candidate_embeddings": np.ones(3)}, ValueError, "candidate_embeddings"),
    "wider embeddings": ({"candidate_embeddings": np.ones((3, 4))}, ValueError, "candidate_embeddings"),
    "no probability": ({"candidate_sampling_probability": None}, ValueError, "probability"),
    "no ids": ({"candidate_ids": None}, ValueError, "candidate_ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_inconsistent_arguments_raise_and_leave_the_memory_unchanged(case):
    arguments, error, match = WRONG[case]
    right = {
        "candidate_embeddings": np.ones((3, DIMENSION), "float32"),
        "candidate_ids": np.arange(3),
        "candidate_sampling_probability": np.full(3, 0.1),
    }
    layer = CrossBatchMemory(4)
    layer(**right, training=True)
    before = state_of(layer)
    with pytest.raises(error, match=match):
        layer(**{**right, **arguments}, training=True)
    for name, value in state_of(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_argument_missing_in_earlier_batches_raises():
    layer = CrossBatchMemory(4)
    layer(np.ones((3, DIMENSION), "float32"), training=True)
    with pytest.raises(ValueError, match="after batches without it"):
        layer(np.ones((3, DIMENSION), "float32"), candidate_ids=np.arange(3), training=True)


def test_empty_batch_leaves_the_memory_unchanged():
    memory = CrossBatchMemory(3)
    memory(np.ones((2, 4), "float32"), candidate_ids=np.array([5, 6]), training=True)
    before = memory.get_weights()
    candidates = memory(np.ones((0, 4), "float32"), candidate_ids=np.zeros(0, "int32"), training=True)
    np.testing.assert_array_equal(np.sort(candidates.candidate_ids), [-1, 5, 6])
    for weight, expected in zip(memory.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("capacity", [4, 6])
def test_a_layout_map_that_does_not_fit_the_memory_raises_before_it_is_built(capacity):
    keras.distribution.set_distribution(model_parallel(pattern=".*memory.*"))
    memory = CrossBatchMemory(capacity, name="memory")
    # Both the rows, if they do not divide over 4 devices, and the weights without rows.
    message = "divisible.*'memory/embeddings'" if capacity == 6 else "as many axes.*'memory/ids'"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{message}.*layout map"):
            memory(np.ones((2, DIMENSION), "float32"), candidate_ids=np.array([5, 6]), training=True)
    assert not memory.built
    assert memory.variables == []
