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

# 53 is not divisible by any tested number of devices, 21 only by 3.
NUM_USERS, NUM_MOVIES, DIMENSION, BATCH = 21, 53, 4, 48
# With these, a batch has 53 movie ids, which are not divisible either.
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
    # This map also matches the scalar variables.
    "ModelParallel(1x8), by a layout map of layers": (lambda: model_parallel((1, 8), ".*(user|movie).*"), None, 8),
}


@keras.saving.register_keras_serializable(package="tests")
class Towers(keras.Model):
    """Two embeddings and a dense layer. The model looks up the movies of the batch and a few extra ones."""

    def __init__(self, optimizer=None, mesh_axis=None, **kwargs):
        super().__init__(**kwargs)
        self.row_optimizer, self.mesh_axis = optimizer, mesh_axis
        if isinstance(optimizer, dict):
            self.row_optimizer = keras.saving.deserialize_keras_object(optimizer)
        self.user, self.movie = self.tower(NUM_USERS, "user"), self.tower(NUM_MOVIES, "movie")
        self.dense = keras.layers.Dense(1)

    def tower(self, num_rows, name):
        # Values large enough that gradients matter compared to Adagrad's initial accumulator.
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
    # The last row, next to the padding, is trained. Some other rows are never trained.
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
    """Returns all weights of the layers by name, without padding rows."""
    layers = {"user": model.user, "movie": model.movie, "dense": model.dense}
    num_rows = {"user": NUM_USERS, "movie": NUM_MOVIES, "dense": None}
    return {
        f"{name}/{v.name}": np.asarray(v, "float32")[: num_rows[name]] if v.shape else np.asarray(v, "float32")
        for name, layer in layers.items()
        for v in layer.variables
    }


def rows(variable, num_rows=9):
    """Returns a table without its padding rows, after checking that they are zeros."""
    value = np.asarray(variable)
    np.testing.assert_array_equal(value[num_rows:], 0)
    return value[:num_rows]


def assert_states_close(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, err_msg=path, **tolerance)


# Training matches Keras.


@functools.cache
def of_a_plain_embedding(kind, num_batches):
    """Returns the loss of each epoch and the final weights with a plain embedding and Keras's dense optimizer."""
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
def test_fit_matches_a_plain_embedding(kind, arguments, num_batches):
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
    """Returns the losses and all weights after a fit on one device."""
    assert keras.distribution.distribution() is None
    model = compiled(optimizer)
    return fit(model), state(model)


@pytest.mark.parametrize(
    ("optimizer", "mesh"),
    [
        *(("lazy_adam", mesh) for mesh in MESHES if mesh != "DataParallel(2), whole"),
        ("rowwise_adagrad", "ModelParallel(2x4), by a layout map of tables"),
    ],
)
def test_training_on_a_mesh_matches_one_device(optimizer, mesh):
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
    """Returns the compiled program of a training step in `fit`, with donated weights."""
    x, y = data(1)
    model.fit(x, y, batch_size=BATCH, verbose=0)
    weights = model._get_jax_state(
        trainable_variables=True, non_trainable_variables=True, optimizer_variables=True, metrics_variables=True
    )
    step = jax.jit(model.train_step, donate_argnums=0)
    return step.lower(weights, _distribute_data((x, y))).compile()


@pytest.mark.parametrize("mesh_axis", [None, "batch"])
def test_communication_depends_on_the_size_of_the_batch_only(mesh_axis, monkeypatch):
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


def test_a_step_does_not_copy_the_table(monkeypatch):
    monkeypatch.setitem(globals(), "NUM_MOVIES", 100_003)
    memory = compiled_step(compiled("lazy_adam")).memory_analysis()
    table_bytes = 100_003 * DIMENSION * 4
    assert memory.argument_size_in_bytes > 3 * table_bytes
    assert memory.alias_size_in_bytes > 3 * table_bytes
    assert memory.temp_size_in_bytes < table_bytes / 10
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < table_bytes / 10


@pytest.mark.parametrize("mesh", [None, "DataParallel(8), whole", *list(MESHES)[3:]])
def test_ids_out_of_range_return_nan_and_change_no_row(mesh):
    distribution, mesh_axis, _ = MESHES[mesh] if mesh else (lambda: None, None, 1)
    keras.distribution.set_distribution(distribution())
    tower = RowSparseEmbedding(NUM_USERS, DIMENSION, "adagrad", mesh_axis=mesh_axis)
    # The id `NUM_USERS` is that of a padding row.
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
    """Returns the result of `jax.grad` for each trainable variable of a layer, by path."""

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
def test_training_resumes_from_a_file(tmp_path, optimizer, saved_on, loaded_on):
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
    """Returns the losses and weights of a second fit. Adagrad's learning rate changes before it."""
    model = compiled(optimizer)
    fit(model)
    if optimizer == "adagrad":
        model.movie.learning_rate = 0.05
    return fit(model), state(model)


class OneTower(keras.Model):
    """A model whose files name the layer by its attribute, so that its class may change."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def call(self, x):
        return self.embedding(x)


def test_weights_of_a_plain_embedding_can_be_loaded(tmp_path):
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
def test_a_file_of_another_row_optimizer_raises_and_changes_nothing(tmp_path, other):
    def layer(optimizer):
        keras.utils.set_random_seed(len(optimizer))
        embedding = RowSparseEmbedding(9, DIMENSION, optimizer, name="table")
        return keras.Sequential([keras.Input((), dtype="int32"), embedding]), embedding

    layer(other)[0].save_weights(tmp_path / "model.weights.h5")
    model, embedding = layer("adagrad")
    before = [np.array(v) for v in embedding.weights]
    with pytest.raises(ValueError, match=r"(?s)must match its row optimizer|must have the shapes of its weights"):
        model.load_weights(tmp_path / "model.weights.h5")
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in embedding.weights], before)


# Misuse that would corrupt the table raises an error.


class Misused(keras.Model):
    """A model that can use its table in other ways than one lookup."""

    def __init__(self, misuse=None, misuse_loss=None, lookup=True, **arguments):
        super().__init__()
        self.tower = RowSparseEmbedding(9, DIMENSION, "adagrad", **arguments)
        self.dense = keras.layers.Dense(1)
        self.misuse, self.misuse_loss, self.lookup = misuse, misuse_loss, lookup
        self.tower.build()

    def call(self, x):
        result = ops.ones((*x.shape, DIMENSION))
        if self.lookup:
            result = self.tower(x)
        if self.misuse is not None:
            result = result + self.misuse(self.tower, x)
        return self.dense(result)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        loss = ops.mean(ops.square(y - y_pred))
        return loss if self.misuse_loss is None else loss + self.misuse_loss(self.tower, x)


def assert_refused(model, message, optimizer="adam", **arguments):
    model.compile(optimizer, "mse", **arguments)
    with pytest.raises(ValueError, match=message):
        model.fit(np.arange(8), np.ones((8, 1)), batch_size=8, verbose=0)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_second_lookup_in_a_step_raises(run_eagerly, policy):
    keras.config.set_dtype_policy(policy)
    message = r"(?s)looked up once.*second lookup of.*lookup_together\("
    assert_refused(Misused(lambda tower, x: tower(x)), message, run_eagerly=run_eagerly)
    in_loss = Misused(misuse_loss=lambda tower, x: ops.cast(ops.mean(tower(x)), "float32"))
    assert_refused(in_loss, message, run_eagerly=run_eagerly)


def test_a_second_lookup_in_a_functional_model_raises():
    ids = keras.Input((), dtype="int32")
    tower = RowSparseEmbedding(9, DIMENSION)
    model = keras.Model(ids, keras.layers.Dense(1)(tower(ids) * tower(ids - 1)))
    assert_refused(model, r"(?s)looked up once.*lookup_together\(")


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_loss_that_does_not_depend_on_a_lookup_raises(run_eagerly):
    message = r"(?s)must depend on a lookup.*loss does not depend on a lookup.*trainable = False"
    assert_refused(Misused(lookup=False), message, run_eagerly=run_eagerly)
    # Keras would overwrite the table with its gradient, which is 0.
    for unused_lookup in (lambda tower, x: ops.stop_gradient(tower(x)), lambda tower, x: ops.zeros_like(tower(x))):
        assert_refused(Misused(unused_lookup, lookup=False), message, run_eagerly=run_eagerly)
    model = Misused(lookup=False)
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
def test_applying_gradients_that_no_lookup_has_computed_raises(result):
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
    with pytest.raises(
        ValueError, match=r"does not depend on a lookup in this table, or the lookup is inside `jax\.vmap`"
    ):
        optimizer.apply(gradients, variables)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_the_slots_of_a_frozen_table_do_not_change():
    tower = RowSparseEmbedding(9, DIMENSION)
    model = keras.Sequential([keras.Input((), dtype="int32"), tower, keras.layers.Dense(1)])
    tower.embeddings.trainable = False
    before = tower.get_weights()
    model.compile("adam", "mse")
    model.fit(np.arange(9), np.ones((9, 1)), verbose=0)
    for weight, expected in zip(tower.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("learning_rate", [float("nan"), -1.0, 0.0])
def test_an_assigned_learning_rate_must_be_positive(learning_rate):
    tower = RowSparseEmbedding(9, DIMENSION)
    tower.build()
    with pytest.raises(ValueError, match="`learning_rate` must be positive"):
        tower.learning_rate = learning_rate


def test_a_gradient_through_the_table_raises():
    message = r"(?s)must come from a lookup only.*from a computation on the table itself.*stop_gradient"
    assert_refused(Misused(misuse_loss=lambda tower, x: ops.mean(ops.square(tower.embeddings))), message)
    model = Misused(misuse_loss=lambda tower, x: ops.mean(ops.square(ops.stop_gradient(tower.embeddings))))
    model.compile("sgd", "mse")
    model.fit(np.arange(8), np.ones((8, 1)), verbose=0)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_a_lookup_inside_jit_or_checkpoint_raises(transform):
    model = Misused(lambda tower, x: transform(lambda ids: tower(ids))(x), lookup=False)
    assert_refused(model, r"(?s)directly in the function that is differentiated.*jax\.checkpoint")


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ({"gradient_accumulation_steps": 2}, "larger batches"),
        ({"use_ema": True}, "Leave it out"),
        ({"loss_scale_factor": 8.0}, "mixed_bfloat16"),
    ],
)
def test_an_optimizer_that_changes_gradients_raises(arguments, fix):
    model = Misused()
    before = [np.array(v) for v in model.tower.weights]
    assert_refused(model, f"(?s){next(iter(arguments))}.*{fix}", keras.optimizers.Adam(**arguments))
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in model.tower.weights], before)
    model.compile("sgd", "mse")
    model.fit(np.arange(8), np.ones((8, 1)), verbose=0)


def test_loss_scaling_raises():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    assert_refused(Misused(), r"(?s)must not scale the loss.*auto_scale_loss=False", scaled)
    keras.config.set_dtype_policy("mixed_float16")
    assert_refused(Misused(), r"(?s)must not scale the loss.*auto_scale_loss=False")
    model = Misused()
    model.compile("sgd", "mse", auto_scale_loss=False)
    model.fit(np.arange(8), np.ones((8, 1)), verbose=0)


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: keras.optimizers.SGD(gradient_accumulation_steps=2), "larger batches"),
        (lambda: keras.optimizers.SGD(use_ema=True), "Leave it out"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "auto_scale_loss=False"),
    ],
)
def test_a_two_tower_model_checks_its_optimizer_in_compile(make, fix):
    message = rf"(?s)optimizer of a model with a `RowSparseEmbedding`.*{fix}"
    # Other models check it in `fit`, before Keras takes their weights.
    model = Misused()
    before = [np.array(v) for v in model.tower.weights]
    assert_refused(model, message, make())
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in model.tower.weights], before)
    model = TwoTowerModel(RowSparseEmbedding(9, DIMENSION), keras.layers.Embedding(9, DIMENSION), "user", "movie")
    with pytest.raises(ValueError, match=message):
        model.compile(make())
    model.query_tower.trainable = False
    model.compile(make())


def test_values_may_be_assigned_at_any_time():
    model = Misused()
    model.compile("adam", "mse")
    table = np.arange(9 * DIMENSION, dtype="float32").reshape(9, DIMENSION)
    for _ in range(2):
        for values in (np.zeros_like(table), table):
            padded = np.pad(values, ((0, 192 - 9), (0, 0)))
            model.tower.embeddings.assign(padded)
            model.tower.set_weights([padded, *model.tower.get_weights()[1:]])
            np.testing.assert_array_equal(model.tower(np.arange(9)), values)
        model.fit(np.arange(8), np.ones((8, 1)), verbose=0)


def test_optimizers_of_models_without_row_sparse_tables_are_not_checked():
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
def test_arguments_that_need_all_rows_raise(name, value):
    with pytest.raises(ValueError, match=rf"only the rows of the batch.*`{name}`"):
        RowSparseEmbedding(9, DIMENSION, **{name: value})


def test_quantize_and_enable_lora_raise():
    tower = RowSparseEmbedding(9, DIMENSION)
    table = np.asarray(tower(np.arange(9)))
    with pytest.raises(ValueError, match="lora_rank"):
        tower.enable_lora(2)
    with pytest.raises(NotImplementedError, match=r"quantize.*keras\.layers\.Embedding"):
        tower.quantize("int8")
    np.testing.assert_array_equal(tower(np.arange(9)), table)


def test_the_learning_rate_cannot_be_assigned_before_build_or_for_a_schedule():
    tower = RowSparseEmbedding(9, DIMENSION, RowSGD(0.5))
    assert tower.learning_rate == 0.5
    with pytest.raises(ValueError, match="only once the layer is built"):
        tower.learning_rate = 0.1
    tower = RowSparseEmbedding(9, DIMENSION, RowSGD(SCHEDULE))
    tower.build()
    assert float(tower.learning_rate) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="only if it is not a schedule"):
        tower.learning_rate = 0.1


# The behavior of a plain embedding.


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


def test_arguments_of_a_plain_embedding():
    table = np.arange(36.0, dtype="float32").reshape(9, 4)
    tower = RowSparseEmbedding(9, 4, mask_zero=True, weights=table)
    np.testing.assert_array_equal(tower(np.array([2, 0])), table[[2, 0]])
    np.testing.assert_array_equal(tower.compute_mask(np.array([2, 0])), [True, False])
    # Like Keras, the layer also accepts a list with one array.
    np.testing.assert_array_equal(rows(RowSparseEmbedding(9, 4, weights=[table]).embeddings), table)
    np.testing.assert_array_equal(RowSparseEmbedding(9, 4, embeddings_initializer="ones")(np.array([1])), 1)
    penalized = RowSparseEmbedding(9, 4, activity_regularizer=keras.regularizers.L2(0.5), weights=table)
    penalized(np.array([[1]]))
    assert float(penalized.losses[0]) == pytest.approx(0.5 * (16 + 25 + 36 + 49))


def test_an_activity_regularizer_affects_training():
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


def test_a_frozen_table_does_not_change():
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
    # Gradients of duplicates are summed in float32 here, and in bfloat16 in a plain embedding.
    np.testing.assert_allclose(rows(model.movie.embeddings, NUM_MOVIES), plain.movie.embeddings, rtol=0.02, atol=2e-3)


def test_a_bfloat16_table_has_float32_slots():
    keras.config.set_dtype_policy("bfloat16")
    model = compiled("adagrad")
    losses = fit(model, 2)
    assert losses[1] < losses[0]
    table, accumulator = model.movie.trainable_variables
    assert (table.dtype, accumulator.dtype) == ("bfloat16", "float32")
    value = np.asarray(accumulator)
    assert (value != np.asarray(jnp.asarray(value, "bfloat16"), "float32")).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_config_round_trip(optimizer):
    tower = RowSparseEmbedding(9, DIMENSION, OPTIMIZERS[optimizer](), mesh_axis="batch", mask_zero=True)
    config = keras.saving.serialize_keras_object(tower)
    same = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(same) == config
    assert same.mask_zero
    assert same.mesh_axis == "batch"
    assert type(same.optimizer) is type(OPTIMIZERS[optimizer]())
    assert same.optimizer.get_config() == OPTIMIZERS[optimizer]().get_config()


def test_copies_are_trained_independently():
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


def test_jax_grad_returns_the_table_after_the_step(rng):
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


# Several lookups in one call.


@pytest.mark.parametrize(
    "ids",
    [
        [[3, 7], [[1, 2], [4, 5], [6, 8]]],
        ([1, 2], [[3, 4, 5], [6, 7, 8]]),
        {"b": [[1], [2]], "a": [3, 4], "c": 5},
        [0],
    ],
    ids=["different first dimensions", "equal first dimensions", "a dict with a scalar", "one tensor"],
)
def test_lookup_together_matches_separate_lookups(ids):
    as_arrays = {k: np.array(v) for k, v in ids.items()} if isinstance(ids, dict) else type(ids)(map(np.array, ids))
    tower = RowSparseEmbedding(9, DIMENSION)
    together = lookup_together(tower, as_arrays)
    assert type(together) is type(as_arrays)
    table = tower.embeddings.numpy()
    assert jax.tree.structure(together) == jax.tree.structure(as_arrays)
    jax.tree.map(lambda found, ids: np.testing.assert_array_equal(found, table[ids]), together, as_arrays)


def test_lookup_together_in_a_functional_model(rng):
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


def test_invalid_ids_of_lookup_together_raise():
    tower = RowSparseEmbedding(9, DIMENSION)
    with pytest.raises(ValueError, match="at least one tensor"):
        lookup_together(tower, [])
    with pytest.raises(ValueError, match=r"known sizes.*\(None, None\)"):
        lookup_together(tower, [keras.Input((None,), dtype="int32"), keras.Input((), dtype="int32")])


# With the index and `TwoTowerModel`.


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
    # Neither 59 rows nor batches of 20 are divisible by 8: the model pads the batches.
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


def test_an_index_splits_the_slots_of_a_built_table(rng):
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


class FailsInTraining(keras.layers.Layer):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def build(self, input_shape):
        self.table.build(input_shape)

    def call(self, ids, training=None):
        embeddings = self.table(ids)
        if training:
            raise ValueError("fails in training")
        return embeddings


def test_a_failed_step_does_not_change_the_towers():
    tower = RowSparseEmbedding(NUM_USERS, DIMENSION, name="table")
    model = TwoTowerModel(FailsInTraining(tower), tower, query_features="user", candidate_features="movie")
    model.compile("sgd")
    tower.build()
    before = [np.array(v) for v in tower.weights]
    for _ in range(2):
        with pytest.raises(ValueError, match="fails in training"):
            model.fit({"user": np.arange(8), "movie": np.arange(8)}, batch_size=8, verbose=0)
    jax.tree.map(np.testing.assert_array_equal, [np.array(v) for v in tower.weights], before)
