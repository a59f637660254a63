"""A layer or model that cannot be built leaves Keras usable: models that are built next do not meet its error."""

import jax
import keras
import keras_rs
import numpy as np
import pytest
from conftest import data_parallel, model_parallel

from keras_rs_contrib import RowSparseEmbedding, RowWiseAdagrad, ShardedEmbedding, shard_candidates

IDS = np.arange(24) % 9
# Before 3.15, Keras raises a `RuntimeError` with the message of an error in a trace.
ERRORS = (ValueError, RuntimeError)
KINDS = [ShardedEmbedding, RowSparseEmbedding]


class Traced(keras.Model):
    """A model whose layers Keras builds in a trace: it initializes their variables at the end."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = keras.layers.Embedding(10, 4), layer, keras.layers.Dense(1)

    def call(self, x):
        return self.last(keras.ops.concatenate([self.first(x), self.layer(x)], axis=-1))


def fit(model):
    model.compile("sgd", "mse")
    return np.asarray(model.fit(IDS, np.ones((24, 1)), batch_size=24, verbose=0).history["loss"])


def assert_usable(*layers):
    """Builds models that have nothing to do with the failure, each in another way."""
    for layer in (keras.layers.Embedding(10, 4), *layers):
        assert np.isfinite(fit(Traced(layer))).all()
        assert Traced(layer)(IDS).shape == (24, 1)
    assert keras.layers.Dense(2)(np.ones((2, 3))).shape == (2, 2)


def layout(pattern, axes, shape=(2, 4)):
    keras.distribution.set_distribution(model_parallel(shape, pattern, axes))


# Layout maps.

INDIVISIBLE = r"(?s)must .*divi.*Received: .*'[^']*table/{}'.*4 devices.*(row_multiple|layout map|ShardedEmbedding)"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("axes", "arguments", "message"),
    [
        (("model", None), {"output_dim": 4, "row_multiple": 9}, INDIVISIBLE.format("embeddings")),
        ((None, "model"), {"output_dim": 3}, INDIVISIBLE.format("embeddings")),
        (("model", None, None), {"output_dim": 4}, r"(?s)as many axes.*\('model', None, None\).*layout map"),
    ],
)
def test_a_layout_that_does_not_fit_a_table_raises_before_anything_is_created(kind, axes, arguments, message):
    layout(".*table/embeddings", axes)
    layers = [kind(9, name="table", **arguments) for _ in range(3)]
    for use in (lambda layer: layer.build(), lambda layer: Traced(layer)(IDS), lambda layer: fit(Traced(layer))):
        layer = layers.pop()
        with pytest.raises(ERRORS, match=message):
            use(layer)
        assert layer.variables == []
        assert not layer.built
        assert_usable(kind(10, 4, name="other"))


@pytest.mark.parametrize("optimizer", ["adagrad", RowWiseAdagrad(), "lazy_adam"])
@pytest.mark.parametrize("axes", [("model", None), (None, "model"), ("model",), ()])
def test_slots_lie_as_their_table_does_whatever_the_layout_map_says_of_them(optimizer, axes):
    layout(".*table/(accumulator|momentum|velocity|iterations|learning_rate)", axes)
    layer = RowSparseEmbedding(9, 4, optimizer, name="table")
    layer.build()
    for variable in layer.variables:
        assert variable.value.sharding.is_fully_replicated
    fit(Traced(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_layout_leaves_the_table_whole(kind):
    layout(".*", ())
    layer = kind(9, 4, name="table")
    fit(Traced(layer))
    assert layer.embeddings.value.sharding.is_fully_replicated


def test_a_row_sparse_table_that_is_split_over_its_columns_raises_before_it_is_built():
    layout(".*table.*", (None, "model"))
    layer = RowSparseEmbedding(9, 4, name="table")
    with pytest.raises(ValueError, match=r"over its rows only.*\(None, 'model'\) for 'table/embeddings'.*\(axis, None"):
        layer.build()
    assert layer.variables == []


def test_a_layout_that_does_not_fit_the_update_of_lora_raises_and_leaves_the_table():
    layout(".*lora_embeddings_b", ("model", None))
    layer = ShardedEmbedding(9, 4, name="table")
    expected = np.asarray(layer(np.arange(9)))
    with pytest.raises(ValueError, match=r"divisible.*\(2, 4\) of 'table/lora_embeddings_b'.*4 devices.*layout map"):
        layer.enable_lora(2)
    np.testing.assert_array_equal(layer(np.arange(9)), expected)
    for use in (lambda layer: layer.build(), lambda layer: layer(IDS), lambda layer: fit(Traced(layer))):
        with pytest.raises(ERRORS, match=r"(?s)divisible.*lora_embeddings_b"):
            use(ShardedEmbedding(9, 4, name="table", lora_rank=2))
        assert_usable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_rank": -1}, "`rank` must be a positive int"),
        ({"lora_rank": 2, "embeddings_constraint": "non_neg"}, "(?s)must not have a constraint.*Leave out"),
    ],
)
def test_lora_that_cannot_be_enabled_raises_before_the_layer_is_built(arguments, message):
    for use in (lambda layer: layer.build(), lambda layer: layer(IDS), lambda layer: fit(Traced(layer))):
        layer = ShardedEmbedding(9, 4, **arguments)
        with pytest.raises(ERRORS, match=message):
            use(layer)
        assert not layer.built


# Initializers.


def fails(shape, dtype=None):
    raise OSError("the file of initial values is missing")


def interrupted(shape, dtype=None):
    raise KeyboardInterrupt


def wrong_shape(shape, dtype=None):
    return np.ones((3, 3), "float32")


FAILURES = [
    (fails, (OSError, RuntimeError), "the file of initial values is missing"),
    (interrupted, KeyboardInterrupt, None),
    (wrong_shape, ERRORS, r"(?s)initializer must return .*Received: .*\(3, 3\) for \(9, 4\).*wrong_shape"),
]


@pytest.mark.parametrize(("initializer", "error", "message"), FAILURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mesh_axis", "row_multiple"), [(None, 1), ("batch", 8)])
def test_an_initializer_that_fails(kind, initializer, error, message, mesh_axis, row_multiple):
    if mesh_axis is not None:
        keras.distribution.set_distribution(data_parallel(3 if row_multiple == 1 else 8))
    arguments = {"mesh_axis": mesh_axis, "row_multiple": row_multiple}
    layer = kind(9, 4, embeddings_initializer=initializer, **arguments)
    with pytest.raises(error, match=message):
        layer.build()
    assert not layer.built
    assert layer.variables == []
    # It can be built once the initializer works.
    layer.embeddings_initializer = keras.initializers.Ones()
    np.testing.assert_array_equal(layer(np.arange(9)), 1)
    for use in (fit, lambda model: model(IDS)):
        with pytest.raises(error, match=message):
            use(Traced(kind(9, 4, embeddings_initializer=initializer, **arguments)))
        assert_usable(kind(10, 4, **arguments) if mesh_axis is None else kind(10, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_an_initializer_may_return_another_dtype(kind):
    for values in (np.full((9, 4), 2), np.full((9, 4), 2.0), np.full((9, 4), 2, "float16")):
        layer = kind(9, 4, embeddings_initializer=lambda shape, dtype=None, values=values: values)
        assert layer(np.arange(9)).dtype == "float32"
        assert layer.embeddings.value.dtype == "float32"
        fit(Traced(layer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_table_that_does_not_fit_in_memory(kind, num_devices):
    keras.distribution.set_distribution(data_parallel(num_devices))
    # 2 PiB, more than a process can address, also of one of 8 devices.
    arguments = {"input_dim": 2**30, "output_dim": 2**19, "embeddings_initializer": "zeros", "mesh_axis": "batch"}
    layer = kind(**arguments, row_multiple=1)
    with pytest.raises(Exception, match=r"(?i)out of memory|resource"):
        layer.build()
    assert not layer.built
    assert layer.variables == []
    # JAX may report the error only when it waits for the values.
    for use in (fit, lambda model: np.asarray(model(IDS))):
        with pytest.raises(Exception, match=r"(?i)out of memory|resource"):
            use(Traced(kind(**arguments, row_multiple=1)))
        assert_usable(kind(10, 4))


def test_slots_that_do_not_fit_in_memory_leave_the_layer_as_it_was(monkeypatch):
    optimizer = RowWiseAdagrad()
    layer = RowSparseEmbedding(9, 4, optimizer, name="table")
    monkeypatch.setattr(optimizer, "slots", lambda output_dim: {"accumulator": (2**50, 0.1)})
    with pytest.raises(Exception, match=r"(?i)memory|resource|overflow|large|dimensions"):
        layer.build()
    assert not layer.built
    assert layer.variables == []
    monkeypatch.undo()
    fit(Traced(layer))
    assert [v.name for v in layer.variables] == ["embeddings", "accumulator", "iterations", "learning_rate"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_table_is_initialized_on_the_devices_that_hold_it(kind):
    # Keras compiles the initializer of such a table.
    keras.distribution.set_distribution(data_parallel(8))
    layer = kind(300_000, 32, mesh_axis="batch", embeddings_initializer=keras.initializers.RandomUniform(seed=1))
    fit(Traced(layer))
    assert layer.embeddings.value.addressable_shards[0].data.shape == (300_096 // 8, 32)
    assert not np.asarray(layer.embeddings)[300_000:].any()
    assert np.asarray(layer.embeddings)[:300_000].any(axis=1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_int32_can_count_raise(kind):
    with pytest.raises(ValueError, match=r"at most 2147483647 rows.*Received: input_dim=2147483647.*row_multiple=192"):
        kind(2**31 - 1, 4)
    kind(2**31 - 1, 4, row_multiple=1)


# Splitting a table that exists.


def test_a_table_that_cannot_be_split_stays_as_it_was(monkeypatch):
    keras.distribution.set_distribution(data_parallel(8))
    tower = keras.layers.Embedding(16, 4)
    tower.build()
    values = np.asarray(tower.embeddings)

    def out_of_memory(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax, "device_put", out_of_memory)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower, mesh_axis="batch")
    monkeypatch.undo()
    np.testing.assert_array_equal(tower.embeddings, values)
    fit(Traced(keras.layers.Embedding(10, 4)))
    assert tower.embeddings.value.sharding.is_fully_replicated
    tower.embeddings.assign(values)
    assert tower.embeddings.value.sharding.is_fully_replicated
