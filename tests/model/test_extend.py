"""Models that get new users and items after training: what was learned stays as it is, and new rows begin."""

import keras
import keras_rs
import numpy as np
import pandas as pd
import pytest
from conftest import data_parallel, model_parallel

from keras_rs_contrib import (
    CrossBatchMemory,
    DistributedTwoTowerTask,
    LazyAdam,
    MixedNegatives,
    RowAdagrad,
    RowSGD,
    RowSparseEmbedding,
    ShardedEmbedding,
    StreamingSamplingProbability,
    TwoTowerModel,
    Vocabulary,
    shard_candidates,
)

pytestmark = pytest.mark.slow

USERS = [f"u{i}" for i in range(12)]
MOVIES = [f"film {i}" for i in range(9)]
RNG = np.random.default_rng(0)
DATA = pd.DataFrame({"user": RNG.choice(USERS, 64), "movie": RNG.choice(MOVIES, 64)})
NEW = {"user": ["u12", "u13"], "movie": ["film 9", "film 3", "film 10", "film 9"]}
NEW_DATA = pd.DataFrame({"user": ["u12", "u13", "u1", "u12"], "movie": ["film 9", "film 10", "film 9", "film 2"]})

TABLES = {
    "plain": keras.layers.Embedding,
    "sharded": ShardedEmbedding,
    "sharded without padding": lambda rows, width, **kwargs: ShardedEmbedding(rows, width, row_multiple=1, **kwargs),
    "rows, adagrad": lambda rows, width, **kwargs: RowSparseEmbedding(rows, width, RowAdagrad(0.1), **kwargs),
    "rows, adam": lambda rows, width, **kwargs: RowSparseEmbedding(rows, width, LazyAdam(0.1), **kwargs),
    "rows, sgd": lambda rows, width, **kwargs: RowSparseEmbedding(rows, width, RowSGD(0.1), **kwargs),
}


def named_model(table="plain", optimizer="adam", **kwargs):
    users, movies = Vocabulary(USERS), Vocabulary(MOVIES)
    arguments = {"query_features": "user", "candidate_features": "movie", **kwargs}
    model = TwoTowerModel(
        TABLES[table](len(users), 4, name="user_table"),
        TABLES[table](len(movies), 4, name="movie_table"),
        vocabularies={"user": users, "movie": movies},
        **arguments,
    )
    if optimizer is not None:
        model.compile(optimizer)
    return model


def trained_model(table="plain", optimizer="adam", **kwargs):
    model = named_model(table, optimizer, **kwargs)
    fit(model, DATA)
    return model


def fit(model, data, **kwargs):
    keras.utils.set_random_seed(3)
    return model.fit(data, batch_size=16, shuffle=False, verbose=0, **kwargs).history


def state(model):
    """All variables of a model and its optimizer."""
    optimizer = model.optimizer.variables if model.compiled else []
    return [np.array(v.value) for v in (*model.variables, *optimizer)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def rows(layer):
    return np.array(layer.embeddings.value)[: layer.input_dim]


def test_old_names_keep_their_rows_and_new_names_follow():
    model = trained_model()
    before = state(model)
    larger = model.extend(NEW)
    assert type(larger) is TwoTowerModel
    assert larger.vocabularies["user"].names == [*USERS, "u12", "u13"]
    assert larger.vocabularies["movie"].names == [*MOVIES, "film 9", "film 10"]
    assert (larger.query_tower.input_dim, larger.candidate_tower.input_dim) == (15, 12)
    for old, new in ((model.query_tower, larger.query_tower), (model.candidate_tower, larger.candidate_tower)):
        np.testing.assert_array_equal(rows(new)[: old.input_dim], rows(old))
        # Of the initializer, uniform in [-0.05, 0.05], and all different.
        added = rows(new)[old.input_dim :]
        assert ((np.abs(added) <= 0.05) & (added != 0)).all()
        assert len(np.unique(rows(new), axis=0)) == new.input_dim
    # The old model has not changed, and goes on.
    assert_equal(state(model), before)
    assert model.vocabularies["user"].names == USERS
    assert model.query_tower.input_dim == 13
    model.fit(DATA, verbose=0)


def test_new_users_and_items_are_trained_and_recommended():
    larger = trained_model(optimizer=keras.optimizers.Adam(0.05)).extend(NEW)
    before = larger.evaluate(NEW_DATA, verbose=0, return_dict=True)["mean_reciprocal_rank"]
    fit(larger, pd.concat([DATA, *[NEW_DATA] * 8]), epochs=40)
    assert larger.evaluate(NEW_DATA, verbose=0, return_dict=True)["mean_reciprocal_rank"] > before
    answer = larger.recommend(["u12", "u13"], k=4)
    assert {"film 9", "film 2"} <= set(answer.ids[0])
    assert answer.ids[1, 0] == "film 10"
    assert not answer.are_popular.any()


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.5),
    "momentum": lambda: keras.optimizers.SGD(0.5, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 20), weight_decay=0.1),
    "average": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=3),
    "accumulation": lambda: keras.optimizers.SGD(0.5, gradient_accumulation_steps=3),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, centered=True, momentum=0.5),
}
CASES = [("plain", name) for name in OPTIMIZERS]
CASES += [("sharded", name) for name in ("adam", "adafactor", "average")]
CASES += [(name, "adam") for name in ("sharded without padding", "rows, adagrad", "rows, adam", "rows, sgd")]


def assert_slots_of_new_rows_are_those_of_a_new_optimizer(model, larger, name):
    fresh = OPTIMIZERS[name]()
    fresh.build(larger.trainable_variables)
    sizes = {"user_table": (13, 15), "movie_table": (10, 12)}
    num_slots = 0
    slots = zip(model.optimizer.variables, larger.optimizer.variables, fresh.variables, strict=True)
    for old, new, initial in slots:
        table_name = next((each for each in sizes if new.name.startswith(each)), None)
        old, initial, value = np.array(old.value), np.array(initial.value), np.array(new.value)
        if table_name is None:
            if old.shape != value.shape:
                # The factors of Adafactor have the names of their weights.
                value = value[: len(old)]
            np.testing.assert_array_equal(value, old)
            continue
        before, after = sizes[table_name]
        num_slots += 1
        np.testing.assert_array_equal(value[:before], old[:before])
        if new.name.endswith("_average"):
            tower = larger.query_tower if table_name == "user_table" else larger.candidate_tower
            initial = np.array(tower.embeddings.value)
        np.testing.assert_array_equal(value[before:], initial[before:])
        assert len(value) >= after
    has_slots = name != "sgd" and not isinstance(model.query_tower, RowSparseEmbedding)
    assert num_slots >= 2 if has_slots else num_slots == 0


@pytest.mark.parametrize(("table", "optimizer"), CASES)
def test_optimizers_go_on(table, optimizer):
    model = trained_model(table, OPTIMIZERS[optimizer]())
    copy, larger = model.extend({"user": [], "movie": ["film 1"]}), model.extend(NEW)
    assert_slots_of_new_rows_are_those_of_a_new_optimizer(model, larger, optimizer)
    assert_equal(state(copy), state(model))
    # Extended by nothing, it trains on as if nothing had happened.
    assert fit(copy, DATA) == fit(model, DATA)
    assert_equal(state(copy), state(model))


@pytest.mark.parametrize("table", [name for name in TABLES if name != "rows, adam"])
def test_old_rows_train_as_without_new_rows(table):
    model = trained_model(table, keras.optimizers.SGD(0.5))
    larger = model.extend(NEW)
    before = rows(larger.query_tower)
    assert fit(larger, DATA)["loss"] == fit(model, DATA)["loss"]
    np.testing.assert_array_equal(rows(larger.query_tower)[:13], rows(model.query_tower))
    np.testing.assert_array_equal(rows(larger.candidate_tower)[:10], rows(model.candidate_tower))
    np.testing.assert_array_equal(rows(larger.query_tower)[13:], before[13:])
    fit(larger, NEW_DATA)
    assert (rows(larger.query_tower)[13:15] != before[13:15]).all()


@pytest.mark.parametrize(
    ("table", "initial"), [("rows, adagrad", {"accumulator": 0.1}), ("rows, adam", {"momentum": 0.0, "velocity": 0.0})]
)
def test_slots_of_row_optimizers_grow(table, initial):
    model = trained_model(table)
    model.query_tower.learning_rate = 0.03
    larger = model.extend(NEW)
    old, new = ({v.name: np.array(v.value) for v in each.query_tower.variables} for each in (model, larger))
    for name, value in initial.items():
        np.testing.assert_array_equal(new[name][:13], old[name][:13])
        assert (old[name][:13] != np.float32(value)).any()
        np.testing.assert_array_equal(new[name][13:15], np.full((2, 4), value, "float32"))
    assert new["iterations"] == old["iterations"] == 4
    assert new["learning_rate"] == np.float32(0.03)


def test_padded_tables_grow_within_their_padding_and_beyond():
    model = named_model("sharded")
    fit(model, DATA)
    larger = model.extend({"user": [f"new {i}" for i in range(200)], "movie": ["film 9"]})
    assert larger.query_tower.embeddings.shape == (384, 4)
    assert larger.candidate_tower.embeddings.shape == model.candidate_tower.embeddings.shape == (192, 4)
    for tower, before in ((larger.query_tower, 13), (larger.candidate_tower, 10)):
        assert (rows(tower)[before:] != 0).all()
        np.testing.assert_array_equal(np.array(tower.embeddings.value)[tower.input_dim :], 0)
    fit(larger, NEW_DATA.replace({"film 10": "film 9", "u12": "new 0", "u13": "new 199"}))


DISTRIBUTIONS = {
    "none": lambda: None,
    "DataParallel(2)": lambda: data_parallel(2),
    "DataParallel(8)": lambda: data_parallel(8),
    "ModelParallel": lambda: model_parallel((2, 4), ".*movie_table.*(embeddings|accumulator)"),
}
MESHES = [
    ("none", "DataParallel(2)", "sharded"),
    ("DataParallel(8)", "none", "rows, adagrad"),
    ("DataParallel(2)", "DataParallel(8)", "rows, adagrad"),
    ("ModelParallel", "ModelParallel", "sharded"),
    ("ModelParallel", "DataParallel(2)", "rows, adagrad"),
    ("DataParallel(8)", "ModelParallel", "sharded"),
]


@pytest.mark.parametrize(("before", "after", "table"), MESHES)
def test_a_model_is_extended_on_any_mesh(before, after, table):
    keras.distribution.set_distribution(DISTRIBUTIONS[before]())
    users, movies = Vocabulary(USERS), Vocabulary(MOVIES)
    movie_tower = keras.Sequential(
        [
            keras.Input((), dtype="int32"),
            TABLES[table](len(movies), 4, name="movie_table", mesh_axis="batch"),
            keras.layers.Dense(4),
        ]
    )
    user_table = TABLES[table](len(users), 4, name="user_table")
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=3), movie_tower, candidates=np.arange(10), similarity="cosine"
    )
    model = TwoTowerModel(
        user_table, movie_tower, "user", "movie", candidate_id="movie", retrieval=index,
        vocabularies={"user": users, "movie": movies},
    )  # fmt: skip
    model.compile("adam")
    fit(model, DATA)
    expected = [rows(user_table), rows(movie_tower.layers[0])]
    answer = model.recommend(USERS, k=9)
    keras.distribution.set_distribution(DISTRIBUTIONS[after]())
    copy, larger = model.extend({}), model.extend(NEW)
    for each in (copy, larger):
        new = [rows(each.query_tower)[:13], rows(each.candidate_tower.layers[0])[:10]]
        assert_equal(new, expected)
        np.testing.assert_array_equal(each.recommend(USERS, include_ids=MOVIES, k=9).ids, answer.ids)
    assert larger.retrieval.num_candidates == 12
    assert set(larger.recommend("u12", k=11).ids[0]) == {*MOVIES, "film 9", "film 10"}
    fit(larger, pd.concat([DATA, NEW_DATA]))
    larger.evaluate(DATA, verbose=0)


@pytest.mark.parametrize("table", ["plain", "sharded", "rows, adam"])
def test_models_are_saved_and_loaded_before_and_after(table, tmp_path):
    model = trained_model(table)
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    larger, of_loaded = model.extend(NEW), loaded.extend(NEW)
    for each in (larger, of_loaded):
        np.testing.assert_array_equal(rows(each.query_tower)[:13], rows(model.query_tower))
    fit(larger, pd.concat([DATA, NEW_DATA]))
    larger.save(tmp_path / "b.keras")
    again = keras.saving.load_model(tmp_path / "b.keras")
    for ours, theirs in zip(again.recommend(["u12", "u3"]), larger.recommend(["u12", "u3"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert fit(again, NEW_DATA) == fit(larger, NEW_DATA)
    last = again.extend({"user": ["u14"]})
    assert last.vocabularies["user"].names == [*USERS, "u12", "u13", "u14"]
    np.testing.assert_array_equal(rows(last.query_tower)[:15], rows(again.query_tower))


def test_what_is_known_of_the_training_data_stays():
    model = named_model()
    fit(model, DATA, seen="training")
    larger = model.extend(NEW)
    seen = set(DATA["movie"][DATA["user"] == "u3"])
    assert not seen & set(larger.recommend("u3", k=11).ids[0])
    assert "film 9" in larger.recommend("u3", k=11).ids[0]
    for ours, theirs in zip(larger.recommend("nobody"), model.recommend("nobody"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    fit(larger, NEW_DATA, seen="training")
    assert "film 2" not in larger.recommend("u12", k=11).ids[0]
    assert "film 2" in larger.recommend("u13", k=11).ids[0]


def test_an_uncompiled_model_is_extended():
    model = named_model(optimizer=None)
    model({"user": np.array([1]), "movie": np.array([1])})
    larger = model.extend(NEW)
    assert not larger.compiled
    np.testing.assert_array_equal(rows(larger.query_tower)[:13], rows(model.query_tower))


def test_a_model_that_was_not_built_is_extended():
    larger = named_model().extend(NEW)
    fit(larger, pd.concat([DATA, NEW_DATA]))
    assert larger.query_tower.input_dim == 15


# Sampling probabilities, drawn negatives, memory.


def test_new_candidates_have_not_been_sampled():
    model = trained_model(task=DistributedTwoTowerTask(), sampling_probability=StreamingSamplingProbability(10))
    larger = model.extend(NEW)
    old, new = model.sampling_probability, larger.sampling_probability
    assert new.num_candidates == 12
    assert np.array(old.share.value)[1:].all()
    np.testing.assert_array_equal(new(np.arange(10)), old(np.arange(10)))
    np.testing.assert_array_equal(new(np.array([10, 11])), 0.0)
    for name in ("total", "now", "total_error"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
    fit(larger, NEW_DATA)
    assert (np.array(new(np.array([10, 11]))) > 0).all()


def test_fixed_counts_of_new_candidates_are_zero():
    sampling = StreamingSamplingProbability(10, counts=np.arange(10))
    larger = trained_model(task=DistributedTwoTowerTask(), sampling_probability=sampling).extend(NEW)
    expected = np.array([*np.arange(10) / 45, 0, 0], "float32")
    np.testing.assert_allclose(larger.sampling_probability(np.arange(12)), expected)


def extras(**kwargs):
    return named_model(
        task=DistributedTwoTowerTask(remove_accidental_hits=True),
        mixed_negatives=MixedNegatives(StreamingSamplingProbability(10), 5, seed=1, exclude_ids=[0]),
        cross_batch_memory=CrossBatchMemory(20, warmup_steps=2),
        **kwargs,
    )


def test_drawn_negatives_and_memory_go_on():
    model = extras()
    fit(model, DATA)
    copy = model.extend({})
    assert_equal(state(copy), state(model))
    assert fit(copy, DATA) == fit(model, DATA)
    assert_equal(state(copy), state(model))
    larger = model.extend(NEW)
    np.testing.assert_array_equal(larger.cross_batch_memory.embeddings, model.cross_batch_memory.embeddings)
    assert larger.mixed_negatives.sampling_probability.num_candidates == 12
    assert larger.mixed_negatives.num_drawn_from == 11
    drawn = np.concatenate([np.array(larger.mixed_negatives.draw()) for _ in range(40)])
    assert set(drawn.tolist()) == set(range(1, 12))
    fit(larger, pd.concat([DATA, NEW_DATA]))


def test_random_layers_and_other_settings_go_on():
    users, movies = Vocabulary(USERS), Vocabulary(MOVIES)
    query_tower = keras.Sequential(
        [
            keras.Input((), dtype="int32"),
            keras.layers.Embedding(len(users), 4),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(4),
        ]
    )
    model = TwoTowerModel(
        query_tower, keras.layers.Embedding(len(movies), 4), "user", "movie",
        vocabularies={"user": users, "movie": movies},
    )  # fmt: skip
    query_tower.layers[-1].trainable = False
    model.compile(keras.optimizers.Adam(0.01))
    fit(model, DATA)
    model.optimizer.learning_rate = 0.005
    copy, larger = model.extend({}), model.extend(NEW)
    assert not larger.query_tower.layers[-1].trainable
    assert float(larger.optimizer.learning_rate.value) == np.float32(0.005)
    assert fit(copy, DATA)["loss"] == fit(larger, DATA)["loss"] == fit(model, DATA)["loss"]
    assert_equal(state(copy), state(model))


# Towers.


@keras.saving.register_keras_serializable("tests_extend")
class OwnTower(keras.Model):
    """A tower that creates its table for a number of users."""

    def __init__(self, width, num_users, num_groups=13, **kwargs):
        super().__init__(**kwargs)
        self.width, self.num_users, self.num_groups = width, num_users, num_groups
        self.groups = keras.layers.Embedding(num_groups, width)
        self.table = keras.layers.Embedding(num_users, width)
        self.bias = keras.layers.Embedding(num_users, 1)
        self.dense = keras.layers.Dense(4)

    def call(self, ids):
        return self.dense(self.table(ids) + self.bias(ids) + self.groups((ids * 7) % self.num_groups))

    def get_config(self):
        own = {"width": self.width, "num_users": self.num_users, "num_groups": self.num_groups}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("tests_extend")
class TowerOfTable(keras.layers.Layer):
    """A tower around a table of its own config."""

    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.table, self.dense = table, keras.layers.Dense(4)

    def build(self, shape):
        if not self.table.built:
            self.table.build(shape)
        self.dense.build((None, self.table.output_dim))

    def call(self, ids):
        return self.dense(self.table(ids))

    def get_config(self):
        return {**super().get_config(), "table": keras.saving.serialize_keras_object(self.table)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("table")), **config)


@keras.saving.register_keras_serializable("tests_extend")
class Forgetful(OwnTower):
    """A tower whose config does not have the number of rows."""

    def __init__(self, **kwargs):
        super().__init__(3, 13, **kwargs)

    def get_config(self):
        return keras.Model.get_config(self)


def functional(table):
    ids = keras.Input((), dtype="int32")
    return keras.Model(ids, keras.layers.Dense(4)(keras.layers.Dropout(0.1)(table(ids))))


def nested(table):
    ids = keras.Input((), dtype="int32")
    inner = keras.Sequential([table, keras.layers.Dense(4)])
    return keras.Model(ids, keras.layers.Dense(4)(inner(ids)))


TOWERS = {
    "sequential": lambda table: keras.Sequential([keras.Input((), dtype="int32"), table, keras.layers.Dense(4)]),
    "functional": functional,
    "nested": nested,
    "own tower of a table": TowerOfTable,
    # The width is the number of rows, as is that of the other table.
    "own tower": lambda table: OwnTower(13, 13),
}


@pytest.mark.parametrize("table", ["plain", "rows, adagrad"])
@pytest.mark.parametrize("tower", TOWERS)
def test_tables_anywhere_in_a_tower_grow(tower, table, tmp_path):
    if tower == "own tower" and table != "plain":
        pytest.skip("It has a table of its own.")
    users, movies = Vocabulary(USERS), Vocabulary(MOVIES)
    query_tower = TOWERS[tower](TABLES[table](len(users), 4, name="table"))
    model = TwoTowerModel(
        query_tower, keras.layers.Embedding(len(movies), 4), "user", "movie",
        vocabularies={"user": users, "movie": movies},
    )  # fmt: skip
    model.compile("adam")
    fit(model, DATA)
    larger = model.extend(NEW)
    names = pd.Series([*USERS, "u0"])
    np.testing.assert_array_equal(larger.query_tower(users.encode(names)), query_tower(users.encode(names)))
    fit(larger, NEW_DATA)
    larger.save(tmp_path / "a.keras")
    again = keras.saving.load_model(tmp_path / "a.keras").extend({"user": ["u14"]})
    np.testing.assert_array_equal(again.query_tower(np.arange(15)), larger.query_tower(np.arange(15)))
    assert np.isfinite(np.array(again.query_tower(np.array([15])))).all()


def test_hashed_ids_do_not_grow_their_table():
    users, movies = Vocabulary(USERS), Vocabulary(MOVIES)
    model = TwoTowerModel(
        OwnTower(3, 13, num_groups=5), keras.layers.Embedding(len(movies), 4), "user", "movie",
        vocabularies={"user": users, "movie": movies},
    )  # fmt: skip
    model.compile("adam")
    fit(model, DATA)
    larger = model.extend(NEW)
    assert (larger.query_tower.table.input_dim, larger.query_tower.groups.input_dim) == (15, 5)


def history_model(table="plain", **kwargs):
    movies = Vocabulary(MOVIES)
    shared = TABLES[table](len(movies), 4, name="shared")
    ids = keras.Input((3,), dtype="int32")
    query_tower = keras.Model(ids, keras.layers.GlobalAveragePooling1D()(shared(ids)))
    return TwoTowerModel(
        query_tower, shared, "history", "movie", vocabularies={"history": movies, "movie": movies}, **kwargs
    )


HISTORIES = {"history": RNG.choice(MOVIES, (32, 3)), "movie": RNG.choice(MOVIES, 32)}


@pytest.mark.parametrize("table", ["plain", "rows, adagrad"])
def test_features_that_share_a_vocabulary_and_a_table_grow_together(table):
    model = history_model(table)
    model.compile("adam")
    fit(model, HISTORIES)
    larger = model.extend({"history": ["film 9"], "movie": np.array(["film 10", "film 9"])})
    assert larger.vocabularies["history"] is larger.vocabularies["movie"]
    assert larger.vocabularies["movie"].names == [*MOVIES, "film 9", "film 10"]
    assert larger.candidate_tower in larger.query_tower.layers
    assert larger.retrieval.num_candidates == larger.sampling_probability.num_candidates == 12
    np.testing.assert_array_equal(rows(larger.candidate_tower)[:10], rows(model.candidate_tower))
    fit(larger, {"history": [["film 9", "film 10", "film 1"]], "movie": ["film 10"]})


def test_features_without_a_vocabulary_grow_to_a_number_of_rows():
    model = TwoTowerModel(keras.layers.Embedding(6, 4), keras.layers.Embedding(5, 4), "user", "movie")
    model.compile("adam")
    model.fit({"user": np.arange(5), "movie": np.arange(5)}, verbose=0)
    larger = model.extend({"user": np.int64(8), "movie": 7})
    assert (larger.query_tower.input_dim, larger.candidate_tower.input_dim) == (8, 7)
    assert larger.retrieval.num_candidates == larger.sampling_probability.num_candidates == 7
    larger.fit({"user": np.array([7]), "movie": np.array([6])}, verbose=0)
    assert model.extend({"user": 6}).query_tower.input_dim == 6


# The index.


def catalogue_model(has_ids, **kwargs):
    """Candidates have a genre and, as their id, a name. Their index has the ids of all but one film."""
    movies = Vocabulary(MOVIES)
    genre, tags = keras.Input((), dtype="int32", name="genre"), keras.Input((2,), name="tags")
    output = keras.layers.Embedding(3, 4)(genre) + keras.layers.Dense(4)(tags)
    tower = keras.Model({"genre": genre, "tags": tags}, output)
    names = MOVIES[:8] if has_ids else [None, *MOVIES]
    catalogue = features_of(names)
    ids = movies.encode(MOVIES[:8]) if has_ids else None
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=3), tower, candidates=catalogue, candidate_ids=ids, similarity="cosine"
    )
    model = TwoTowerModel(
        keras.layers.Embedding(13, 4), tower, "user", ["genre", "tags"], candidate_id="movie", retrieval=index,
        vocabularies={"user": Vocabulary(USERS), "movie": movies}, **kwargs,
    )  # fmt: skip
    model.compile("adam")
    data = DATA.replace({"film 8": "film 0"})
    fit(model, {**features_of(data["movie"]), "user": data["user"], "movie": data["movie"]})
    return model


def features_of(names):
    numbers = np.array([-1 if name is None else int(name.split()[1]) for name in names])
    return {"genre": numbers % 3, "tags": np.stack([numbers, numbers**2], axis=1).astype("float32") / 50}


@pytest.mark.parametrize("has_ids", [True, False])
def test_queries_grow_and_the_candidates_of_a_feature_tower_stay(has_ids):
    model = catalogue_model(has_ids)
    expected = model.recommend(USERS, k=8)
    larger = model.extend({"user": ["u12"]})
    for ours, theirs in zip(larger.recommend(USERS, k=8), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not larger.retrieval.is_stale
    data = {**features_of(["film 2"]), "user": ["u12"], "movie": ["film 2"]}
    larger.fit(data, verbose=0)
    # It still has its candidates.
    assert larger.recommend("u12", k=8).ids.shape == (1, 8)
    assert_equal([np.array(v.value) for v in model.retrieval.variables], [
        np.array(v.value) for v in model.extend({}).retrieval.variables
    ])  # fmt: skip


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_feature_tower_takes_the_new_catalogue(is_loaded, tmp_path):
    model = catalogue_model(True)
    model.save(tmp_path / "a.keras")
    if is_loaded:
        model = keras.saving.load_model(tmp_path / "a.keras")
    names = [*MOVIES[:8], "film 11", "film 8"]
    catalogue = pd.DataFrame({"genre": features_of(names)["genre"], "movie": names, "title": names})
    frame = {**{name: catalogue[name] for name in catalogue}, "tags": features_of(names)["tags"]}
    larger = model.extend({"movie": ["film 11"], "user": ["u12"]}, candidates=frame)
    assert set(larger.recommend("u12", k=10).ids[0]) == set(names)
    by_ids = model.extend({"movie": ["film 11"]}, candidates=features_of(names), candidate_ids=names)
    np.testing.assert_array_equal(by_ids.recommend(USERS, k=10).ids, larger.recommend(USERS, k=10).ids)
    np.testing.assert_allclose(
        np.array(by_ids.retrieval.candidate_embeddings), by_ids.candidate_tower(features_of(names)), rtol=1e-6
    )
    assert model.retrieval.num_candidates == 8
    with pytest.raises(ValueError, match=r"needs the features of the whole catalogue.*a larger 'movie'"):
        model.extend({"movie": ["film 11"]})
    with pytest.raises(ValueError, match=r"must be in the vocabulary\. Received: 'film 12'"):
        model.extend({"movie": ["film 11"]}, candidates=features_of(names), candidate_ids=[*names[:-1], "film 12"])
    with pytest.raises(ValueError, match="`candidate_ids` without `candidates`"):
        model.extend({"movie": ["film 11"]}, candidate_ids=names)


def test_a_stale_index_stays_stale(tmp_path):
    catalogue_model(True).save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert not loaded.extend({"user": ["u12"]}).retrieval.is_stale
    weight = loaded.candidate_tower.weights[0]
    weight.assign(np.array(weight) + 1)
    larger = loaded.extend({"user": ["u12"]})
    assert larger.retrieval.is_stale
    with pytest.raises(ValueError, match="Received: a stale index"):
        larger.recommend("u12")


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_tower_of_ids_alone_needs_no_catalogue(with_ids, tmp_path):
    movies = Vocabulary(MOVIES)
    tower = keras.Sequential([keras.Input((), dtype="int32"), keras.layers.Embedding(10, 4), keras.layers.Dense(4)])
    ids = np.arange(9, 2, -1) if with_ids else None
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=3), tower, similarity="cosine",
        candidates=np.arange(10) if ids is None else ids, candidate_ids=ids,
    )  # fmt: skip
    model = TwoTowerModel(
        keras.layers.Embedding(13, 4), tower, "user", "movie", candidate_id="movie", retrieval=index,
        vocabularies={"user": Vocabulary(USERS), "movie": movies},
    )  # fmt: skip
    model.compile("adam")
    fit(model, DATA[DATA["movie"].isin(MOVIES[2:])])
    model.save(tmp_path / "a.keras")
    for each in (model, keras.saving.load_model(tmp_path / "a.keras")):
        larger = each.extend(NEW)
        known = MOVIES[2:] if with_ids else MOVIES
        assert set(larger.recommend("u12", k=len(known) + 2).ids[0]) == {*known, "film 9", "film 10"}
        fit(larger, NEW_DATA[:3])
        larger.recommend("u12")


def test_an_index_of_an_embedding_with_ids_takes_the_new_ids():
    tower = keras.layers.Embedding(4, 4)
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=2), tower, candidate_ids=[40, 10, 30, 20], similarity="cosine"
    )
    model = TwoTowerModel(
        keras.layers.Embedding(5, 4), tower, "user", "row", candidate_id="movie_id", retrieval=index,
        sampling_probability=None,
    )  # fmt: skip
    model.compile("adam")
    model.fit({"user": np.arange(4), "row": np.arange(4), "movie_id": np.array([40, 10, 30, 20])}, verbose=0)
    copy = model.extend({"user": 9})
    np.testing.assert_array_equal(copy.recommend(np.arange(5)).ids, model.recommend(np.arange(5)).ids)
    larger = model.extend({"row": 5}, candidate_ids=[40, 10, 30, 20, 5])
    assert set(larger.recommend(0, k=5).ids[0].tolist()) == {40, 10, 30, 20, 5}
    for ids, message in (
        (None, "needs the ids of all rows"),
        ([10, 40, 30, 20, 5], "Old rows keep their ids. Received: the id 10 for row 0, whose id is 40"),
        ([40, 10, 30, 20], "one id for each candidate|4"),
        ([40, 10, 30, 20, 20], "20"),
    ):
        with pytest.raises(ValueError, match=message):
            model.extend({"row": 5}, candidate_ids=ids)


# Errors.

ERRORS = {
    "no dict": (["u12"], TypeError, "must be a dict by the names of features"),
    "unknown feature": ({"film": ["a"]}, ValueError, "Received: 'film', and the features \\['user', 'movie'\\]"),
    "integers": ({"user": [3]}, TypeError, "new names of 'user'.*Received: 3"),
    "a number": ({"user": 20}, TypeError, "grows by names. Received: 20 for 'user'"),
    "mixed": ({"user": ["a", 3]}, TypeError, "new names of 'user'.*Received: 3 in row 1"),
    "missing": ({"user": ["a", None]}, ValueError, "new names of 'user'.*must not be missing.*row 1"),
    "NaN": ({"user": pd.Series(["a", np.nan])}, ValueError, "new names of 'user'.*must not be missing.*row 1"),
    "empty name": ({"user": ["a", ""]}, ValueError, "new names of 'user'.*must not be empty"),
    "ragged": ({"user": [["a"], ["b", "c"]]}, ValueError, "Names must form an array"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_change_nothing(error):
    new, kind, message = ERRORS[error]
    model = trained_model()
    before = state(model)
    with pytest.raises(kind, match=message):
        model.extend(new)
    assert_equal(state(model), before)
    assert model.vocabularies["user"].names == USERS


@pytest.mark.parametrize(
    ("new", "kind", "message"),
    [
        ({"user": 5}, ValueError, "Received: 5 for 'user', which has 6"),
        ({"user": 8.0}, TypeError, "Received: 8.0 for 'user'"),
        ({"user": True}, TypeError, "Received: True for 'user'"),
        ({"user": ["a"]}, TypeError, "without a vocabulary grows to a number of rows"),
        ({"user": -1}, ValueError, "fewer rows"),
    ],
)
def test_numbers_of_rows_that_do_not_fit_are_errors(new, kind, message):
    model = TwoTowerModel(keras.layers.Embedding(6, 4), keras.layers.Embedding(5, 4), "user", "movie")
    with pytest.raises(kind, match=message):
        model.extend(new)


@keras.saving.register_keras_serializable("tests_extend")
class OneHot(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(13, 4), name="kernel")

    def call(self, ids):
        return keras.ops.one_hot(ids, 13) @ self.kernel


@keras.saving.register_keras_serializable("tests_extend")
class OwnLookup(OneHot):
    def call(self, ids):
        return keras.ops.take(self.kernel, ids, axis=0)


UNFIT = {
    "no lookup": (OneHot, "table of 'user' must be.*no lookup of this feature"),
    "no embedding": (OwnLookup, "table of 'user' must be.*kernel"),
    "no config": (Forgetful, "A table grows through its config.*with 13 rows"),
}


@pytest.mark.parametrize("tower", UNFIT)
def test_towers_without_a_table_that_can_grow_are_errors(tower):
    kind, message = UNFIT[tower]
    model = TwoTowerModel(
        kind(), keras.layers.Embedding(10, 4), "user", "movie",
        vocabularies={"user": Vocabulary(USERS), "movie": Vocabulary(MOVIES)},
    )  # fmt: skip
    model.compile("adam")
    with pytest.raises(ValueError, match="tables of 'user' are known once the model has seen its features"):
        model.extend(NEW)
    fit(model, DATA)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        model.extend(NEW)
    assert_equal(state(model), before)
    # Items can still be added.
    assert model.extend({"movie": ["film 9"]}).candidate_tower.input_dim == 11


def test_arguments_of_compile_that_do_not_load_are_an_error():
    def of_one():
        class Own(keras.optimizers.SGD):
            pass

        return Own(0.1)

    model = named_model(optimizer=of_one())
    fit(model, DATA)
    with pytest.raises(ValueError, match="compiled from the config of the old one"):
        model.extend(NEW)


def test_a_plain_table_that_no_longer_divides_is_an_error():
    keras.distribution.set_distribution(model_parallel((2, 4), ".*user_table.*embeddings"))
    users = Vocabulary(USERS[:11])
    model = TwoTowerModel(
        keras.layers.Embedding(12, 4, name="user_table"), keras.layers.Embedding(10, 4), "user", "movie",
        vocabularies={"user": users, "movie": Vocabulary(MOVIES)},
    )  # fmt: skip
    model.compile("adam")
    fit(model, DATA[DATA["user"] != "u11"])
    with pytest.raises(ValueError, match="divisible"):
        model.extend({"user": ["u12"]})
    assert model.extend({"user": ["a", "b", "c", "d"]}).query_tower.input_dim == 16
