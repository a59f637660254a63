"""When an index over a feature tower is stale, and what its file holds."""

import keras
import keras_rs
import numpy as np
import pandas as pd
import pytest
import reference
from conftest import data_parallel

from keras_rs_contrib import RefreshCandidates, ShardedEmbedding, TwoTowerModel, shard_candidates
from keras_rs_contrib.index import corpus

FEATURES = np.random.default_rng(1).normal(size=(10, 3)).astype("float32")


def make_index(**arguments):
    tower = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    return tower, shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower, candidates=FEATURES, **arguments)


def test_an_index_is_refreshed_only_if_its_tower_has_changed(monkeypatch):
    tower, index = make_index()
    calls = []
    embed = corpus.embed
    monkeypatch.setattr(corpus, "embed", lambda *arguments: calls.append(1) or embed(*arguments))
    for _ in range(2):
        index.refresh_if_stale()
    assert calls == []
    tower.set_weights([2 * weight for weight in tower.get_weights()])
    callback = RefreshCandidates(index)
    callback.on_test_begin()
    callback.on_train_end()
    assert len(calls) == 1
    np.testing.assert_allclose(index.candidate_embeddings, tower(FEATURES), rtol=1e-6)


def test_a_tied_index_is_never_stale():
    tower = keras.layers.Embedding(10, 4)
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower)
    index.refresh_if_stale()
    index(np.zeros((1, 4), "float32"))
    index.refresh_if_stale()
    index.check_can_refresh()


def test_a_loaded_index_knows_whether_it_is_stale(tmp_path):
    inputs = keras.Input((4,))
    _, index = make_index(candidate_ids=np.arange(10) + 5)
    keras.Model(inputs, index(inputs)).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").layers[-1]
    loaded.refresh_if_stale()
    with pytest.raises(ValueError, match=r"needs the tower's inputs for the whole corpus.*refresh\(candidates\)"):
        loaded.check_can_refresh()
    tower = loaded.candidate_tower
    tower.set_weights([weight + 1 for weight in tower.get_weights()])
    with pytest.raises(ValueError, match=r"has changed since.*stale index.*refresh\(candidates\)"):
        loaded.refresh_if_stale()
    loaded.refresh(FEATURES)
    loaded.refresh_if_stale()
    np.testing.assert_allclose(loaded.candidate_embeddings, tower(FEATURES), rtol=1e-6)


@pytest.mark.parametrize("num_devices", [3, 8])
def test_the_file_of_a_split_corpus_has_no_padding(tmp_path, rng, num_devices):
    keras.distribution.set_distribution(data_parallel(num_devices))
    inputs = keras.Input((4,))
    _, index = make_index(mesh_axis="batch")
    model = keras.Model(inputs, index(inputs))
    assert index.num_candidates == 10
    assert index.candidate_embeddings.shape[0] == -(-10 // num_devices) * num_devices
    queries = rng.normal(size=(24, 4)).astype("float32")
    expected = reference.top_k(queries, np.asarray(index.candidate_embeddings)[:10], 2)[1]
    np.testing.assert_array_equal(model.predict(queries, batch_size=24, verbose=0)[1], expected)
    model.save(tmp_path / "model.keras")
    keras.distribution.set_distribution(None)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].candidate_embeddings.shape == (10, 4)
    np.testing.assert_array_equal(loaded.predict(queries, batch_size=24, verbose=0)[1], expected)


@pytest.mark.parametrize("num_weights", [1, 2, 3])
def test_weights_of_another_index_are_refused(num_weights):
    other = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), ShardedEmbedding(10, 4))
    saved = {str(number): np.zeros(10) for number in range(num_weights)}
    with pytest.raises(ValueError, match=rf"saved weights of an index must be its own.*{num_weights} weights.*has 0"):
        other.load_own_variables(saved)


def test_the_checksum_sees_every_bit_and_no_padding():
    values = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    variable = keras.Variable(values)
    known = corpus.checksum([variable])
    np.testing.assert_array_equal(corpus.checksum([keras.Variable(np.pad(values, ((0, 7), (0, 0))))]), known)
    for place in np.ndindex(values.shape):
        changed = values.copy()
        changed[place] = np.nextafter(changed[place], np.float32(9))
        assert (corpus.checksum([keras.Variable(changed)]) != known).all()
    assert (corpus.checksum([keras.Variable(values[::-1])]) != known).any()
    assert (corpus.checksum([keras.Variable(-values)]) != known).all()
    flipped = values * np.where(np.arange(5) % 2, -1, 1)[:, None].astype("float32")
    assert (corpus.checksum([keras.Variable(flipped)]) != known).all()
    ones = np.eye(1, 2048, dtype="float32")
    assert (corpus.checksum([keras.Variable(ones)]) != corpus.checksum([keras.Variable(ones[:, ::-1])])).all()
    assert (corpus.checksum([variable, variable]) != known).any()


def make_catalogue(rng):
    ids = rng.permutation(7).astype("int32")
    return {"genre": ids % 3, "id": ids, "year": rng.permutation(7).astype("int32")}


def dict_tower():
    inputs = {name: keras.Input((), dtype="int32", name=name) for name in ("genre", "year")}
    return keras.Model(
        inputs, keras.layers.Embedding(7, 4)(inputs["genre"]) + keras.layers.Embedding(7, 4)(inputs["year"])
    )


class Around(keras.layers.Layer):
    """Passes a dict on to a functional model."""

    def __init__(self):
        super().__init__()
        self.tower = dict_tower()

    def call(self, features):
        return self.tower(features)


@pytest.mark.filterwarnings("ignore:The structure of `inputs`:UserWarning")
@pytest.mark.parametrize("make_tower", [dict_tower, Around])
@pytest.mark.parametrize("form", [dict, pd.DataFrame])
def test_only_the_features_of_the_tower_reach_it(rng, make_tower, form):
    """Keras takes the values of a dict in the order of its keys, whatever the names of the inputs are."""
    catalogue, tower = make_catalogue(rng), make_tower()
    candidates = form(catalogue) if form is dict else form({**catalogue, "title": ["x"] * 7})
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower, candidates=candidates)
    model = TwoTowerModel(
        keras.layers.Embedding(5, 4), tower, "user", ["genre", "year"], candidate_id="id", retrieval=index
    )
    expected = tower({name: catalogue[name] for name in ("genre", "year")})
    model.recommend({"user": np.arange(5)})
    np.testing.assert_allclose(index.candidate_embeddings, expected, rtol=1e-6)
    np.testing.assert_array_equal(index.candidate_ids, catalogue["id"])
    index.refresh(candidates)
    np.testing.assert_allclose(index.candidate_embeddings, expected, rtol=1e-6)


def test_features_that_are_not_the_inputs_of_the_tower_raise(rng):
    catalogue = make_catalogue(rng)
    with pytest.raises(
        ValueError, match=r"must be its inputs.*Received: \['genre', 'id', 'year'\].*\['genre', 'year'\]"
    ):
        TwoTowerModel(keras.layers.Embedding(5, 4), dict_tower(), "user", ["genre", "id", "year"])
    del catalogue["year"]
    with pytest.raises(ValueError, match=r"all features of the candidate tower. Received: \['genre', 'id'\], without"):
        shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), dict_tower(), candidates=catalogue)
