import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import reference

from keras_rs_contrib import LazyAdam, RowAdagrad, RowSGD, RowWiseAdagrad
from keras_rs_contrib.tables import row_optimizers, row_update

KINDS = {"sgd": RowSGD, "adagrad": RowAdagrad, "rowwise_adagrad": RowWiseAdagrad, "lazy_adam": LazyAdam}
NUM_ROWS, DIMENSION = 11, 3
# Unsorted ids with duplicates. Some rows repeat from the previous step, some are new. -1 and 10 are the same row.
STEPS = [
    [[7, 2, 7], [0, 10, -1]],
    [[2, 2, 2], [2, 2, 2]],
    [[-11, 0, 5], [10, 7, 5]],
    [[1, 9, 3], [-2, 7, 7]],
]


@pytest.fixture(params=["rows of the batch", "all rows"])
def update(request, monkeypatch):
    """Updates tables as large ones, and as small ones."""
    monkeypatch.setattr(row_update, "ROWS_PER_ID", 0 if request.param == "rows of the batch" else NUM_ROWS)


def step_of(optimizer, num_rows=NUM_ROWS):
    """Returns a compiled step: from gradients for each id to the table after the step and the looked-up rows."""

    def step(table, ids, gradients, learning_rate, number):
        def loss(table):
            callbacks = (lambda: None, lambda *_: None)
            rows = row_update.look_up(table, ids, num_rows, optimizer, learning_rate, number, None, *callbacks)
            return jnp.sum(rows * gradients), rows

        return jax.grad(loss, has_aux=True)(table)

    return jax.jit(step)


def new_table(optimizer, rng, num_rows=NUM_ROWS, dtype="float32"):
    slots = {
        name: jnp.full((num_rows, width), value, "float32")
        for name, (width, value) in optimizer.slots(DIMENSION).items()
    }
    return row_update.Table(jnp.asarray(rng.normal(size=(num_rows, DIMENSION)), dtype), slots)


def assert_close(table, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(table.embeddings, "float64"), expected[0], **tolerance)
    assert table.slots.keys() == expected[1].keys()
    for name, slot in table.slots.items():
        np.testing.assert_allclose(slot, expected[1][name], **tolerance)


@pytest.mark.usefixtures("update")
@pytest.mark.parametrize("clipnorm", [None, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_table_after_the_step(kind, clipnorm, rng):
    optimizer = KINDS[kind](0.3, clipnorm=clipnorm)
    step, table = step_of(optimizer), new_table(optimizer, rng)
    expected = np.asarray(table.embeddings), table.slots
    for number, ids in enumerate(STEPS, 1):
        gradients = rng.normal(size=(2, 3, DIMENSION)).astype("float32")
        learning_rate = 0.3 / number
        looked_up = np.asarray(table.embeddings)[np.array(ids)]
        table, rows = step(table, jnp.array(ids), gradients, learning_rate, float(number))
        np.testing.assert_array_equal(rows, looked_up)
        expected = reference.row_optimizer_step(
            kind, *expected, ids, gradients, learning_rate=learning_rate, step=number, clipnorm=clipnorm
        )
        # As in Keras, 1 - 0.999 is computed in float32, which gives about five correct digits.
        assert_close(table, expected, rtol=1e-4, atol=1e-5 if kind == "lazy_adam" else 1e-6)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("adagrad", {"epsilon": 0.5}),
        ("rowwise_adagrad", {"epsilon": 0.5}),
        ("lazy_adam", {"epsilon": 0.5, "beta_1": 0.3, "beta_2": 0.6}),
        ("lazy_adam", {"beta_1": 0.0, "beta_2": 0.0}),
    ],
)
def test_settings_follow_the_formula(kind, arguments, rng):
    own = {} if kind == "lazy_adam" else {"initial_accumulator_value": 0.7}
    optimizer = KINDS[kind](0.3, **arguments, **own)
    step, table = step_of(optimizer), new_table(optimizer, rng)
    if own:
        np.testing.assert_array_equal(table.slots["accumulator"], np.float32(0.7))
    expected = np.asarray(table.embeddings), table.slots
    for number, ids in enumerate(STEPS, 1):
        gradients = rng.normal(size=(2, 3, DIMENSION)).astype("float32")
        table, _ = step(table, jnp.array(ids), gradients, 0.3, float(number))
        expected = reference.row_optimizer_step(
            kind, *expected, ids, gradients, learning_rate=0.3, step=number, **arguments
        )
    assert_close(table, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("update")
@pytest.mark.parametrize("kind", KINDS)
def test_an_id_out_of_range_returns_nan_and_changes_no_row(kind, rng):
    optimizer = KINDS[kind]()
    step, table = step_of(optimizer), new_table(optimizer, rng)
    for outside in (NUM_ROWS, -NUM_ROWS - 1, 2**31 - 1, -(2**31)):
        after, rows = step(table, jnp.array([3, outside, 3]), np.ones((3, DIMENSION), "float32"), 0.1, 1.0)
        np.testing.assert_array_equal(np.isnan(rows).all(axis=1), [False, True, False])
        jax.tree.map(np.testing.assert_array_equal, after, table)


@pytest.mark.usefixtures("update")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_outside_the_batch_do_not_change(kind, rng):
    optimizer = KINDS[kind]()
    table = new_table(optimizer, rng)
    after, _ = step_of(optimizer)(table, jnp.array([4, 4]), np.ones((2, DIMENSION), "float32"), 0.1, 1.0)
    others = np.arange(NUM_ROWS) != 4
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), after, table)
    assert not np.array_equal(after.embeddings[4], table.embeddings[4])


def test_padding_rows_cannot_be_looked_up(rng):
    # Ids of padding rows are out of range, and negative ids count from the last row without padding.
    optimizer = RowSGD()
    table = new_table(optimizer, rng)
    rows = step_of(optimizer, num_rows=8)(table, jnp.array([8, 7, -1]), np.zeros((3, DIMENSION)), 0.1, 1.0)[1]
    assert np.isnan(rows[0]).all()
    np.testing.assert_array_equal(rows[2], table.embeddings[7])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32"])
def test_ids_of_any_integer_dtype(dtype, rng):
    num_rows = 200
    optimizer = RowSGD()
    table = new_table(optimizer, rng, num_rows)
    ids = jnp.array([3, np.iinfo(dtype).max, 3], dtype)
    gradients = np.ones((3, DIMENSION), "float32")
    after, rows = step_of(optimizer, num_rows)(table, ids, gradients, 1.0, 1.0)
    expected = reference.row_optimizer_step(
        "sgd", table.embeddings, {}, np.array(ids, "int64"), gradients, learning_rate=1.0, step=1
    )
    assert_close(after, expected, rtol=1e-6)
    assert np.isnan(rows[1]).all() == (np.iinfo(dtype).max >= num_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_changes_nothing(kind, rng):
    optimizer = KINDS[kind]()
    table = new_table(optimizer, rng)
    after, rows = step_of(optimizer)(table, jnp.zeros((0, 2), "int32"), np.zeros((0, 2, DIMENSION)), 0.1, 1.0)
    assert rows.shape == (0, 2, DIMENSION)
    jax.tree.map(np.testing.assert_array_equal, after, table)


def test_a_bfloat16_table_has_float32_gradient_sums_and_slots(rng):
    # 512 gradients of 1: their sum in bfloat16 would stop growing at 256.
    optimizer = RowAdagrad(1.0)
    table = new_table(optimizer, rng, dtype="bfloat16")
    gradients = jnp.ones((512, DIMENSION), "bfloat16")
    after, _ = step_of(optimizer)(table, jnp.full(512, 5), gradients, 1.0, 1.0)
    assert after.embeddings.dtype == "bfloat16"
    assert after.slots["accumulator"].dtype == "float32"
    np.testing.assert_allclose(after.slots["accumulator"][5], 512.0**2 + 0.1)


def test_clipping_handles_gradients_of_any_norm():
    optimizer = RowSGD(1.0, clipnorm=2.0)
    gradients = np.array([[0, 0, 0], [3, 4, 0], [0, 1e-30, 0], [0, 2, 0], [1e18, 0, 0]], "float32")
    expected = np.array([[0, 0, 0], [1.2, 1.6, 0], [0, 1e-30, 0], [0, 2, 0], [2, 0, 0]], "float32")
    np.testing.assert_allclose(optimizer.clip(gradients), expected, rtol=1e-6)


# Configuration.


def test_names_and_defaults_match_keras():
    for name, kind in KINDS.items():
        assert type(row_optimizers.get(name)) is kind
    for ours, theirs in [
        (RowSGD(), keras.optimizers.SGD()),
        (RowAdagrad(), keras.optimizers.Adagrad()),
        (RowWiseAdagrad(), keras.optimizers.Adagrad()),
        (LazyAdam(), keras.optimizers.Adam()),
    ]:
        config = theirs.get_config()
        for name, value in ours.get_config().items():
            assert config[name] == pytest.approx(value), name


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.5, 3, 0.5)


@pytest.mark.parametrize(
    "optimizer",
    [
        RowSGD(0.2, clipnorm=3.0),
        RowAdagrad(0.2, initial_accumulator_value=0.0, epsilon=0.01),
        RowWiseAdagrad(SCHEDULE, epsilon=0.01, clipnorm=1.0),
        LazyAdam(SCHEDULE, beta_1=0.5, beta_2=0.6, epsilon=0.1),
    ],
)
def test_config_round_trip(optimizer):
    copy = row_optimizers.get(keras.saving.serialize_keras_object(optimizer))
    assert type(copy) is type(optimizer)
    assert copy.get_config() == optimizer.get_config()
    assert isinstance(copy.learning_rate, float) or copy.learning_rate(6) == pytest.approx(0.125)


def test_settings_of_keras_optimizers_are_copied():
    ours = row_optimizers.get(keras.optimizers.Adagrad(0.25, initial_accumulator_value=0.5, epsilon=0.01))
    assert type(ours) is RowAdagrad
    assert ours.get_config() == RowAdagrad(0.25, initial_accumulator_value=0.5, epsilon=0.01).get_config()
    ours = row_optimizers.get(keras.optimizers.SGD(SCHEDULE))
    assert type(ours) is RowSGD
    assert ours.learning_rate(6) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"nesterov": True}),
        ("SGD", {"weight_decay": 0.1}),
        ("Adagrad", {"weight_decay": 0.1}),
        ("Adagrad", {"clipnorm": 1.0}),
        ("Adagrad", {"global_clipnorm": 1.0}),
        ("SGD", {"clipvalue": 1.0}),
        ("Adagrad", {"use_ema": True}),
        ("SGD", {"loss_scale_factor": 8.0}),
        ("Adagrad", {"gradient_accumulation_steps": 2}),
    ],
)
def test_unsupported_settings_of_keras_optimizers_raise(kind, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"(?s)`{name}`.*Received: {name}=.*Row{kind}"):
        row_optimizers.get(getattr(keras.optimizers, kind)(**arguments))


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        ("adam", ValueError, "lazy_adam"),
        ("Adagrad", ValueError, "must be one of"),
        (keras.optimizers.Adam, TypeError, "LazyAdam"),
        (RowSGD, TypeError, "must be a name"),
        (None, TypeError, "NoneType"),
        (0.1, TypeError, "float"),
    ],
)
def test_an_invalid_optimizer_raises(optimizer, error, message):
    with pytest.raises(error, match=message):
        row_optimizers.get(optimizer)


def test_keras_adam_and_a_callable_learning_rate_raise_with_the_fix():
    with pytest.raises(TypeError, match="LazyAdam"):
        row_optimizers.get(keras.optimizers.Adam())
    with pytest.raises(ValueError, match="LearningRateSchedule"):
        row_optimizers.get(keras.optimizers.SGD(lambda: 0.1))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "clipnorm", "epsilon"])
def test_numbers_that_are_not_positive_and_finite_raise(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be positive.*Received: {name}="):
        RowAdagrad(**{name: value})


def test_other_invalid_arguments_raise():
    with pytest.raises(TypeError, match="`learning_rate` must be a number"):
        RowSGD("fast")
    with pytest.raises(TypeError, match="`clipnorm` must be a number"):
        RowSGD(clipnorm=True)
    with pytest.raises(ValueError, match="at least 0"):
        RowAdagrad(initial_accumulator_value=-0.1)
    for name in ("beta_1", "beta_2"):
        with pytest.raises(ValueError, match=rf"`{name}` must be in \[0, 1\)"):
            LazyAdam(**{name: 1.0})
