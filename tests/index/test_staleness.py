"""The user is told when an index over a feature tower is older than its tower."""

import jax
import keras
import keras_rs
import numpy as np
import pytest
import reference
from conftest import data_parallel

from keras_rs_contrib import RefreshCandidates, TwoTowerModel, shard_candidates
from keras_rs_contrib.index import corpus

FEATURES = np.random.default_rng(1).normal(size=(10, 3)).astype("float32")
QUERIES = np.random.default_rng(2).normal(size=(6, 4)).astype("float32")
STALE = r"has changed since the last refresh.*Received: a stale index.*`index.refresh\(\)`.*RefreshCandidates\(index\)"


def make_index(**arguments):
    tower = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(4)])
    return tower, shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower, candidates=FEATURES, **arguments)


@keras.saving.register_keras_serializable(package="tests")
class OwnModel(keras.Model):
    """A model of a user: its index retrieves for queries, and training does not call it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.candidate_tower, self.retrieval = make_index()

    def call(self, queries, training=False):
        return queries if training else self.retrieval(queries)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y - self.candidate_tower(y[:, :3], training=training)))


def fit(model, **arguments):
    model.compile(keras.optimizers.SGD(0.5))
    model.fit(QUERIES, QUERIES, verbose=0, epochs=2, **arguments)


def expected_ids(model):
    return reference.top_k(QUERIES, np.asarray(model.candidate_tower(FEATURES)), 2)[1]


@pytest.mark.parametrize("num_devices", [1, 2])
def test_direct_calls_and_saving_warn_of_a_stale_index(tmp_path, num_devices):
    keras.distribution.set_distribution(data_parallel(num_devices))
    model = OwnModel()
    index = model.retrieval
    model(QUERIES)
    model.save(tmp_path / "fresh.keras")
    assert index.is_stale is False
    fit(model)
    assert index.is_stale is True
    for call in (
        lambda: index(QUERIES),
        lambda: index.find(QUERIES, 2),
        lambda: index.ranks(QUERIES, np.zeros(6, int)),
        lambda: model(QUERIES),
    ):
        # Each time, and not only the first.
        for _ in range(2):
            with pytest.warns(UserWarning, match=STALE):
                call()
    for save in (lambda: model.save(tmp_path / "m.keras"), lambda: model.save_weights(tmp_path / "m.weights.h5")):
        with pytest.warns(UserWarning, match="the file holds the output of the old tower"):
            save()
    index.refresh()
    assert index.is_stale is False
    np.testing.assert_array_equal(index(QUERIES)[1], expected_ids(model))
    model.save(tmp_path / "fresh.keras")


def test_a_loaded_index_is_as_stale_as_the_saved_one(tmp_path):
    inputs = keras.Input((4,))
    tower, index = make_index()
    model = keras.Model(inputs, index(inputs))
    model.save(tmp_path / "fresh.keras")
    tower.layers[-1].bias.assign(np.ones(4))
    with pytest.warns(UserWarning, match=STALE):
        model.save(tmp_path / "stale.keras")
    assert keras.saving.load_model(tmp_path / "fresh.keras").layers[-1].is_stale is False
    loaded = keras.saving.load_model(tmp_path / "stale.keras").layers[-1]
    assert loaded.is_stale is True
    with pytest.warns(UserWarning, match=STALE):
        loaded(QUERIES)
    loaded.refresh(FEATURES)
    np.testing.assert_array_equal(loaded(QUERIES)[1], reference.top_k(QUERIES, np.asarray(tower(FEATURES)), 2)[1])


def test_every_weight_of_the_tower_counts():
    tower, index = make_index()
    for weight in tower.weights:
        before = weight.numpy()
        weight.assign(before + 1)
        assert index.is_stale, weight.path
        with pytest.warns(UserWarning, match=STALE):
            index(QUERIES)
        weight.assign(before)
        assert not index.is_stale
        index(QUERIES)


def test_calls_read_the_weights_of_the_tower_only_after_they_have_changed(monkeypatch):
    tower, index = make_index()
    calls = []
    checksum = corpus.checksum
    monkeypatch.setattr(corpus, "checksum", lambda variables: calls.append(1) or checksum(variables))
    for _ in range(5):
        index(QUERIES)
    assert len(calls) == 1
    tower.layers[-1].bias.assign(np.ones(4))
    for _ in range(3):
        with pytest.warns(UserWarning, match=STALE):
            index(QUERIES)
    assert len(calls) == 2


def test_compiled_programs_neither_warn_nor_fail():
    tower, index = make_index()
    inputs = keras.Input((4,))
    model = keras.Model(inputs, index(inputs))
    tower.layers[-1].bias.assign(np.ones(4))
    model.predict(QUERIES, verbose=0)
    jax.jit(index)(QUERIES)
    jax.jit(lambda queries: index.ranks(queries, np.zeros(6, int)))(QUERIES)
    keras.ops.vectorized_map(lambda query: index(query[None])[1], QUERIES)
    with pytest.warns(UserWarning, match=STALE):
        index(QUERIES)


def test_a_call_on_known_queries_within_a_compiled_function_warns():
    tower, index = make_index()
    queries = jax.numpy.asarray(QUERIES)
    jax.jit(lambda: index(queries)[1])()
    tower.layers[-1].bias.assign(np.ones(4))
    with pytest.warns(UserWarning, match=STALE):
        jax.jit(lambda: index(queries)[1])()


def test_embeddings_of_the_user_count_as_current_until_the_tower_changes():
    tower, index = make_index()
    tower.layers[-1].bias.assign(np.ones(4))
    table = np.asarray(tower(FEATURES))
    index.update_candidates(table)
    np.testing.assert_array_equal(index(QUERIES)[1], reference.top_k(QUERIES, table, 2)[1])
    index.refresh_if_stale()
    np.testing.assert_array_equal(index.candidate_embeddings.numpy(), table)
    tower.layers[-1].bias.assign(np.zeros(4))
    assert index.is_stale


def test_a_tied_index_is_current(tmp_path):
    tower = keras.layers.Embedding(10, 4)
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower)
    assert not index.is_stale
    inputs = keras.Input((4,))
    model = keras.Model(inputs, index(inputs))
    tower.embeddings.assign(np.ones((10, 4)))
    assert not index.is_stale
    index(QUERIES)
    model.save(tmp_path / "model.keras")


def test_the_callback_refreshes_before_predictions_too():
    model = OwnModel()
    refresh = RefreshCandidates(model.retrieval)
    fit(model, callbacks=[refresh])
    np.testing.assert_array_equal(model.predict(QUERIES, verbose=0)[1], expected_ids(model))
    fit(model)
    stale = model.predict(QUERIES, verbose=0)[0]
    fresh = model.predict(QUERIES, verbose=0, callbacks=[refresh])
    np.testing.assert_array_equal(fresh[1], expected_ids(model))
    assert not np.allclose(stale, fresh[0])
    model(QUERIES)


def test_a_two_tower_model_refreshes_its_index_and_does_not_warn(tmp_path):
    tower, index = make_index()
    model = TwoTowerModel(
        keras.layers.Embedding(6, 4),
        tower,
        "user",
        "film",
        candidate_id="film_id",
        retrieval=index,
        exclude_feature="seen",
    )
    model.compile(keras.optimizers.SGD(0.5))
    data = {"user": np.arange(6), "film": FEATURES[:6], "film_id": np.arange(6)}

    def train():
        model.fit(data, verbose=0)
        assert index.is_stale

    for use in (
        lambda: model.predict({"user": np.arange(6)}, verbose=0),
        lambda: model.recommend({"user": np.arange(6)}),
        lambda: model.evaluate(data, verbose=0),
        lambda: model.evaluate_queries({"user": np.arange(6)}, np.arange(6)[:, None]),
        lambda: model.save(tmp_path / "model.keras"),
        lambda: model.save_weights(tmp_path / "model.weights.h5"),
    ):
        train()
        use()
        assert not index.is_stale
    model.fit(data, validation_data=data, epochs=2, verbose=0)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.fit(data, verbose=0)
    assert loaded.retrieval.is_stale
    # It cannot refresh what it has no candidates for, and the file says that it is stale.
    loaded.save(tmp_path / "stale.keras")
    assert keras.saving.load_model(tmp_path / "stale.keras").retrieval.is_stale


def test_a_direct_call_of_a_two_tower_model_warns():
    tower, index = make_index()
    model = TwoTowerModel(keras.layers.Embedding(6, 4), tower, "user", "film", retrieval=index)
    model({"user": np.arange(6)})
    tower.layers[-1].bias.assign(np.ones(4))
    with pytest.warns(UserWarning, match=STALE):
        model({"user": np.arange(6)})
