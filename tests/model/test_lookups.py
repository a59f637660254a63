"""Ids that a tower looks up are checked and reach their table unchanged, in whatever way the tower gets them there."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import ops

from keras_rs_contrib import (
    MixedNegatives,
    RowSGD,
    RowSparseEmbedding,
    ShardedEmbedding,
    StreamingSamplingProbability,
    TwoTowerModel,
    pad_batches,
)

ROWS = 20
USERS = np.arange(64) % ROWS


class OwnTake(keras.layers.Layer):
    """A table of the layer's own, without a `keras.layers.Embedding`."""

    def __init__(self, rows=ROWS, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows

    def build(self, input_shape):
        self.table = self.add_weight(shape=(self.rows, 8), name="table")

    def call(self, ids):
        return ops.take(self.table, ops.cast(ids, "int32"), axis=0)


class Constant(keras.layers.Layer):
    """Features of candidates by id, in a table that is not a weight."""

    def __init__(self, rows=ROWS):
        super().__init__()
        self.features = np.random.default_rng(0).normal(size=(rows, 8)).astype("float32")

    def call(self, ids):
        return ops.take(ops.convert_to_tensor(self.features), ops.cast(ids, "int32"), axis=0)


class Wrapped(keras.Model):
    """A model of one's own, which casts and expands ids."""

    def __init__(self, rows=ROWS):
        super().__init__()
        self.embedding = keras.layers.Embedding(rows, 8)

    def call(self, ids):
        return self.embedding(ops.cast(ops.expand_dims(ids, 1), "float32"))[:, 0]


class Own(keras.layers.Layer):
    """Looks ids up in a table with a function."""

    def __init__(self, look_up):
        super().__init__()
        self.look_up = look_up

    def build(self, input_shape):
        self.table = self.add_weight(shape=(ROWS, 8))

    def call(self, ids):
        return self.look_up(ops.convert_to_tensor(self.table), ids)


class Genre(keras.layers.Layer):
    """Looks up the genre of each id in a weight, and the embedding of the genre in a table that lacks the last one."""

    def build(self, input_shape):
        genres = np.arange(ROWS) // 5
        self.genres = self.add_weight(
            shape=(ROWS,), dtype="int32", trainable=False, initializer=lambda shape, dtype=None: ops.array(genres)
        )
        self.table = self.add_weight(shape=(genres.max(), 8))

    def call(self, ids):
        return ops.take(self.table, ops.take(self.genres, ids, axis=0), axis=0)


class FromOne(keras.layers.Layer):
    """Ids are counted from 1."""

    def __init__(self, rows=ROWS):
        super().__init__()
        self.embedding = keras.layers.Embedding(rows, 8)

    def call(self, ids):
        return self.embedding(ids - 1)


def functional(shape=(), dtype=None, embedding=None):
    ids = keras.Input(shape, dtype=dtype)
    embeddings = (embedding or keras.layers.Embedding(ROWS, 8))(ids)
    return keras.Model(ids, keras.layers.Flatten()(embeddings) if shape else embeddings)


def embedding(rows=ROWS):
    return keras.layers.Embedding(rows, 8)


TOWERS = {
    "embedding": embedding,
    "sequential": lambda: keras.Sequential([embedding(), keras.layers.Dense(8)]),
    "nested sequential": lambda: keras.Sequential([keras.Sequential([embedding()]), keras.layers.Dense(8)]),
    "Input(())": functional,
    "Input((1,))": lambda: functional((1,)),
    "int Input": lambda: functional((), "int32"),
    "functional in sequential": lambda: keras.Sequential([functional((), "int32"), keras.layers.Dense(8)]),
    "row-sparse in sequential": lambda: keras.Sequential([RowSparseEmbedding(ROWS, 8, RowSGD(0.1))]),
    "sharded in sequential": lambda: keras.Sequential([ShardedEmbedding(ROWS, 8)]),
    "with LoRA": lambda: keras.Sequential([keras.layers.Embedding(ROWS, 8, lora_rank=2)]),
    "own model": Wrapped,
    "own table": OwnTake,
    "own table in sequential": lambda: keras.Sequential([OwnTake()]),
    "own table along the last axis": lambda: Own(lambda table, ids: ops.take(ops.transpose(table), ids, axis=1).T),
    "own table along an axis": lambda: Own(
        lambda table, ids: ops.take_along_axis(table, ops.tile(ops.expand_dims(ids, 1), (1, 8)), axis=0)
    ),
    "constant table": lambda: keras.Sequential([Constant(), keras.layers.Dense(8)]),
}


def make_model(tower, **kwargs):
    model = TwoTowerModel(tower, embedding(12), "user", "movie", **kwargs)
    model.compile("adam")
    return model


def data(users):
    return {"user": users, "movie": np.arange(len(users)) % 12}


def weights_of(model):
    """The values of the weights. A model that is not built yet has fewer of them."""
    return {variable.path: variable.numpy() for variable in model.weights}


def assert_refuses(model, users, message):
    """The model refuses the ids at each entry point, and keeps its weights."""
    weights = weights_of(model)
    calls = [
        lambda: model.fit(data(users), batch_size=len(users), shuffle=False, verbose=0),
        lambda: model.fit(pad_batches(data(users), batch_size=len(users)), verbose=0),
        lambda: model.evaluate(data(users), batch_size=len(users), verbose=0),
        lambda: model.predict({"user": users}, batch_size=len(users), verbose=0),
        lambda: model.recommend({"user": users}),
        lambda: model.evaluate_queries({"user": users}, np.zeros((len(users), 1), int)),
        lambda: model.train_on_batch(data(users)),
        lambda: model.test_on_batch(data(users)),
        lambda: model.predict_on_batch({"user": users}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    after = weights_of(model)
    for path, before in weights.items():
        np.testing.assert_array_equal(after[path], before)


@pytest.mark.parametrize("name", TOWERS)
def test_ids_without_a_row_are_refused_in_every_tower(name):
    model = make_model(TOWERS[name]())
    model.fit(data(USERS), verbose=0)
    for wrong in (ROWS, -1):
        users = np.where(np.arange(len(USERS)) == 5, wrong, USERS)
        message = rf"'user' must be a whole number in \[0, 19\].*\n?.*Received: {wrong} in row 5"
        if name in ("own table", "own table in sequential", "own table along an axis", "constant table", "with LoRA"):
            message = rf"\[0, 19\].*Received: {wrong} "
        assert_refuses(model, users, message)


@pytest.mark.parametrize("name", TOWERS)
def test_the_first_batch_is_checked_before_the_tower_is_built(name):
    model = make_model(TOWERS[name]())
    with pytest.raises(ValueError, match="Received: 20 "):
        model.fit(data(USERS + 1), verbose=0)


def test_ids_that_a_tower_computes_are_checked_as_it_computes_them():
    model = make_model(FromOne())
    model.fit(data(USERS + 1), verbose=0)
    model.predict({"user": np.array([20])}, verbose=0)
    for wrong, computed in ((0, -1), (21, 20)):
        users = np.where(np.arange(len(USERS)) == 5, wrong, USERS + 1)
        assert_refuses(model, users, rf"computes from the feature 'user'.*\[0, 19\].*Received: {computed} for row 5")


def test_ids_that_a_tower_hashes_may_have_any_value():
    class Hashing(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embedding = embedding()

        def call(self, ids):
            return self.embedding((ids * 7 + 3) % ROWS)

    model = make_model(Hashing())
    model.fit(data(USERS * 1_000_003 % 2**31), verbose=0)
    assert len(model.recommend({"user": np.array([-5, 2**31 - 1])}).ids) == 2


def test_only_the_ids_that_a_tower_uses_are_checked():
    class Recent(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embedding = embedding()

        def call(self, history):
            recent = history[:, -2:]
            known = recent >= 0
            embeddings = self.embedding(ops.where(known, recent, 0))
            return ops.sum(embeddings * ops.cast(known, "float32")[..., None], axis=1)

    model = make_model(Recent())
    history = np.tile(np.array([99, 3, -1]), (64, 1))
    model.fit(data(history), verbose=0)
    history[7, 1] = 20
    assert_refuses(model, history, r"\[0, 19\].*Received: 20 for row 7")


def test_ids_of_each_time_step_are_checked():
    ids = keras.Input((3,), dtype="int32")
    steps = keras.layers.TimeDistributed(keras.layers.Embedding(ROWS, 8))(keras.layers.Reshape((3, 1))(ids))
    tower = keras.Model(ids, keras.layers.GRU(8)(keras.layers.Reshape((3, 8))(steps)))
    model = make_model(tower)
    history = np.tile(np.arange(3), (64, 1))
    model.fit(data(history), verbose=0)
    history[7, 2] = 20
    assert_refuses(model, history, r"\[0, 19\].*Received: 20 for row 7")


@pytest.mark.parametrize("kind", ["scan", "checkpoint"])
def test_ids_in_a_loop_are_checked(kind):
    class Loop(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embedding = embedding()

        def build(self, input_shape):
            self.embedding.build(input_shape)

        def call(self, history):
            def add(total, ids):
                return total + self.embedding(ids), None

            if kind == "checkpoint":
                return jax.checkpoint(lambda ids: add(0.0, ids)[0])(history[:, 0])
            return jax.lax.scan(add, jnp.zeros((history.shape[0], 8)), history.T)[0]

    model = make_model(Loop())
    history = np.tile(np.arange(3), (64, 1))
    model.fit(data(history), verbose=0)
    history[7, 0] = 20
    assert_refuses(model, history, r"\[0, 19\].*Received: 20 (in|for) row 7")


def test_each_feature_of_a_tower_is_checked_against_its_own_table():
    inputs = {name: keras.Input((), dtype="int32", name=name) for name in ("user", "age")}
    tables = {"user": embedding(), "age": embedding(5)}
    tower = keras.Model(inputs, keras.layers.Add()([tables[name](inputs[name]) for name in inputs]))
    model = TwoTowerModel(tower, embedding(12), ["user", "age"], "movie")
    model.compile("adam")
    model.fit({**data(USERS), "age": USERS % 5}, verbose=0)
    with pytest.raises(ValueError, match=r"'age' must be a whole number in \[0, 4\].*Received: 5 in row 5"):
        model.fit({**data(USERS), "age": np.minimum(USERS, 5)}, shuffle=False, verbose=0)


@pytest.mark.parametrize("name", ["sequential", "own table in sequential", "row-sparse in sequential", "Input(())"])
@pytest.mark.parametrize(("policy", "rows"), [("mixed_bfloat16", 258), ("mixed_float16", 2050)])
def test_ids_are_not_rounded(name, policy, rows):
    """An id reaches its table, or the error says why not. 257 is no bfloat16, and 2,049 no float16."""
    keras.config.set_dtype_policy(policy)
    table = {
        "own table in sequential": lambda: OwnTake(rows),
        "row-sparse in sequential": lambda: RowSparseEmbedding(rows, 8, RowSGD(0.1)),
    }.get(name, lambda: embedding(rows))
    if name == "row-sparse in sequential" and policy == "mixed_float16":
        pytest.skip("Row-sparse tables refuse loss scaling.")
    tower = functional(embedding=table()) if name == "Input(())" else keras.Sequential([table()])
    model = make_model(tower)
    users = np.arange(rows)
    if name == "Input(())":
        # `keras.Input` is float32 under any policy.
        model.predict({"user": users}, verbose=0)
        lists = model.recommend({"user": users}, k=12)
        assert len(np.unique(lists.scores, axis=0)) == rows
        return
    fix = r"integers up to \d+, for the .* rows of .*keras.Input\(\(\), dtype=\"int32\"\)"
    assert_refuses(model, users, fix)
    with pytest.raises(ValueError, match=fix):
        model({"user": users})


def test_a_tower_that_begins_with_an_int_input_keeps_ids_apart():
    keras.config.set_dtype_policy("mixed_bfloat16")
    tower = keras.Sequential([keras.Input((), dtype="int32"), embedding(1000)])
    model = make_model(tower)
    lists = model.recommend({"user": np.arange(1000)}, k=12)
    assert len(np.unique(lists.scores, axis=0)) > 990


def test_tables_whose_rows_a_float_can_hold_are_accepted():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = make_model(keras.Sequential([embedding(256)]))
    model.fit(data(np.arange(256)), verbose=0)


def test_whole_floats_are_ids():
    model = make_model(embedding())
    model.fit(data(USERS.astype("float32")), verbose=0)
    with pytest.raises(ValueError, match=r"Received: 0\.5 in row 0"):
        model.fit(data(USERS + 0.5), shuffle=False, verbose=0)


def test_ids_are_not_rounded_before_they_are_hashed():
    keras.config.set_dtype_policy("mixed_bfloat16")

    class Modulo(keras.layers.Layer):
        def call(self, ids):
            return ops.mod(ops.cast(ids, self.compute_dtype), 16)

    model = make_model(keras.Sequential([Modulo(), embedding(16)]))
    model.fit(data(np.arange(256)), verbose=0)
    assert_refuses(model, np.arange(258), "Received: 257 in the feature 'user', as bfloat16")


def test_labels_and_float_features_are_not_rounded_by_the_policy_of_the_model():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = TwoTowerModel(embedding(), embedding(12), "user", "movie", label="rating")
    model.compile("adam")
    seen = []
    call = model.query_tower.call
    features = {**data(USERS), "rating": np.full(64, 257.0, "float32")}
    keras.utils.set_random_seed(0)
    loss = model.evaluate(features, verbose=0, return_dict=True)["loss"]
    assert abs(loss - 257.0**2) < 30  # 256 ** 2 is 513 less.
    del seen, call


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_ids_beyond_int32_are_refused_before_they_wrap(dtype):
    class Hashing(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embedding = embedding()

        def call(self, ids):
            return self.embedding(ops.cast(ids, "int32") % ROWS)

    model = make_model(Hashing(), exclude_feature="seen")
    model.fit(data(USERS.astype(dtype)), verbose=0)
    users = USERS.astype(dtype)
    users[5] = 2**32 + 5
    assert_refuses(model, users, rf"'user'.*range of u?int32.*Received: {users[5]} in row 5")
    with pytest.raises(ValueError, match=r"'seen'.*range of int32"):
        model.predict({"user": USERS, "seen": np.full((64, 1), 2**32 + 5, dtype)}, verbose=0)
    # JAX has a dtype for these.
    model.fit(data(np.uint32(2**31) + USERS.astype("uint32")), verbose=0)


def test_float_features_that_overflow_float32_are_refused():
    tower = keras.Sequential([keras.layers.Dense(8)])
    model = make_model(tower)
    prices = np.ones((64, 2))
    prices[5, 1] = 1e300
    for call in (lambda: model.train_on_batch(data(prices)), lambda: model.predict_on_batch({"user": prices})):
        with pytest.raises(ValueError, match=r"'user'.*float32.*Received: 1e\+300 in row 5"):
            call()


def test_candidates_that_are_drawn_must_have_a_row():
    tower = keras.Sequential([keras.Input((), dtype="int32"), embedding(12), keras.layers.Dense(8)])
    model = TwoTowerModel(
        embedding(), tower, "user", "movie", candidate_id="movie",
        mixed_negatives=MixedNegatives(StreamingSamplingProbability(13), num_negatives=4),
    )  # fmt: skip
    model.compile("adam")
    with pytest.raises(ValueError, match=r"`mixed_negatives`.*13 candidates.*12 rows"):
        model.fit(data(USERS), verbose=0)


def test_each_table_of_candidate_ids_is_named_in_errors():
    model = make_model(embedding(), sampling_probability=StreamingSamplingProbability(10, name="estimate"))
    with pytest.raises(ValueError, match=r"'movie' must be .*\[0, 9\].*sampling probability 'estimate'.*Received: 10"):
        model.fit(data(USERS), shuffle=False, verbose=0)
    with pytest.raises(ValueError, match=r"'movie' must be .*\[0, 11\].*the index.*Received: 12"):
        make_model(embedding()).fit({"user": USERS, "movie": USERS}, shuffle=False, verbose=0)


def test_ids_from_a_table_of_other_features_are_checked():
    model = make_model(Genre())
    model.fit(data(np.arange(15)), verbose=0)
    last = (ROWS - 1) // 5
    message = rf"computes from the feature 'user' must be in \[0, {last - 1}\].*Received: {last} for row 1"
    assert_refuses(model, np.array([0, ROWS - 1]), message)


def test_float_ids_that_float32_rounds_are_refused():
    rows = 2**24 + 8
    table = keras.layers.Embedding(rows, 1, embeddings_initializer="zeros")
    model = TwoTowerModel(table, keras.layers.Embedding(12, 1), "user", "movie")
    model.compile("sgd")
    for dtype in ("float32", "float64"):
        assert_refuses(
            model, np.array([3, 2**24 + 2], dtype), r"'user' must hold ids, as integers.*up to 16777216.*astype"
        )
