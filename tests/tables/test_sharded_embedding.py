import functools
import zipfile

import h5py
import jax
import keras
import keras_rs
import numpy as np
import pytest
import reference
from conftest import data_parallel, model_parallel
from models import DIMENSION, RetrievalModel, predictions

from keras_rs_contrib import ShardedEmbedding, shard_candidates

# The 1,682 movies of MovieLens 100K, and id 0 for no movie. 1,683 is divisible by 3 and 9, but not by 2.
NUM_USERS, NUM_MOVIES = 48, 1683
# The next multiple of 192.
NUM_ROWS = 1728
MESHES = {
    "1 device": (lambda: None, None, 1),
    "DataParallel(2)": (lambda: data_parallel(2), "batch", 2),
    "DataParallel(3)": (lambda: data_parallel(3), "batch", 3),
    "DataParallel(8)": (lambda: data_parallel(8), "batch", 8),
    "ModelParallel(2x4), by axis": (lambda: model_parallel((2, 4), "none"), "model", 4),
    "ModelParallel(2x4), by the batch axis": (lambda: model_parallel((2, 4), "none"), "batch", 2),
    "ModelParallel(2x4), by layout map": (lambda: model_parallel((2, 4), ".*movie.*embeddings"), None, 4),
}


def set_mesh(name):
    distribution, mesh_axis, num_shards = MESHES[name]
    keras.distribution.set_distribution(distribution())
    return mesh_axis, num_shards


def data():
    rng = np.random.default_rng(0)
    x = rng.integers(0, NUM_USERS, 192).astype("int32")
    # The last row, next to the padding, is trained too.
    y = {"movie_id": rng.integers(1, NUM_MOVIES, 192), "rating": rng.random(192).astype("float32")}
    y["movie_id"][::7] = NUM_MOVIES - 1
    return x, {**y, "movie_id": y["movie_id"].astype("int32")}


def compiled_model(optimizer="adagrad", mesh_axis=None, is_sharded=True):
    keras.utils.set_random_seed(0)
    model = RetrievalModel(NUM_USERS, NUM_MOVIES, mesh_axis=mesh_axis, is_sharded=is_sharded)
    model.compile(keras.optimizers.get({"class_name": optimizer, "config": {"learning_rate": 0.5}}))
    return model


def fit(model, epochs=2):
    return model.fit(*data(), batch_size=48, epochs=epochs, shuffle=False, verbose=0).history["loss"]


@functools.cache
def of_a_plain_embedding(optimizer="adagrad", fits=1):
    """Returns the losses of the last fit, the predictions and the movie table on one device."""
    assert keras.distribution.distribution() is None
    model = compiled_model(optimizer, is_sharded=False)
    losses = [fit(model) for _ in range(fits)][-1]
    return losses, predictions(model), model.the_tower.get_weights()[0]


@pytest.mark.parametrize(
    ("mesh", "optimizer"), [*((mesh, "adagrad") for mesh in MESHES), ("ModelParallel(2x4), by axis", "adam")]
)
def test_training_and_predictions_match_a_plain_embedding(mesh, optimizer):
    expected_losses, expected_predictions, expected_table = of_a_plain_embedding(optimizer)
    mesh_axis, num_shards = set_mesh(mesh)
    model = compiled_model(optimizer, mesh_axis)
    np.testing.assert_allclose(fit(model), expected_losses, rtol=1e-5)
    np.testing.assert_array_equal(predictions(model), expected_predictions)
    table = model.the_tower.embeddings.numpy()
    np.testing.assert_allclose(table[:NUM_MOVIES], expected_table, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(table[NUM_MOVIES:], 0)
    slots = [v for v in model.optimizer.variables if v.shape == (NUM_ROWS, DIMENSION)]
    assert slots
    for variable in [model.the_tower.embeddings, *slots]:
        assert variable.value.addressable_shards[0].data.shape == (NUM_ROWS // num_shards, DIMENSION)


@pytest.fixture(scope="module", params=["DataParallel(8)", "ModelParallel(2x4), by axis"])
def saved(request, tmp_path_factory):
    """Returns a file of a model that was trained on a mesh, and the axis that split its rows."""
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    mesh_axis, _ = set_mesh(request.param)
    model = compiled_model(mesh_axis=mesh_axis)
    fit(model)
    model.save(path)
    keras.distribution.set_distribution(None)
    return path, mesh_axis


@pytest.mark.parametrize("loaded_on", MESHES)
def test_training_resumes_on_another_mesh(saved, loaded_on):
    path, mesh_axis = saved
    expected_losses, expected_predictions, _ = of_a_plain_embedding(fits=2)
    _, num_shards = set_mesh(loaded_on)
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(fit(loaded), expected_losses, rtol=1e-5)
    np.testing.assert_array_equal(predictions(loaded), expected_predictions)
    # The file contains the mesh axis, and another mesh may not have this axis.
    rows = loaded.the_tower.embeddings.value.addressable_shards[0].data.shape[0]
    axes = None if keras.distribution.distribution() is None else keras.distribution.distribution().device_mesh
    if axes is not None and (mesh_axis in axes.axis_names or MESHES[loaded_on][1] is None):
        shards = num_shards if mesh_axis is None else axes.shape[axes.axis_names.index(mesh_axis)]
        assert rows == NUM_ROWS // shards


def small_model(**arguments):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((), dtype="int32"), ShardedEmbedding(19, 4, mesh_axis="batch", **arguments)])


def small_fit(optimizer=None, **arguments):
    model = small_model(**arguments)
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse")
    history = model.fit(np.arange(16), np.ones((16, 4)), batch_size=16, epochs=4, shuffle=False, verbose=0)
    return history.history["loss"], model.get_weights()[0]


class Centered(keras.constraints.Constraint):
    """Depends on all rows."""

    def __call__(self, w):
        return w - keras.ops.mean(w, axis=0, keepdims=True)


class DistanceToOne(keras.regularizers.Regularizer):
    """A penalty that is not zero for padding rows."""

    def __call__(self, x):
        return keras.ops.mean(keras.ops.square(x - 1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)},
        {"optimizer": lambda: keras.optimizers.Lamb(0.1, weight_decay=0.1, clipnorm=0.01)},
        {"embeddings_regularizer": lambda: keras.regularizers.L2(0.01)},
        {"embeddings_regularizer": lambda: keras.regularizers.OrthogonalRegularizer(0.01, mode="rows")},
        {"embeddings_regularizer": lambda: DistanceToOne()},
        {"embeddings_constraint": lambda: keras.constraints.UnitNorm(axis=1)},
        {"embeddings_constraint": lambda: Centered()},
    ],
    ids=["accumulation", "Lamb", "L2", "orthogonal rows", "mean", "unit norm", "centered"],
)
def test_padding_does_not_change_training(arguments):
    expected_losses, expected_table = small_fit(**{name: make() for name, make in arguments.items()}, row_multiple=1)
    keras.distribution.set_distribution(data_parallel(8))
    losses, table = small_fit(**{name: make() for name, make in arguments.items()})
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(table[:19], expected_table, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(table[19:], 0)


def test_a_file_with_another_number_of_rows_raises(tmp_path):
    path = tmp_path / "file.weights.h5"
    keras.Sequential([keras.Input((), dtype="int32"), ShardedEmbedding(24, 4)]).save_weights(path)
    keras.distribution.set_distribution(data_parallel(8))
    model = small_model()
    table = model.get_weights()[0]
    assert model.layers[-1].embeddings.shape == (192, 4)
    with pytest.raises(ValueError, match=r"must have one row for each id.*\(24, 4\) for 19 rows"):
        model.load_weights(path)
    with pytest.raises(ValueError, match=r"(\(192, 4\)).*\(24, 4\)"):
        model.set_weights([np.ones((24, 4))])
    np.testing.assert_array_equal(model.get_weights()[0], table)


def shapes_in(path, folder):
    """Returns the shapes of the weights in a `.keras` file, by name."""
    with zipfile.ZipFile(path) as file:
        file.extract("model.weights.h5", folder)
    shapes = {}
    with h5py.File(folder / "model.weights.h5") as weights:
        weights.visititems(
            lambda name, item: shapes.update({name: item.shape}) if isinstance(item, h5py.Dataset) else None
        )
    return shapes


def test_padding_rows_are_not_saved(tmp_path):
    set_mesh("DataParallel(8)")
    model = compiled_model(mesh_axis="batch")
    fit(model, epochs=1)
    assert model.the_tower.embeddings.shape == (NUM_ROWS, DIMENSION)
    model.save(tmp_path / "model.keras")
    shapes = shapes_in(tmp_path / "model.keras", tmp_path)
    saved = sorted(shape[0] for name, shape in shapes.items() if len(shape) == 2 and "optimizer" not in name)
    assert saved == [48, 1683]


class OneTower(keras.Model):
    """A model whose files name the layer by its attribute, so that its class may change."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def call(self, x):
        return self.embedding(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plain_embedding_can_load_the_file_and_vice_versa(tmp_path, dtype):
    kinds = (lambda: ShardedEmbedding(19, 4, dtype=dtype), lambda: keras.layers.Embedding(19, 4, dtype=dtype))
    for save_kind, load_kind in (kinds, kinds[::-1]):
        saved, loaded = OneTower(save_kind()), OneTower(load_kind())
        expected = np.asarray(saved(np.arange(19)))
        assert (np.asarray(loaded(np.arange(19))) != expected).any()
        saved.save_weights(tmp_path / "model.weights.h5")
        loaded.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_array_equal(loaded(np.arange(19)), expected)


@pytest.mark.parametrize("mesh", ["1 device", "DataParallel(3)", "ModelParallel(2x4), by layout map"])
def test_a_functional_model_traces_with_an_unknown_batch_size(tmp_path, rng, mesh):
    mesh_axis, num_shards = set_mesh(mesh)
    queries, movies = keras.Input((DIMENSION,)), keras.Input((), dtype="int32")
    tower = ShardedEmbedding(NUM_MOVIES, DIMENSION, name="movie_tower")
    retrieval = keras_rs.layers.BruteForceRetrieval(k=5, name="index")
    index = shard_candidates(retrieval, tower, mesh_axis=mesh_axis)
    model = keras.Model([queries, movies], [*index(queries), tower(movies)])
    assert [output.shape for output in model.outputs] == [(None, 5), (None, 5), (None, DIMENSION)]
    x = [rng.normal(size=(24, DIMENSION)).astype("float32"), rng.integers(0, NUM_MOVIES, 24).astype("int32")]
    _scores, ids, embeddings = model.predict(x, batch_size=24, verbose=0)
    table = tower.embeddings.numpy()[:NUM_MOVIES]
    np.testing.assert_array_equal(ids, reference.top_k(x[0], table, 5)[1])
    np.testing.assert_array_equal(embeddings, table[x[1]])
    assert tower.embeddings.value.addressable_shards[0].data.shape[0] == NUM_ROWS // num_shards
    model.save(tmp_path / "model.keras")
    for other in MESHES:
        set_mesh(other)
        loaded = keras.models.load_model(tmp_path / "model.keras")
        jax.tree.map(np.testing.assert_array_equal, loaded.predict(x, batch_size=24, verbose=0)[1], ids)


# The layer.


def test_the_layer_is_an_embedding_with_padding_rows(rng):
    table = rng.normal(size=(5, 3)).astype("float32")
    layer = ShardedEmbedding(5, 3, weights=table, mask_zero=True)
    np.testing.assert_array_equal(layer(np.array([[4, 0]])), table[[[4, 0]]])
    np.testing.assert_array_equal(layer.compute_mask(np.array([4, 0])), [True, False])
    assert layer.embeddings.shape == (192, 3)
    assert type(layer.embeddings) is keras.Variable
    copy = ShardedEmbedding.from_config(layer.get_config())
    assert copy.mask_zero
    assert copy.row_multiple == 192


@pytest.mark.parametrize(("row_multiple", "num_rows"), [(1, 5), (2, 6), (5, 5), (7, 7), (192, 192)])
def test_the_number_of_rows_is_rounded_up_to_row_multiple(row_multiple, num_rows):
    layer = ShardedEmbedding(5, 3, row_multiple=row_multiple)
    layer.build()
    assert layer.embeddings.shape == (num_rows, 3)
    assert ShardedEmbedding.from_config(layer.get_config()).row_multiple == row_multiple


@pytest.mark.parametrize("row_multiple", [0, -1, 1.5, True, "8"])
def test_row_multiple_must_be_a_positive_int(row_multiple):
    with pytest.raises(ValueError, match="`row_multiple` must be a positive int"):
        ShardedEmbedding(5, 3, row_multiple=row_multiple)


@pytest.mark.parametrize("num_devices", [5, 7])
def test_an_indivisible_number_of_padded_rows_raises_with_the_fix(num_devices):
    keras.distribution.set_distribution(data_parallel(num_devices))
    layer = ShardedEmbedding(35, 3, mesh_axis="batch")
    with pytest.raises(ValueError, match=rf"(?s)row_multiple=192.*Pass a `row_multiple` divisible by {num_devices}"):
        layer.build()
    layer = ShardedEmbedding(35, 3, mesh_axis="batch", row_multiple=num_devices)
    layer.build()
    assert layer.embeddings.value.addressable_shards[0].data.shape == (35 // num_devices, 3)


def test_ids_out_of_range_match_a_plain_embedding():
    plain = keras.layers.Embedding(5, 3, embeddings_initializer="normal")
    ids = np.array([0, 4, 5, 6, 7, 8, 100, 191, 192, 193, -1, -5, -6, -7, -192, -193])
    expected = np.asarray(plain(ids))
    for distribution in (None, data_parallel(8)):
        keras.distribution.set_distribution(distribution)
        layer = ShardedEmbedding(5, 3, mesh_axis="batch", weights=plain.get_weights()[0])
        np.testing.assert_array_equal(layer(ids), expected)
    assert np.isnan(expected).any()


def test_weights_include_the_padding_rows(rng):
    keras.distribution.set_distribution(data_parallel(8))
    table = rng.normal(size=(5, 3)).astype("float32")
    layer = ShardedEmbedding(5, 3, mesh_axis="batch", row_multiple=8, weights=[table])
    padded = np.concatenate([table, np.zeros((3, 3), "float32")])
    np.testing.assert_array_equal(layer.get_weights()[0], padded)
    layer.set_weights([2 * padded])
    np.testing.assert_array_equal(layer.get_weights()[0], 2 * padded)
    np.testing.assert_array_equal(layer(np.arange(5)), 2 * table)
    for shape in [(8, 3), (5, 2), (4, 3)]:
        with pytest.raises(ValueError, match=r"`weights` must have shape \(5, 3\)"):
            ShardedEmbedding(5, 3, weights=np.ones(shape))


def test_initial_values_do_not_depend_on_the_mesh():
    def initial():
        layer = ShardedEmbedding(
            5, 3, mesh_axis="batch", embeddings_initializer=keras.initializers.RandomUniform(seed=7)
        )
        layer.build()
        return layer.get_weights()[0][:5]

    expected = initial()
    for num_devices in (2, 8):
        keras.distribution.set_distribution(data_parallel(num_devices))
        np.testing.assert_array_equal(initial(), expected)


def test_early_stopping_restores_the_best_weights():
    set_mesh("DataParallel(8)")
    model = compiled_model(mesh_axis="batch")
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    model.fit(*data(), batch_size=48, epochs=5, shuffle=False, verbose=0, callbacks=[stop])
    assert stop.stopped_epoch > 0
    fit(model, epochs=1)


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_layer_that_is_frozen_before_build_stays_frozen(with_lora):
    layer = ShardedEmbedding(5, 3, trainable=False)
    layer.build()
    if with_lora:
        layer.enable_lora(2)
    assert layer.trainable_variables == []
    layer.trainable = True
    assert len(layer.trainable_variables) == (3 if with_lora else 1)


@pytest.mark.parametrize("mesh", ["1 device", "DataParallel(8)"])
def test_lora_training_matches_a_plain_embedding(mesh):
    x, y = np.arange(16), np.ones((16, 4))

    def fit_lora(embedding):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((), dtype="int32"), embedding])
        embedding.enable_lora(2, a_initializer=keras.initializers.RandomUniform(seed=1))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"]

    initializer = keras.initializers.RandomUniform(seed=2)
    expected = fit_lora(keras.layers.Embedding(19, 4, initializer))
    mesh_axis, _ = set_mesh(mesh)
    losses = fit_lora(ShardedEmbedding(19, 4, mesh_axis=mesh_axis, embeddings_initializer=initializer))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("make", [keras.layers.Embedding, lambda *a: type("Own", (keras.layers.Embedding,), {})(*a)])
def test_a_plain_table_with_an_indivisible_number_of_rows_raises_with_the_fix(make, is_built):
    keras.distribution.set_distribution(data_parallel(8))
    tower = make(9, 3)
    if is_built:
        tower.build((None,))
        values = tower.get_weights()[0]
    with pytest.raises(ValueError, match=r"9 rows of .* for 8 devices.*ShardedEmbedding"):
        shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower, mesh_axis="batch")
    assert tower.built == is_built
    if is_built:
        np.testing.assert_array_equal(tower.get_weights()[0], values)


@pytest.mark.parametrize("is_built", [False, True])
def test_a_plain_table_with_a_divisible_number_of_rows_is_split(rng, is_built):
    keras.distribution.set_distribution(data_parallel(8))
    tower = keras.layers.Embedding(16, 3)
    if is_built:
        tower.build((None,))
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower, mesh_axis="batch")
    queries = rng.normal(size=(8, 3)).astype("float32")
    ids = index(queries)[1]
    assert type(tower) is keras.layers.Embedding
    assert tower.embeddings.value.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(ids, reference.top_k(queries, tower.embeddings.numpy(), 2)[1])
