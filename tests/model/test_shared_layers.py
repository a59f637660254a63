"""Towers that share layers train as one dense model does, and load as they were saved."""

import keras
import keras_rs
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import RowSGD, RowSparseEmbedding, ShardedEmbedding, TwoTowerModel, shard_candidates

pytestmark = pytest.mark.slow

ROWS = 13
RNG = np.random.default_rng(0)
DATA = {"history": RNG.integers(0, ROWS, (48, 6)), "movie": RNG.integers(0, ROWS, 48)}
QUERIES = {"history": DATA["history"]}


@keras.saving.register_keras_serializable("tests")
class Mean(keras.layers.Layer):
    """A layer of one's own with the table of another tower."""

    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.table, self.pool = table, keras.layers.GlobalAveragePooling1D()

    def build(self, input_shape):
        if not self.table.built:
            self.table.build(input_shape)

    def call(self, history):
        return self.pool(self.table(history))

    def get_config(self):
        return {**super().get_config(), "table": keras.saving.serialize_keras_object(self.table)}

    @classmethod
    def from_config(cls, config):
        config["table"] = keras.saving.deserialize_keras_object(config["table"])
        return cls(**config)


def history(*layers):
    ids = keras.Input((6,), dtype="int32")
    outputs = ids
    for layer in layers:
        outputs = layer(outputs)
    return keras.Model(ids, outputs)


def functional_candidates(table):
    ids = keras.Input((), dtype="int32")
    return keras.Model(ids, keras.layers.Dense(8)(table(ids)))


def one_graph(table):
    ids, movie = keras.Input((6,), dtype="int32"), keras.Input((1,), dtype="int32")
    dense = keras.layers.Dense(8)
    pooled = keras.layers.GlobalAveragePooling1D()(table(ids))
    return keras.Model(ids, dense(pooled)), keras.Model(movie, dense(keras.layers.Flatten()(table(movie))))


def inner_models(table):
    """Both towers call one inner model, twice, and the table as well."""
    vector = keras.Input((8,))
    inner = keras.Model(vector, keras.layers.Dense(8)(keras.layers.Dense(8)(vector)))
    ids, movie = keras.Input((6,), dtype="int32"), keras.Input((), dtype="int32")
    query = inner(keras.layers.GlobalAveragePooling1D()(table(ids)))
    return keras.Model(ids, inner(query) + query), keras.Model(movie, inner(inner(table(movie))) + table(movie))


def query_of_candidates(table):
    """The query tower calls the candidate tower, and the table as well."""
    candidates = keras.Sequential([keras.Input((), dtype="int32"), table, keras.layers.Dense(8)])
    ids = keras.Input((), dtype="int32")
    return keras.Model(ids, keras.layers.Dense(8)(candidates(ids)) + table(ids)), candidates


def inner_model_and_its_table(table):
    """A tower calls an inner model and the table in it, the other one a model around the inner model."""
    ids = keras.Input((), dtype="int32")
    inner = keras.Model(ids, keras.layers.Dense(8)(table(ids)))
    query, candidate = keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
    outer = keras.Sequential([inner, keras.layers.Dense(8)])
    return keras.Model(query, table(query) + inner(query) + outer(query)), keras.Model(candidate, outer(candidate))


# Each returns the two towers, made of a table.
TOWERS = {
    "GRU": lambda table: (history(table, keras.layers.GRU(8)), table),
    "mean": lambda table: (history(table, keras.layers.GlobalAveragePooling1D()), table),
    "own layer": lambda table: (Mean(table), table),
    "sequential": lambda table: (keras.Sequential([table, keras.layers.GlobalAveragePooling1D()]), table),
    "nested": lambda table: (keras.Sequential([history(table), keras.layers.GlobalAveragePooling1D()]), table),
    "functional candidates": lambda table: (
        history(table, keras.layers.GlobalAveragePooling1D()), functional_candidates(table),
    ),
    "sequential candidates": lambda table: (
        history(table, keras.layers.GlobalAveragePooling1D()),
        keras.Sequential([keras.Input((), dtype="int32"), table, keras.layers.Dense(8)]),
    ),
    "one graph": one_graph,
    "query of candidates": query_of_candidates,
    "inner model and its table": inner_model_and_its_table,
    "candidates of inner model and its table": lambda table: inner_model_and_its_table(table)[::-1],
    "inner models": inner_models,
    "own candidates": lambda table: (Mean(table), keras.Sequential([keras.layers.Reshape((1,)), Mean(table)])),
}  # fmt: skip

# These take the last of the history alone.
OF_ONE_ID = ("query of candidates", "inner model and its table", "candidates of inner model and its table")

TABLES = {
    "plain": lambda: keras.layers.Embedding(ROWS, 8, name="table"),
    "sharded": lambda: ShardedEmbedding(ROWS, 8, name="table"),
    "row-sparse": lambda: RowSparseEmbedding(ROWS, 8, RowSGD(0.5), name="table"),
}


def make_model(towers, table, has_index):
    query_tower, candidate_tower = TOWERS[towers](TABLES[table]())
    retrieval = None
    if has_index:
        arguments = {} if candidate_tower.name == "table" else {"candidates": np.arange(ROWS)}
        retrieval = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), candidate_tower, **arguments)
    model = TwoTowerModel(query_tower, candidate_tower, "history", "movie", candidate_id="movie", retrieval=retrieval)
    model.compile(keras.optimizers.SGD(0.5))
    return model


CASES = [
    ("GRU", "plain", True),
    ("mean", "row-sparse", False),
    ("own layer", "row-sparse", True),
    ("sequential", "sharded", True),
    ("functional candidates", "row-sparse", True),
    ("inner models", "plain", False),
    ("own candidates", "sharded", True),
]


@pytest.mark.parametrize(("towers", "table", "has_index"), CASES)
def test_towers_that_share_a_table_load_and_train_on(towers, table, has_index, tmp_path):
    model = make_model(towers, table, has_index)
    model.fit(DATA, shuffle=False, verbose=0)
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    for name in ("loss", "mean_reciprocal_rank"):
        if has_index or name == "loss":
            results = [each.evaluate(DATA, verbose=0, return_dict=True)[name] for each in (model, loaded)]
            np.testing.assert_allclose(*results, atol=1e-6)
    if model.retrieval is not None:
        np.testing.assert_array_equal(loaded.recommend(QUERIES).ids, model.recommend(QUERIES).ids)
    # The table is one variable, which both towers train.
    num_tables = len({id(layer) for layer in loaded._flatten_layers() if layer.name == "table"})
    assert num_tables == 1
    if model.retrieval is not None and not model.retrieval.is_tied:
        loaded.retrieval.refresh(np.arange(ROWS))
    losses = [each.fit(DATA, shuffle=False, verbose=0).history["loss"] for each in (model, loaded)]
    np.testing.assert_allclose(*losses, atol=1e-5)


@pytest.mark.parametrize(("towers", "num_devices"), [("GRU", 2), ("sequential candidates", 1), ("own candidates", 1)])
def test_a_shared_row_sparse_table_trains_like_a_dense_one(towers, num_devices):
    keras.distribution.set_distribution(data_parallel(num_devices))

    def train(table):
        keras.utils.set_random_seed(0)
        model = make_model(towers, table, has_index=True)
        losses = model.fit(DATA, epochs=3, batch_size=16, shuffle=False, verbose=0).history["loss"]
        table = next(layer for layer in model._flatten_layers() if layer.name == "table")
        return losses, table.embeddings.numpy()[:ROWS]

    for value, expected in zip(train("row-sparse"), train("plain"), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("towers", TOWERS)
def test_towers_share_layers_after_each_way_of_copying(towers, tmp_path):
    model = make_model(towers, "plain", has_index=False)
    data = {**DATA, "history": DATA["history"][:, -1]} if towers in OF_ONE_ID else DATA
    expected = keras.tree.flatten(model(data, training=True))
    config = model.get_config()
    copies = {"config": TwoTowerModel.from_config(config), "same config": TwoTowerModel.from_config(config)}
    last = model
    # A layer that two towers have called is saved again.
    for name in ("file", "file of a file"):
        last.save(tmp_path / "a.keras")
        copies[name] = last = keras.saving.load_model(tmp_path / "a.keras")
    for name, copy in copies.items():
        copy(data)
        assert len(copy.trainable_variables) == len(model.trainable_variables), name
        copy.set_weights(model.get_weights())
        for value, right in zip(keras.tree.flatten(copy(data, training=True)), expected, strict=True):
            np.testing.assert_allclose(value, right, atol=1e-6)


@pytest.mark.parametrize("table", TABLES)
def test_one_tower_serves_both_sides(table, tmp_path):
    tower = TABLES[table]()
    model = TwoTowerModel(tower, tower, "watched", "movie")
    model.compile(keras.optimizers.SGD(0.5))
    data = {"watched": DATA["history"][:, 0], "movie": DATA["movie"]}
    before = model.fit(data, shuffle=False, verbose=0).history["loss"]
    after = model.fit(data, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert after[-1] < before[0]
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert loaded.query_tower is loaded.candidate_tower
    queries = {"watched": np.arange(ROWS)}
    np.testing.assert_array_equal(loaded.recommend(queries).ids, model.recommend(queries).ids)


def test_dropout_between_joined_lookups_is_drawn_once():
    def train(table):
        keras.utils.set_random_seed(0)
        table = TABLES[table]()
        query_tower = history(table, keras.layers.Dropout(0.5, seed=3), keras.layers.GlobalAveragePooling1D())
        model = TwoTowerModel(query_tower, table, "history", "movie")
        model.compile(keras.optimizers.SGD(0.5))
        return model.fit(DATA, epochs=3, batch_size=16, shuffle=False, verbose=0).history["loss"]

    np.testing.assert_allclose(train("row-sparse"), train("plain"), atol=1e-5)
