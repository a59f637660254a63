import copy
import functools
import re

import jax
import jax.numpy as jnp
import keras
import keras_rs
import numpy as np
import pytest
import reference
from conftest import data_parallel, model_parallel
from keras import ops
from keras.src.backend.jax.trainer import _distribute_data

from keras_rs_contrib import (
    LazyAdam,
    RowAdagrad,
    RowSGD,
    RowSparseEmbedding,
    RowWiseAdagrad,
    TwoTowerModel,
    lookup_together,
    shard_candidates,
)

# Neither divides by a number of devices that is tested.
NUM_USERS, NUM_MOVIES, DIMENSION, BATCH = 21, 53, 4, 48
# With these, a batch has 53 ids of movies, which divide over no mesh either.
EXTRA_MOVIES = np.array([0, 52, 7, 7, 20], "int32")
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.2, 5, 0.5)
OPTIMIZERS = {
    "adagrad": lambda: RowAdagrad(0.2),
    "sgd": lambda: RowSGD(0.2, clipnorm=0.05),
    "rowwise_adagrad": lambda: RowWiseAdagrad(0.2),
    "lazy_adam": lambda: LazyAdam(SCHEDULE),
}
MESHES = {
    "DataParallel(2), whole": (lambda: data_parallel(2), None, 1),
    "DataParallel(8), whole": (lambda: data_parallel(8), None, 1),
    "DataParallel(3), by axis": (lambda: data_parallel(3), "batch", 3),
    "DataParallel(8), by axis": (lambda: data_parallel(8), "batch", 8),
    "ModelParallel(2x4), by axis": (lambda: model_parallel((2, 4), "none"), "model", 4),
    "ModelParallel(2x4), by a layout map of tables": (lambda: model_parallel((2, 4), ".*embeddings"), None, 4),
    # Such a map also names the numbers that are no tables.
    "ModelParallel(1x8), by a layout map of layers": (lambda: model_parallel((1, 8), ".*(user|movie).*"), None, 8),
}


@keras.saving.register_keras_serializable(package="tests")
class Towers(keras.Model):
    """Two embeddings and a dense layer: movies are looked up for the batch, and for a few more."""

    def __init__(self, optimizer=None, mesh_axis=None, **kwargs):
        super().__init__(**kwargs)
        self.row_optimizer, self.mesh_axis = optimizer, mesh_axis
        if isinstance(optimizer, dict):
            self.row_optimizer = keras.saving.deserialize_keras_object(optimizer)
        self.user, self.movie = self.tower(NUM_USERS, "user"), self.tower(NUM_MOVIES, "movie")
        self.dense = keras.layers.Dense(1)

    def tower(self, num_rows, name):
        # So large that gradients count beside Adagrad's initial accumulator.
        initializer = keras.initializers.RandomUniform(-1, 1)
        if self.row_optimizer is None:
            return keras.layers.Embedding(num_rows, DIMENSION, initializer, name=name)
        return RowSparseEmbedding(
            num_rows, DIMENSION, self.row_optimizer, initializer, mesh_axis=self.mesh_axis, name=name
        )

    def call(self, x):
        movies, extra = lookup_together(self.movie, [x["movie"], EXTRA_MOVIES])
        return self.dense(self.user(x["user"]) * (movies + ops.mean(extra, axis=0)))

    def get_config(self):
        row_optimizer = keras.saving.serialize_keras_object(self.row_optimizer)
        return {**super().get_config(), "optimizer": row_optimizer, "mesh_axis": self.mesh_axis}


def data(num_batches):
    rng = np.random.default_rng(1)
    size = num_batches * BATCH
    x = {
        "user": rng.integers(0, NUM_USERS, size).astype("int32"),
        "movie": rng.integers(0, NUM_MOVIES - 3, size).astype("int32"),
    }
    # The last row, next to the padding, is trained too, and some rows never.
    x["movie"][::5] = NUM_MOVIES - 1
    return x, 3 * rng.normal(size=(size, 1)).astype("float32")


def compiled(optimizer=None, mesh_axis=None, keras_optimizer="adagrad", **arguments):
    keras.utils.set_random_seed(0)
    model = Towers(OPTIMIZERS.get(optimizer, lambda: optimizer)(), mesh_axis)
    kinds = {"adagrad": keras.optimizers.Adagrad, "sgd": keras.optimizers.SGD}
    model.compile(kinds[keras_optimizer](0.2), "mse", **arguments)
    return model


def fit(model, num_batches=4, epochs=2):
    x, y = data(num_batches)
    return model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def state(model):
    """All weights of the layers by name, without padding."""
    layers = {"user": model.user, "movie": model.movie, "dense": model.dense}
    num_rows = {"user": NUM_USERS, "movie": NUM_MOVIES, "dense": None}
    return {
        f"{name}/{v.name}": np.asarray(v, "float32")[: num_rows[name]] if v.shape else np.asarray(v, "float32")
        for name, layer in layers.items()
        for v in layer.variables
    }


def rows(variable, num_rows=9):
    """The values of a table without its padding rows, which are zeros."""
    value = np.asarray(variable)
    np.testing.assert_array_equal(value[num_rows:], 0)
    return value[:num_rows]


def assert_states_close(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, err_msg=path, **tolerance)


# Training is that of Keras.


@functools.cache
def of_a_plain_embedding(kind, num_batches):
    """Losses and weights after each epoch of steps of Keras's own dense optimizer."""
    model = compiled(keras_optimizer=kind)
    losses = fit(model, num_batches, epochs=2)
    return losses, state(model)


@pytest.mark.parametrize(
    ("kind", "arguments", "num_batches"),
    [
        ("adagrad", {}, 50),
        ("sgd", {}, 50),
        ("adagrad", {"steps_per_execution": 4}, 50),
        ("adagrad", {"run_eagerly": True}, 1),
    ],
)
def test_a_fit_is_that_of_a_plain_embedding(kind, arguments, num_batches):
    expected_losses, expected = of_a_plain_embedding(kind, num_batches)
    rows = {"adagrad": RowAdagrad(0.2), "sgd": RowSGD(0.2)}[kind]
    model = compiled(rows, keras_optimizer=kind, **arguments)
    np.testing.assert_allclose(fit(model, num_batches), expected_losses, rtol=1e-6)
    trained = state(model)
    for path, value in expected.items():
        np.testing.assert_allclose(trained[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    assert int(model.movie.iterations) == 2 * num_batches


def test_the_other_weights_are_trained_by_the_optimizer_of_compile():
    x, y = np.random.default_rng(0).integers(0, 20, (100, 8)), np.ones((100, 8, 1), "float32")

    def sequential(kind, *arguments):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((), dtype="int32"), kind(20, DIMENSION, *arguments), keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        model.build()
        return model

    ours = sequential(RowSparseEmbedding, keras.optimizers.Adagrad(0.1))
    ours.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.5), "mse")
    plain = sequential(keras.layers.Embedding)
    of_rows, of_rest = (
        keras.optimizers.Adagrad(0.1),
        keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.5),
    )
    table, *rest = plain.trainable_variables

    @jax.jit
    def gradients(values, x, y):
        def loss(values):
            predictions, _ = plain.stateless_call(values, [], x)
            return jnp.mean(jnp.square(predictions - y))

        return jax.grad(loss)(values)

    for batch_x, batch_y in zip(x, y, strict=True):
        of_table, *others = gradients([v.value for v in plain.trainable_variables], batch_x, batch_y)
        of_rows.apply([of_table], [table])
        of_rest.apply(others, rest)
    ours.fit(x.ravel(), y.reshape(-1, 1), batch_size=8, shuffle=False, verbose=0)
    for actual, expected in zip(
        (rows(ours.layers[0].embeddings, 20), *ours.layers[1].weights), plain.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


# Devices.


@functools.cache
def of_one_device(optimizer):
    """Losses and all weights."""
    assert keras.distribution.distribution() is None
    model = compiled(optimizer)
    return fit(model), state(model)


@pytest.mark.parametrize(
    ("optimizer", "mesh"),
    [
        *(("lazy_adam", mesh) for mesh in MESHES),
        ("rowwise_adagrad", "ModelParallel(2x4), by a layout map of tables"),
    ],
)
def test_training_on_a_mesh_is_that_of_one_device(optimizer, mesh):
    expected_losses, expected = of_one_device(optimizer)
    distribution, mesh_axis, num_shards = MESHES[mesh]
    keras.distribution.set_distribution(distribution())
    model = compiled(optimizer, mesh_axis)
    np.testing.assert_allclose(fit(model), expected_losses, rtol=1e-5)
    assert_states_close(state(model), expected, rtol=1e-4, atol=1e-5)
    for tower, num_rows in ((model.user, NUM_USERS), (model.movie, NUM_MOVIES)):
        slots = [v for v in tower.trainable_variables if v is not tower.embeddings]
        assert len(slots) == (2 if optimizer == "lazy_adam" else 1)
        for variable in (tower.embeddings, *slots):
            shards = variable.value.addressable_shards
            assert {shard.data.shape[0] for shard in shards} == {192 // num_shards}
            assert len({str(shard.index) for shard in shards}) == num_shards
            assert rows(variable, num_rows).shape[0] == num_rows


def compiled_step(model):
    """The program of a training step as `fit` runs it, with donated weights."""
    x, y = data(1)
    model.fit(x, y, batch_size=BATCH, verbose=0)
    weights = model._get_jax_state(
        trainable_variables=True, non_trainable_variables=True, optimizer_variables=True, metrics_variables=True
    )
    step = jax.jit(model.train_step, donate_argnums=0)
    return step.lower(weights, _distribute_data((x, y))).compile()


@pytest.mark.parametrize("mesh_axis", [None, "batch"])
def test_what_travels_is_as_large_as_the_batch(mesh_axis, monkeypatch):
    monkeypatch.setitem(globals(), "NUM_MOVIES", 40_003)
    keras.distribution.set_distribution(data_parallel(8))
    text = compiled_step(compiled("adagrad", mesh_axis)).as_text()
    collectives = re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)", text)
    sizes = [
        np.prod([int(n) for n in shape.split(",") if n], dtype=int)
        for shapes, _ in collectives
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]
    assert max(sizes) <= 2 * (BATCH + len(EXTRA_MOVIES)) * DIMENSION < 40_003 // 8 * DIMENSION


def test_a_step_has_no_second_copy_of_the_table(monkeypatch):
    monkeypatch.setitem(globals(), "NUM_MOVIES", 100_003)
    memory = compiled_step(compiled("lazy_adam")).memory_analysis()
    table_bytes = 100_003 * DIMENSION * 4
    assert memory.argument_size_in_bytes > 3 * table_bytes
    assert memory.alias_size_in_bytes > 3 * table_bytes
    assert memory.temp_size_in_bytes < table_bytes / 10
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < table_bytes / 10


@pytest.mark.parametrize("mesh", [None, "DataParallel(8), whole", *list(MESHES)[3:]])
def test_ids_out_of_range_are_nan_and_train_nothing(mesh):
    distribution, mesh_axis, _ = MESHES[mesh] if mesh else (lambda: None, None, 1)
    keras.distribution.set_distribution(distribution())
    tower = RowSparseEmbedding(NUM_USERS, DIMENSION, "adagrad", mesh_axis=mesh_axis)
    # The 22nd row is padding on some meshes.
    ids = np.array([3, -1, NUM_USERS, 5, -NUM_USERS, -NUM_USERS - 1, 3], "int32")
    found = np.asarray(tower(ids))
    table = rows(tower.embeddings, NUM_USERS)
    expected = np.stack([table[3], table[-1], [np.nan] * 4, table[5], table[0], [np.nan] * 4, table[3]])
    np.testing.assert_array_equal(found, expected)
    for batch, changed in ((ids, []), (ids[[0, 1, 3, 4, 6]], [0, 3, 5, NUM_USERS - 1])):
        after = gradients_by_hand(tower, batch)
        for variable in tower.trainable_variables:
            before, value = np.asarray(variable), np.asarray(after[variable.path])
            assert np.flatnonzero((before != value).any(axis=1)).tolist() == changed


def gradients_by_hand(tower, ids, loss=jnp.sum):
    """What `jax.grad` gives for each trainable variable of a layer, by path."""

    def of(values):
        outputs, _ = tower.stateless_call(values, [v.value for v in tower.non_trainable_variables], ids)
        return loss(outputs)

    values = [v.value for v in tower.trainable_variables]
    return dict(zip([v.path for v in tower.trainable_variables], jax.jit(jax.grad(of))(values), strict=True))


# Files.


@pytest.mark.parametrize(
    ("optimizer", "saved_on", "loaded_on"),
    [
        ("lazy_adam", None, None),
        ("adagrad", None, None),
        ("adagrad", "DataParallel(3), by axis", "DataParallel(8), by axis"),
        ("lazy_adam", "ModelParallel(2x4), by axis", None),
        ("lazy_adam", None, "ModelParallel(2x4), by a layout map of tables"),
    ],
)
def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path, optimizer, saved_on, loaded_on):
    def put(mesh):
        distribution, mesh_axis, _ = MESHES[mesh] if mesh else (lambda: None, None, 1)
        keras.distribution.set_distribution(distribution())
        return mesh_axis

    def change(model):
        if optimizer == "adagrad":
            model.movie.learning_rate = 0.05

    without_a_stop = resumed(optimizer)
    model = compiled(optimizer, put(saved_on))
    fit(model)
    change(model)
    model.save(tmp_path / "model.keras")
    put(loaded_on)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    if optimizer == "adagrad":
        assert float(loaded.movie.learning_rate.numpy()) == pytest.approx(0.05)
        assert float(loaded.user.learning_rate.numpy()) == pytest.approx(0.2)
    assert_states_close(state(loaded), state(model), rtol=0, atol=0)
    np.testing.assert_allclose(fit(loaded), without_a_stop[0], rtol=0 if saved_on == loaded_on else 1e-5)
    exact = saved_on == loaded_on
    assert_states_close(state(loaded), without_a_stop[1], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


@functools.cache
def resumed(optimizer):
    """The second fit of a model on one device, before which Adagrad's learning rate changes."""
    model = compiled(optimizer)
    fit(model)
    if optimizer == "adagrad":
        model.movie.learning_rate = 0.05
    return fit(model), state(model)


class OneTower(keras.Model):
    """Files call a layer by the name of its attribute, whatever its class."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def call(self, x):
        return self.embedding(x)


def test_weights_of_a_plain_embedding_load(tmp_path):
    plain, ours = OneTower(keras.layers.Embedding(9, 4)), OneTower(RowSparseEmbedding(9, 4))
    expected = plain(np.arange(9))
    ours(np.arange(9))
    plain.save_weights(tmp_path / "model.weights.h5")
    ours.embedding.learning_rate = 0.5
    ours.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(ours(np.arange(9)), expected)
    np.testing.assert_array_equal(rows(ours.embedding.trainable_variables[1]), np.float32(0.1))
    assert float(ours.embedding.learning_rate.numpy()) == 0.5


@pytest.mark.parametrize("other", ["sgd", "rowwise_adagrad", "lazy_adam"])
def test_a_file_of_another_row_optimizer_is_refused_and_changes_nothing(tmp_path, other):
    def layer(optimizer):
        keras.utils.set_random_seed(len(optimizer))
        embedding = RowSparseEmbedding(9, DIMENSION, optimizer, name="table")
        return keras.Sequential([keras.Input((), dtype="int32"), embedding]), embedding

    layer(other)[0].save_weights(tmp_path / "model.weights.h5")
    model, embedding = layer("adagrad")
    before = [np.array(v) for v in embedding.weights]
    with pytest.raises(ValueError, match=r"(?s)must be those of|must have the shapes of"):
        model.load_weights(tmp_path / "model.weights.h5")
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in embedding.weights], before)


# What would spoil the table is an error.


class Spoiled(keras.Model):
    """Does what it is told, besides a lookup."""

    def __init__(self, spoil=None, spoil_loss=None, lookup=True, **arguments):
        super().__init__()
        self.tower = RowSparseEmbedding(9, DIMENSION, "adagrad", **arguments)
        self.dense = keras.layers.Dense(1)
        self.spoil, self.spoil_loss, self.lookup = spoil, spoil_loss, lookup
        self.tower.build()

    def call(self, x):
        result = ops.ones((*x.shape, DIMENSION))
        if self.lookup:
            result = self.tower(x)
        if self.spoil is not None:
            result = result + self.spoil(self.tower, x)
        return self.dense(result)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        loss = ops.mean(ops.square(y - y_pred))
        return loss if self.spoil_loss is None else loss + self.spoil_loss(self.tower, x)


def assert_refused(model, message, optimizer="adam", **arguments):
    model.compile(optimizer, "mse", **arguments)
    with pytest.raises(ValueError, match=message):
        model.fit(np.arange(8), np.ones((8, 1)), batch_size=8, verbose=0)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_second_lookup_in_a_step_is_refused(run_eagerly, policy):
    keras.config.set_dtype_policy(policy)
    message = r"(?s)looked up once.*second lookup of.*lookup_together\("
    assert_refused(Spoiled(lambda tower, x: tower(x)), message, run_eagerly=run_eagerly)
    in_loss = Spoiled(spoil_loss=lambda tower, x: ops.cast(ops.mean(tower(x)), "float32"))
    assert_refused(in_loss, message, run_eagerly=run_eagerly)


def test_a_second_lookup_in_a_functional_model_is_refused():
    ids = keras.Input((), dtype="int32")
    tower = RowSparseEmbedding(9, DIMENSION)
    model = keras.Model(ids, keras.layers.Dense(1)(tower(ids) * tower(ids - 1)))
    assert_refused(model, r"(?s)looked up once.*lookup_together\(")


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_step_whose_loss_depends_on_no_lookup_is_refused(run_eagerly):
    message = r"(?s)must depend on a lookup.*depends on no lookup.*trainable = False"
    assert_refused(Spoiled(lookup=False), message, run_eagerly=run_eagerly)
    # Keras would take the gradient, which is 0, for the new table.
    for in_vain in (lambda tower, x: ops.stop_gradient(tower(x)), lambda tower, x: ops.zeros_like(tower(x))):
        assert_refused(Spoiled(in_vain, lookup=False), message, run_eagerly=run_eagerly)
    model = Spoiled(lookup=False)
    model.tower.trainable = False
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    model.fit(np.arange(8), np.ones((8, 1)), verbose=0)


@pytest.mark.parametrize(
    "result",
    [
        lambda tower, dense, ids: dense(ops.ones((3, DIMENSION))),
        lambda tower, dense, ids: jax.vmap(lambda each: dense(tower(each)))(ids[:, None]),
    ],
    ids=["no lookup", "vmap"],
)
def test_an_optimizer_called_by_hand_refuses_what_is_no_next_table(result):
    tower, dense = RowSparseEmbedding(9, DIMENSION), keras.layers.Dense(1)
    tower.build()
    dense.build((None, DIMENSION))
    variables = [*tower.trainable_variables, *dense.trainable_variables]
    optimizer = keras.optimizers.Adam()
    optimizer.build(variables)
    before = [variable.numpy() for variable in variables]

    def loss(values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return ops.mean(ops.square(result(tower, dense, jnp.arange(4))))

    gradients = jax.grad(loss)([variable.value for variable in variables])
    with pytest.raises(ValueError, match=r"depends on no lookup of it, or on one within `jax\.vmap`"):
        optimizer.apply(gradients, variables)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_what_is_kept_for_the_rows_of_a_frozen_table_stays():
    tower = RowSparseEmbedding(9, DIMENSION)
    model = keras.Sequential([keras.Input((), dtype="int32"), tower, keras.layers.Dense(1)])
    tower.embeddings.trainable = False
    before = tower.get_weights()
    model.compile("adam", "mse")
    model.fit(np.arange(9), np.ones((9, 1)), verbose=0)
    for weight, expected in zip(tower.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("learning_rate", [float("nan"), -1.0, 0.0])
def test_a_learning_rate_that_is_assigned_must_be_positive(learning_rate):
    tower = RowSparseEmbedding(9, DIMENSION)
    tower.build()
    with pytest.raises(ValueError, match="`learning_rate` must be positive"):
        tower.learning_rate = learning_rate


def test_a_gradient_through_the_table_is_refused():
    message = r"(?s)by lookups alone.*from a computation on the table itself.*stop_gradient"
    assert_refused(Spoiled(spoil_loss=lambda tower, x: ops.mean(ops.square(tower.embeddings))), message)
    model = Spoiled(spoil_loss=lambda tower, x: ops.mean(ops.square(ops.stop_gradient(tower.embeddings))))
    model.compile("sgd", "mse")
    model.fit(np.arange(8), np.ones((8, 1)), verbose=0)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_a_lookup_that_was_traced_before_is_refused(transform):
    model = Spoiled(lambda tower, x: transform(lambda ids: tower(ids))(x), lookup=False)
    assert_refused(model, r"(?s)in the very function that is differentiated.*jax\.checkpoint")


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ({"gradient_accumulation_steps": 2}, "larger batches"),
        ({"use_ema": True}, "Leave it out"),
        ({"loss_scale_factor": 8.0}, "mixed_bfloat16"),
    ],
)
def test_an_optimizer_that_changes_gradients_is_refused(arguments, cure):
    model = Spoiled()
    before = [np.array(v) for v in model.tower.weights]
    assert_refused(model, f"(?s){next(iter(arguments))}.*{cure}", keras.optimizers.Adam(**arguments))
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in model.tower.weights], before)
    model.compile("sgd", "mse")
    model.fit(np.arange(8), np.ones((8, 1)), verbose=0)


def test_scaled_losses_are_refused():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    assert_refused(Spoiled(), r"(?s)must not scale the loss.*auto_scale_loss=False", scaled)
    keras.config.set_dtype_policy("mixed_float16")
    assert_refused(Spoiled(), r"(?s)must not scale the loss.*auto_scale_loss=False")
    model = Spoiled()
    model.compile("sgd", "mse", auto_scale_loss=False)
    model.fit(np.arange(8), np.ones((8, 1)), verbose=0)


def test_optimizers_without_such_a_table_do_what_they_did():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(gradient_accumulation_steps=2, use_ema=True), "mse")
    model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=4, verbose=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embeddings_regularizer", "l2"),
        ("embeddings_constraint", "non_neg"),
        ("lora_rank", 2),
        ("quantization_config", object()),
    ],
)
def test_what_goes_over_all_rows_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"rows of the batch alone.*`{name}`"):
        RowSparseEmbedding(9, DIMENSION, **{name: value})


def test_a_layer_is_neither_quantized_nor_given_lora():
    tower = RowSparseEmbedding(9, DIMENSION)
    table = np.asarray(tower(np.arange(9)))
    with pytest.raises(ValueError, match="lora_rank"):
        tower.enable_lora(2)
    with pytest.raises(NotImplementedError, match=r"quantize.*keras\.layers\.Embedding"):
        tower.quantize("int8")
    np.testing.assert_array_equal(tower(np.arange(9)), table)


def test_a_learning_rate_that_cannot_be_assigned():
    tower = RowSparseEmbedding(9, DIMENSION, RowSGD(0.5))
    assert tower.learning_rate == 0.5
    with pytest.raises(ValueError, match="once the layer is built"):
        tower.learning_rate = 0.1
    tower = RowSparseEmbedding(9, DIMENSION, RowSGD(SCHEDULE))
    tower.build()
    assert float(tower.learning_rate) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="where it is no schedule"):
        tower.learning_rate = 0.1


# An embedding like others.


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), "int32"), ((3,), "uint8"), ((2, 3), "uint64"), ((2, 3), "float32"), ((0,), "int64"), ((0, 2), "int32")],
)
def test_ids_of_any_shape_and_dtype(shape, dtype, rng):
    plain = keras.layers.Embedding(9, DIMENSION)
    ids = rng.integers(0, 9, shape).astype(dtype)
    expected = plain(ids)
    tower = RowSparseEmbedding(9, DIMENSION, weights=plain.get_weights())
    np.testing.assert_array_equal(tower(ids), expected)


def test_the_arguments_of_an_embedding():
    table = np.arange(36.0, dtype="float32").reshape(9, 4)
    tower = RowSparseEmbedding(9, 4, mask_zero=True, weights=table)
    np.testing.assert_array_equal(tower(np.array([2, 0])), table[[2, 0]])
    np.testing.assert_array_equal(tower.compute_mask(np.array([2, 0])), [True, False])
    # As Keras does for the same weights given as a list of arrays.
    np.testing.assert_array_equal(rows(RowSparseEmbedding(9, 4, weights=[table]).embeddings), table)
    np.testing.assert_array_equal(RowSparseEmbedding(9, 4, embeddings_initializer="ones")(np.array([1])), 1)
    penalized = RowSparseEmbedding(9, 4, activity_regularizer=keras.regularizers.L2(0.5), weights=table)
    penalized(np.array([[1]]))
    assert float(penalized.losses[0]) == pytest.approx(0.5 * (16 + 25 + 36 + 49))


def test_an_activity_regularizer_is_trained():
    tables = []
    for kind in (RowSparseEmbedding, keras.layers.Embedding):
        keras.utils.set_random_seed(0)
        arguments = {"optimizer": RowSGD(0.1)} if kind is RowSparseEmbedding else {}
        tower = kind(9, DIMENSION, activity_regularizer=keras.regularizers.L2(0.5), **arguments)
        model = keras.Sequential([keras.Input((), dtype="int32"), tower])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(np.array([1, 2, 2, 5]), np.ones((4, DIMENSION)), epochs=3, verbose=0)
        tables.append(rows(tower.embeddings))
    np.testing.assert_allclose(*tables, rtol=1e-5)


def test_a_frozen_table_stays():
    model = compiled("adagrad")
    model.movie.trainable = False
    fit(model)
    frozen = state(model)
    assert int(model.movie.iterations) == 0
    assert int(model.user.iterations) == 8
    np.testing.assert_array_equal(frozen["movie/accumulator"], np.float32(0.1))
    model.movie.trainable = True
    model.compile(keras.optimizers.Adagrad(0.2), "mse")
    fit(model, epochs=1)
    assert int(model.movie.iterations) == 4
    assert (state(model)["movie/embeddings"] != frozen["movie/embeddings"]).any()


def test_mixed_precision_trains_the_table_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    plain = compiled()
    fit(plain, 2)
    model = compiled("adagrad")
    fit(model, 2)
    assert model.movie(np.array([1])).dtype == "bfloat16"
    for variable in model.movie.trainable_variables:
        assert variable.dtype == "float32"
        value = np.asarray(variable)
        assert (value != np.asarray(jnp.asarray(value, "bfloat16"), "float32")).any()
    # Sums of duplicates are those of float32 here, and of bfloat16 in a plain embedding.
    np.testing.assert_allclose(rows(model.movie.embeddings, NUM_MOVIES), plain.movie.embeddings, rtol=0.02, atol=2e-3)


def test_a_bfloat16_table_has_slots_in_float32():
    keras.config.set_dtype_policy("bfloat16")
    model = compiled("adagrad")
    losses = fit(model, 2)
    assert losses[1] < losses[0]
    table, accumulator = model.movie.trainable_variables
    assert (table.dtype, accumulator.dtype) == ("bfloat16", "float32")
    value = np.asarray(accumulator)
    assert (value != np.asarray(jnp.asarray(value, "bfloat16"), "float32")).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_what_its_config_says(optimizer):
    tower = RowSparseEmbedding(9, DIMENSION, OPTIMIZERS[optimizer](), mesh_axis="batch", mask_zero=True)
    config = keras.saving.serialize_keras_object(tower)
    same = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(same) == config
    assert same.mask_zero
    assert same.mesh_axis == "batch"
    assert type(same.optimizer) is type(OPTIMIZERS[optimizer]())
    assert same.optimizer.get_config() == OPTIMIZERS[optimizer]().get_config()


def test_copies_are_trained_apart():
    ids = keras.Input((), dtype="int32")
    model = keras.Model(ids, keras.layers.Dense(1)(RowSparseEmbedding(9, DIMENSION, name="table")(ids)))
    model.compile("sgd", "mse")
    x, y = np.arange(8), np.ones((8, 1))
    model.fit(x, y, verbose=0)
    table = np.asarray(model.get_layer("table").embeddings)
    duplicate, clone = copy.deepcopy(model), keras.models.clone_model(model)
    np.testing.assert_array_equal(duplicate.get_layer("table").embeddings, table)
    assert int(duplicate.get_layer("table").iterations) == 1
    for other in (duplicate, clone):
        other.compile("sgd", "mse")
        other.fit(x, y, verbose=0)
        assert (np.asarray(other.get_layer("table").embeddings) != table).any()
    np.testing.assert_array_equal(model.get_layer("table").embeddings, table)
    assert int(clone.get_layer("table").iterations) == 1


def test_a_gradient_by_hand_is_the_table_after_the_step(rng):
    tower = RowSparseEmbedding(9, DIMENSION, RowAdagrad(0.3))
    tower.build()
    ids, weights = np.array([4, 8, 4, -1]), rng.normal(size=(4, DIMENSION)).astype("float32")
    after = gradients_by_hand(tower, ids, lambda found: jnp.sum(found * weights))
    table, accumulator = tower.trainable_variables
    expected = reference.row_optimizer_step(
        "adagrad", rows(table), {"accumulator": rows(accumulator)}, ids, weights, learning_rate=0.3, step=1
    )
    np.testing.assert_allclose(rows(after[table.path]), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows(after[accumulator.path]), expected[1]["accumulator"], rtol=1e-5)


# Several lookups at once.


@pytest.mark.parametrize(
    "ids",
    [
        [[3, 7], [[1, 2], [4, 5], [6, 8]]],
        ([1, 2], [[3, 4, 5], [6, 7, 8]]),
        {"b": [[1], [2]], "a": [3, 4], "c": 5},
        [0],
    ],
    ids=["other first dimensions", "one first dimension", "a dict with a scalar", "one"],
)
def test_lookups_at_once_are_lookups(ids):
    as_arrays = {k: np.array(v) for k, v in ids.items()} if isinstance(ids, dict) else type(ids)(map(np.array, ids))
    tower = RowSparseEmbedding(9, DIMENSION)
    together = lookup_together(tower, as_arrays)
    assert type(together) is type(as_arrays)
    table = tower.embeddings.numpy()
    assert jax.tree.structure(together) == jax.tree.structure(as_arrays)
    jax.tree.map(lambda found, ids: np.testing.assert_array_equal(found, table[ids]), together, as_arrays)


def test_lookups_at_once_in_a_functional_model(rng):
    inputs = {"one": keras.Input((), dtype="int32", name="one"), "many": keras.Input((3,), dtype="int32", name="many")}

    def model(tower, together):
        found = lookup_together(tower, inputs) if together else {name: tower(ids) for name, ids in inputs.items()}
        scores = ops.sum(ops.expand_dims(found["one"], 1) * found["many"], axis=-1)
        result = keras.Model(inputs, scores)
        result.compile(keras.optimizers.SGD(0.5), "mse")
        return result

    plain = keras.layers.Embedding(9, DIMENSION)
    expected = model(plain, together=False)
    tower = RowSparseEmbedding(9, DIMENSION, RowSGD(0.5), weights=plain.get_weights())
    ours = model(tower, together=True)
    x = {"one": rng.integers(0, 9, 8), "many": rng.integers(0, 9, (8, 3))}
    for each in (ours, expected):
        each.fit(x, np.ones((8, 3)), epochs=3, verbose=0)
    np.testing.assert_allclose(rows(tower.embeddings), plain.embeddings, rtol=1e-5, atol=1e-7)


def test_lookups_at_once_that_cannot_be():
    tower = RowSparseEmbedding(9, DIMENSION)
    with pytest.raises(ValueError, match="at least one"):
        lookup_together(tower, [])
    with pytest.raises(ValueError, match=r"known sizes.*\(None, None\)"):
        lookup_together(tower, [keras.Input((None,), dtype="int32"), keras.Input((), dtype="int32")])


# With the index and the assembled model.


def two_towers(mesh_axis=None):
    keras.utils.set_random_seed(0)
    movies = RowSparseEmbedding(NUM_MOVIES, DIMENSION, RowAdagrad(0.3), name="movie")
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=3, return_scores=True), movies, mesh_axis=mesh_axis)
    model = TwoTowerModel(
        RowSparseEmbedding(NUM_USERS, DIMENSION, RowAdagrad(0.3), name="user"),
        movies,
        query_features="user",
        candidate_features="movie",
        retrieval=index,
    )
    model.compile("sgd")
    return model


def fit_two_towers(model):
    # 59 rows divide over no mesh: the model fills batches up.
    x = {name: ids[:59] for name, ids in data(2)[0].items()}
    return x, model.fit(x, batch_size=20, epochs=2, shuffle=False, verbose=0).history["loss"]


@functools.cache
def two_towers_of_one_device():
    model = two_towers()
    return fit_two_towers(model)[1], rows(model.candidate_tower.embeddings, NUM_MOVIES)


@pytest.mark.parametrize("mesh_axis", [None, "batch"])
def test_two_towers_fit_recommend_and_load(tmp_path, mesh_axis):
    expected_losses, expected = two_towers_of_one_device()
    if mesh_axis is not None:
        keras.distribution.set_distribution(data_parallel(8))
    model = two_towers(mesh_axis)
    x, losses = fit_two_towers(model)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(rows(model.candidate_tower.embeddings, NUM_MOVIES), expected, rtol=1e-4, atol=1e-5)
    users = rows(model.query_tower.embeddings, NUM_USERS)
    recommended = model.recommend({"user": np.arange(NUM_USERS)}, k=3)
    scores, ids = reference.top_k(users, rows(model.candidate_tower.embeddings, NUM_MOVIES), 3)
    np.testing.assert_array_equal(recommended.ids, ids)
    np.testing.assert_allclose(recommended.scores, scores, rtol=1e-4)
    assert np.isfinite(list(model.evaluate(x, batch_size=20, verbose=0, return_dict=True).values())).all()
    before = [np.array(v) for v in model.variables]
    with pytest.raises(ValueError, match=str(NUM_MOVIES)):
        model.fit({**x, "movie": x["movie"] + 1}, batch_size=20, verbose=0)
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in model.variables], before)
    model.save(tmp_path / "model.keras")
    keras.distribution.set_distribution(None)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.recommend({"user": np.arange(NUM_USERS)}, k=3).ids, ids)
    np.testing.assert_allclose(
        fit_two_towers(loaded)[1], fit_two_towers(model)[1], rtol=1e-5
    ) if mesh_axis is None else None


def test_an_index_splits_the_slots_of_a_table_that_is_built(rng):
    keras.distribution.set_distribution(data_parallel(8))
    tower = RowSparseEmbedding(16, DIMENSION, "lazy_adam")
    tower.build()
    before = [np.array(v) for v in tower.weights]
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=3), tower, mesh_axis="batch")
    index(rng.normal(size=(8, DIMENSION)).astype("float32"))
    assert len(tower.trainable_variables) == 3
    for variable in tower.trainable_variables:
        assert {shard.data.shape for shard in variable.value.addressable_shards} == {(24, DIMENSION)}
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in tower.weights], before)
    after = gradients_by_hand(tower, np.array([3, 15]))
    changed = {path: np.flatnonzero((value != 0).any(axis=1)).tolist() for path, value in after.items()}
    assert changed[tower.trainable_variables[1].path] == [3, 15]


def test_a_refused_step_leaves_two_towers_as_they_are():
    tower = RowSparseEmbedding(NUM_USERS, DIMENSION, name="table")
    # Both towers are one: two lookups.
    model = TwoTowerModel(tower, tower, query_features="user", candidate_features="movie")
    model.compile("sgd")
    tower.build()
    before = [np.array(v) for v in tower.weights]
    for _ in range(2):
        with pytest.raises(ValueError, match="looked up once"):
            model.fit({"user": np.arange(8), "movie": np.arange(8)}, batch_size=8, verbose=0)
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in tower.weights], before)
