"""The index matches the weights in force, and weights are loaded or an error says why not."""

import keras
import keras_rs
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import (
    CrossBatchMemory,
    RowSparseEmbedding,
    ShardedEmbedding,
    TwoTowerModel,
    shard_candidates,
)

pytestmark = pytest.mark.slow

USERS, MOVIES = np.arange(64) % 20, np.arange(64) % 12
DATA = {"user": USERS, "movie": MOVIES}
QUERIES = {"user": np.arange(20)}


def make_tower(policy):
    layers = [keras.layers.Embedding(12, 8, dtype=policy), keras.layers.Dense(8, dtype=policy)]
    return keras.Sequential([keras.Input((), dtype="int32"), *layers])


def make_model(tower=None, optimizer=None, compiled=True, **kwargs):
    tower = tower or keras.Sequential(
        [keras.Input((), dtype="int32"), keras.layers.Embedding(12, 8), keras.layers.Dense(8)]
    )
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), tower, candidates=np.arange(12))
    user_tower = keras.layers.Embedding(20, 8)
    model = TwoTowerModel(user_tower, tower, "user", "movie", candidate_id="movie", retrieval=index, **kwargs)
    if compiled:
        model.compile(optimizer or keras.optimizers.Adam(0.1))
    return model


def mean_reciprocal_rank(model):
    """Of the current weights, without the index."""
    movies = np.asarray(model.candidate_tower(np.arange(12)), "float32")
    scores = np.asarray(model.query_tower(USERS), "float32") @ movies.T
    ranks = (scores > scores[np.arange(64), MOVIES][:, None]).sum(axis=1)
    return np.mean(1 / (1 + ranks))


def lists(model):
    movies = np.asarray(model.candidate_tower(np.arange(12)), "float32")
    scores = np.asarray(model.query_tower(QUERIES["user"]), "float32") @ movies.T
    return np.argsort(-scores, axis=1, kind="stable")[:, :5]


class Note(keras.callbacks.Callback):
    """Notes the metric of the weights that are in force during an evaluation."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_test_begin(self, logs=None):
        self.values.append(mean_reciprocal_rank(self.model))


def averaging():
    return keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.9)


@pytest.mark.parametrize("num_devices", [None, 2])
def test_validation_with_averaged_weights_ranks_by_them(num_devices):
    keras.distribution.set_distribution(None if num_devices is None else data_parallel(num_devices))
    model, note = make_model(optimizer=averaging()), Note()
    callbacks = [keras.callbacks.SwapEMAWeights(), note]
    history = model.fit(DATA, epochs=4, validation_data=DATA, callbacks=callbacks, verbose=0).history
    np.testing.assert_allclose(history["val_mean_reciprocal_rank"], note.values, atol=1e-6)
    np.testing.assert_array_equal(model.recommend(QUERIES).ids, lists(model))


def test_evaluation_and_prediction_with_averaged_weights_use_them():
    model = make_model(optimizer=averaging())
    model.fit(DATA, epochs=3, verbose=0)
    plain = lists(model)
    note = Note()
    result = model.evaluate(DATA, callbacks=[keras.callbacks.SwapEMAWeights(), note], verbose=0, return_dict=True)
    assert result["mean_reciprocal_rank"] == pytest.approx(note.values[0], abs=1e-6)
    expected = []

    class NoteLists(keras.callbacks.Callback):
        def on_predict_begin(self, logs=None):
            expected.append(lists(self.model))

    callbacks = [keras.callbacks.SwapEMAWeights(), NoteLists()]
    np.testing.assert_array_equal(model.predict(QUERIES, callbacks=callbacks, verbose=0)[1], expected[0])
    for ids in (model.recommend(QUERIES).ids, model.predict(QUERIES, verbose=0)[1]):
        np.testing.assert_array_equal(ids, plain)


def test_a_checkpoint_of_averaged_weights_holds_their_index(tmp_path):
    model = make_model(optimizer=averaging())
    callbacks = [
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "a.keras"),
    ]
    model.fit(DATA, epochs=3, callbacks=callbacks, verbose=0)
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    np.testing.assert_array_equal(loaded.recommend(QUERIES).ids, lists(loaded))


@pytest.mark.parametrize(
    ("policy", "change"), [("float16", "assign"), ("bfloat16", "set_weights"), ("mixed_bfloat16", "train_on_batch")]
)
def test_a_change_of_weights_of_any_dtype_is_seen(policy, change):
    tower = keras.Sequential(
        [
            keras.Input((), dtype="int32"),
            keras.layers.Embedding(12, 8, dtype=policy),
            keras.layers.Dense(8, dtype=policy),
        ]
    )
    model = make_model(tower)
    before = model.recommend(QUERIES).ids
    if change == "train_on_batch":
        for _ in range(5):
            model.train_on_batch(DATA)
    elif change == "assign":
        kernel = tower.layers[-1].kernel
        kernel.assign(-kernel)
    else:
        tower.set_weights([-weight for weight in tower.get_weights()])
    assert_index_is_current(model)
    assert change == "set_weights" or (model.recommend(QUERIES).ids != before).any()


def assert_index_is_current(model):
    movies = np.asarray(model.candidate_tower(np.arange(12)), "float32")
    expected = np.asarray(model.query_tower.embeddings) @ movies.T
    recommendations = model.recommend(QUERIES, k=12)
    scores = np.empty((20, 12), "float32")
    np.put_along_axis(scores, recommendations.ids, recommendations.scores, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_quantized_tower_is_embedded_again():
    model = make_model()
    model.recommend(QUERIES)
    model.candidate_tower.layers[-1].quantize("int8")
    assert_index_is_current(model)


# Weights files.


TOWERS = {
    "plain": lambda: (keras.layers.Embedding(20, 8), keras.layers.Embedding(12, 8)),
    "sharded": lambda: (ShardedEmbedding(20, 8), ShardedEmbedding(12, 8)),
    "row-sparse": lambda: (RowSparseEmbedding(20, 8), RowSparseEmbedding(12, 8)),
    "sequential": lambda: (
        keras.Sequential([keras.layers.Embedding(20, 8), keras.layers.Dense(8)]),
        keras.layers.Embedding(12, 8),
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_build_and_load_weights_restore_a_model(name, tmp_path):
    def make():
        model = TwoTowerModel(*TOWERS[name](), "user", "movie", cross_batch_memory=CrossBatchMemory(4))
        model.compile("adam")
        return model

    model = make()
    with pytest.raises(ValueError, match="must be built before its weights are saved"):
        model.save_weights(tmp_path / "a.weights.h5")
    model.fit(DATA, verbose=0)
    model.save_weights(tmp_path / "a.weights.h5")
    loaded = make()
    with pytest.raises(ValueError, match="must be built before its weights are saved or loaded"):
        loaded.load_weights(tmp_path / "a.weights.h5")
    loaded.build({"user": (None,), "movie": (None,)})
    loaded.load_weights(tmp_path / "a.weights.h5")
    for weight, expected in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), expected.numpy())
    np.testing.assert_array_equal(loaded.recommend(QUERIES).ids, model.recommend(QUERIES).ids)
    loaded.fit(DATA, verbose=0)


def test_build_takes_float_features_too():
    tower = keras.Sequential([keras.layers.Dense(8)])
    model = TwoTowerModel(tower, keras.layers.Embedding(12, 8), "features", "movie")
    model.build({"features": (None, 3), "movie": (None,)})
    assert model.query_tower.layers[0].kernel.shape == (3, 8)
    model.compile("adam")
    model.fit({"features": np.random.default_rng(0).normal(size=(64, 3)), "movie": MOVIES}, verbose=0)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((None,), TypeError, "built with a dict of shapes.*'user'"),
        (None, TypeError, "built with a dict of shapes"),
        ({"movie": (None,)}, ValueError, "without 'user'"),
    ],
)
def test_build_needs_the_shape_of_each_feature(shape, error, message):
    with pytest.raises(error, match=message):
        TwoTowerModel(*TOWERS["plain"](), "user", "movie").build(shape)


@pytest.mark.parametrize("name", ["plain", "sharded", "row-sparse"])
def test_a_model_stays_on_the_devices_it_was_created_on(name, tmp_path):
    keras.distribution.set_distribution(data_parallel(2))
    model = TwoTowerModel(*TOWERS[name](), "user", "movie")
    model.compile("adam")
    model.fit(DATA, verbose=0)
    expected = model.recommend(QUERIES).ids
    model.save(tmp_path / "a.keras")
    keras.distribution.set_distribution(data_parallel(3))
    for call in (model.fit, model.evaluate, model.predict, model.train_on_batch, model.test_on_batch):
        with pytest.raises(ValueError, match=r"distribution under which it was created.*3 devices.*load_model"):
            call(DATA)
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    np.testing.assert_array_equal(loaded.recommend(QUERIES).ids, expected)
    loaded.fit(DATA, verbose=0)


@pytest.mark.parametrize("arguments", [{}, {"ema_overwrite_frequency": 2}], ids=["at the end", "every second step"])
def test_training_continues_with_averaged_weights(arguments, tmp_path):
    """At the end of `fit`, Keras assigns one array to a weight and to its average."""
    model = make_model(optimizer=keras.optimizers.Adam(0.1, use_ema=True, **arguments))
    losses = [model.fit(DATA, batch_size=16, verbose=0).history["loss"][0]]
    model.train_on_batch(DATA)
    losses.append(model.fit(DATA, batch_size=16, verbose=0).history["loss"][0])
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = model.fit(DATA, epochs=2, batch_size=16, validation_data=DATA, verbose=0, callbacks=[swap]).history
    losses += history["loss"]
    assert losses[-1] < losses[0]
    model.predict(QUERIES, callbacks=[keras.callbacks.SwapEMAWeights()], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.recommend(QUERIES).ids, lists(model))
