"""A history tower computes what its encoders say on what is not padding, and trains, saves and loads with the model."""

import keras
import keras_rs
import numpy as np
import pytest
from conftest import data_parallel, model_parallel
from keras import ops

from keras_rs_contrib import (
    HistoryTower,
    LazyAdam,
    RowSGD,
    RowSparseEmbedding,
    ShardedEmbedding,
    TwoTowerModel,
    shard_candidates,
)

ROWS, USERS, DIM = 24, 11, 8
ENCODERS = ("mean", "gru", "attention")
RNG = np.random.default_rng(0)

TABLES = {
    "plain": lambda: keras.layers.Embedding(ROWS, DIM, name="movie"),
    "sharded": lambda: ShardedEmbedding(ROWS, DIM, name="movie"),
    "row-sparse": lambda: RowSparseEmbedding(ROWS, DIM, RowSGD(0.5), name="movie"),
    "split": lambda: ShardedEmbedding(ROWS, DIM, mesh_axis="batch", name="movie"),
}


def histories(num_rows, length, empty=()):
    """Histories of random lengths, padded on the left; those of the rows in `empty` have no ids."""
    rng = np.random.default_rng(num_rows + length)
    ids = rng.integers(1, ROWS, (num_rows, length))
    counts = rng.integers(1, length + 1, num_rows)
    counts[list(empty)] = 0
    return np.where(np.arange(length) >= length - counts[:, None], ids, -1)


def table_of(weights=None, num_rows=ROWS):
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(num_rows, DIM)).astype("float32") if weights is None else weights
    return keras.layers.Embedding(num_rows, DIM, weights=weights)


def tower_of(encoder, **kwargs):
    """A tower with weights that are not at their initial values, some of which are 0."""
    tower = HistoryTower(table_of(), "history", encoder=encoder, **kwargs)
    tower({"history": np.ones((1, 3), "int32"), "user": np.ones(1, "int32")})
    rng = np.random.default_rng(2)
    for variable in tower.encoder.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.5)
    return tower


def numpy_of(outputs):
    return ops.convert_to_numpy(outputs)


# Values.


def naive_mean(table, history):
    rows = []
    for ids in history:
        known = [table[i] for i in ids if i != -1]
        rows.append(np.mean(known, axis=0) if known else np.zeros(DIM))
    return np.stack(rows)


def test_the_mean_is_that_of_the_ids_that_are_not_padding():
    tower = tower_of("mean")
    history = np.array([[-1, -1, 3], [5, -1, 3], [3, 3, -1], [-1, -1, -1], [0, 1, 2]])
    expected = naive_mean(tower.candidate_table.get_weights()[0], history)
    np.testing.assert_allclose(numpy_of(tower(history)), expected, atol=1e-6)


@pytest.mark.parametrize("length", [1, 5])
def test_a_gru_sees_each_history_without_padding(length):
    tower = tower_of("gru")
    history = histories(6, length, empty=[2])
    table = tower.candidate_table.get_weights()[0]
    result = numpy_of(tower(history))
    for ids, value in zip(history, result, strict=True):
        known = ids[ids != -1]
        expected = tower.encoder(table[known][None])[0] if len(known) else np.zeros(DIM)
        np.testing.assert_allclose(value, expected, atol=1e-6)


def layer_norm(x, layer):
    gamma, beta = layer.get_weights()
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * gamma + beta


def naive_attention(block, x, num_heads):
    """The outputs of all steps, `[length, dim]`, with a loop over steps and heads."""
    normal = layer_norm(x, block.attention_norm)
    query, query_bias, key, key_bias, value, value_bias, out, out_bias = block.attention.get_weights()
    result = np.zeros_like(x)
    for step in range(len(x)):
        for head in range(num_heads):
            q = normal[step] @ query[:, head] + query_bias[head]
            k = normal[: step + 1] @ key[:, head] + key_bias[head]
            v = normal[: step + 1] @ value[:, head] + value_bias[head]
            scores = np.exp(k @ q / np.sqrt(len(q)))
            result[step] += (scores / scores.sum()) @ v @ out[head]
    x = x + result + out_bias
    (inner, inner_bias), (outer, outer_bias) = block.inner.get_weights(), block.outer.get_weights()
    return x + np.maximum(layer_norm(x, block.dense_norm) @ inner + inner_bias, 0) @ outer + outer_bias


@pytest.mark.parametrize(("num_blocks", "num_heads"), [(1, 1), (2, 4)])
def test_attention_is_causal_and_counts_positions_from_the_last_id(num_blocks, num_heads):
    tower = tower_of("attention", num_blocks=num_blocks, num_heads=num_heads, max_length=7)
    history = histories(6, 5, empty=[2])
    table, positions = tower.candidate_table.get_weights()[0], tower.encoder.positions.numpy()
    result = numpy_of(tower(history))
    for ids, value in zip(history, result, strict=True):
        known = ids[ids != -1]
        expected = np.zeros(DIM)
        if len(known):
            x = table[known] + positions[: len(known)][::-1]
            for block in tower.encoder.blocks:
                x = naive_attention(block, x, num_heads)
            expected = layer_norm(x, tower.encoder.norm)[-1]
        np.testing.assert_allclose(value, expected, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_changes_nothing_in_any_column(encoder):
    tower = tower_of(encoder, **({"num_blocks": 2} if encoder == "attention" else {}))
    expected = numpy_of(tower(np.array([[3, 7, 5]])))
    for ids in ([-1, 3, 7, 5], [3, 7, 5, -1], [3, -1, 7, -1, -1, 5], [-1, 3, 7, -1, 5, -1]):
        np.testing.assert_allclose(numpy_of(tower(np.array([ids]))), expected, atol=1e-5)
    other = numpy_of(tower(np.array([[3, 7, 6]])))
    assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize("encoder", ["gru", "attention"])
def test_order_matters(encoder):
    tower = tower_of(encoder)
    first, second = numpy_of(tower(np.array([[3, 7, 5], [7, 3, 5]])))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_most_recent_ids_count(encoder):
    tower = tower_of(encoder, max_length=3)
    expected = numpy_of(tower(np.array([[3, 7, 5]])))
    # Padding takes no place of the three.
    for ids in ([9, 3, 7, 5], [8, 9, 3, 7, 5], [9, 3, -1, 7, -1, 5, -1]):
        np.testing.assert_allclose(numpy_of(tower(np.array([ids]))), expected, atol=1e-5)
    short = numpy_of(tower(np.array([[-1, -1, -1, -1, 5]])))
    np.testing.assert_allclose(short, numpy_of(tower(np.array([[5]]))), atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("length", [0, 1, 4, 60])
def test_an_empty_history_gives_zeros_and_finite_gradients(encoder, length):
    query_table = table_of(num_rows=USERS)
    tower = tower_of(encoder, query_table=query_table, query_feature="user")
    features = {"history": np.full((3, length), -1), "user": np.array([4, 0, 4])}
    rows = query_table.get_weights()[0]
    np.testing.assert_allclose(numpy_of(tower(features)), rows[[4, 0, 4]], atol=1e-6)
    # Beside a history that is not empty.
    if length:
        features["history"][1, -1] = 3
    for _, gradient in gradients_of(tower, features):
        assert np.isfinite(gradient).all()
    table_gradient = dict(gradients_of(tower, features))[tower.candidate_table.embeddings.path]
    assert set(np.flatnonzero(np.abs(table_gradient).sum(axis=1))) <= ({3} if length else set())


def gradients_of(tower, features):
    import jax

    values = [variable.value for variable in tower.trainable_variables]
    others = [variable.value for variable in tower.non_trainable_variables]

    def loss(values):
        return ops.sum(tower.stateless_call(values, others, features)[0] ** 2)

    gradients = jax.jit(jax.grad(loss))(values)
    return [(v.path, np.asarray(g)) for v, g in zip(tower.trainable_variables, gradients, strict=True)]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_mask_zero_makes_id_0_unknown(encoder):
    query_table = table_of(num_rows=USERS)
    tower = tower_of(encoder, query_table=query_table, query_feature="user", mask_zero=True)
    features = {"history": np.array([[0, 3, 0, 5], [-1, 0, 0, -1], [-1, -1, 3, 5]]), "user": np.array([0, 6, 0])}
    result = numpy_of(tower(features))
    np.testing.assert_allclose(result[0], result[2], atol=1e-5)
    np.testing.assert_allclose(result[1], query_table.get_weights()[0][6], atol=1e-6)
    alone = HistoryTower(tower.candidate_table, "history", encoder=tower.encoder)
    np.testing.assert_allclose(result[0], numpy_of(alone(np.array([[3, 5]])))[0], atol=1e-5)


def test_without_mask_zero_row_0_is_a_row():
    query_table = table_of(num_rows=USERS)
    tower = tower_of("mean", query_table=query_table, query_feature="user")
    result = numpy_of(tower({"history": np.array([[-1, 0]]), "user": np.array([0])}))
    rows = [table.get_weights()[0][0] for table in (tower.candidate_table, query_table)]
    np.testing.assert_allclose(result[0], sum(rows), atol=1e-6)


def test_one_feature_comes_as_a_tensor_or_in_a_dict():
    tower = tower_of("gru")
    history = histories(4, 3)
    expected = numpy_of(tower(history))
    np.testing.assert_array_equal(numpy_of(tower({"history": history})), expected)
    users = {"history": history, "user": np.array([[1], [2], [3], [4]])}
    with_rows = tower_of("gru", query_table=table_of(num_rows=USERS), query_feature="user")
    flat = {**users, "user": users["user"][:, 0]}
    np.testing.assert_array_equal(numpy_of(with_rows(users)), numpy_of(with_rows(flat)))


def test_dropout_of_rows_leaves_out_whole_rows_in_training_only():
    tower = tower_of("mean", query_table=table_of(num_rows=USERS), query_feature="user", query_dropout=0.25)
    features = {"history": np.full((400, 1), -1), "user": np.full(400, 7)}
    row = tower.query_table.get_weights()[0][7]
    np.testing.assert_allclose(numpy_of(tower(features)), np.tile(row, (400, 1)), atol=1e-6)
    trained = numpy_of(tower(features, training=True))
    is_out = (trained == 0).all(axis=1)
    assert 60 <= is_out.sum() <= 140
    np.testing.assert_allclose(trained[~is_out], np.tile(row / 0.75, ((~is_out).sum(), 1)), rtol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_dropout_acts_in_training_only(encoder):
    tower = tower_of(encoder, dropout=0.5)
    history = histories(4, 5)
    np.testing.assert_array_equal(numpy_of(tower(history)), numpy_of(tower(history)))
    assert np.abs(numpy_of(tower(history, training=True)) - numpy_of(tower(history))).max() > 1e-2


# Layers of one's own.


@keras.saving.register_keras_serializable("tests")
class Last(keras.layers.Layer):
    """The last step, projected. It is built by its call, and knows no masks."""

    def __init__(self, units=DIM, **kwargs):
        super().__init__(**kwargs)
        self.units, self.dense = units, keras.layers.Dense(units)

    def build(self, input_shape):
        self.dense.build((input_shape[0], input_shape[-1]))

    def call(self, inputs):
        return self.dense(inputs[:, -1])

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def functional():
    steps = keras.Input((None, DIM))
    return keras.Model(steps, keras.layers.LSTM(DIM)(steps))


OWN = {
    "without mask": Last,
    "LSTM": lambda: keras.layers.LSTM(DIM),
    "sequential": lambda: keras.Sequential([keras.layers.Dense(5), keras.layers.GRU(DIM)]),
    "functional": functional,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_a_layer_of_ones_own_encodes(name, tmp_path):
    model = make_model(OWN[name](), "plain")
    data = data_of(16)
    model.fit(data, verbose=0)
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    queries = {"user": data["user"], "history": np.c_[np.full((16, 2), -1), data["history"]]}
    expected = model.recommend(data_without_movie(data))
    np.testing.assert_array_equal(loaded.recommend(queries).ids, expected.ids)
    np.testing.assert_allclose(loaded.recommend(queries).scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize(
    "encoder", [Last(units=5), keras.layers.Dense(DIM), keras.layers.GRU(DIM, return_sequences=True)]
)
def test_an_encoder_with_another_shape_is_refused(encoder):
    tower = HistoryTower(table_of(), "history", encoder=encoder)
    with pytest.raises(ValueError, match=r"`encoder` must return one embedding.*Received: \(None, "):
        tower(histories(4, 3))


# Errors.


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"candidate_table": keras.layers.Dense(3)}, TypeError, "`candidate_table` must be a `Embedding`"),
        ({"history_feature": ["history"]}, TypeError, "`history_feature` must be a `str`"),
        ({"encoder": "lstm"}, ValueError, r"`encoder` must be.*'attention'\]. Received: 'lstm'"),
        ({"encoder": keras.layers.GRU}, ValueError, "an instance of a layer"),
        ({"query_feature": "user"}, ValueError, "`query_feature` without `query_table`"),
        ({"query_table": keras.layers.Embedding(3, DIM)}, ValueError, "`query_table` without `query_feature`"),
        ({"query_table": keras.layers.Embedding(3, 5), "query_feature": "user"}, ValueError, "Received: 5 and 8"),
        ({"query_table": keras.layers.Embedding(3, DIM), "query_feature": "history"}, ValueError, "two features"),
        ({"query_dropout": 0.5}, ValueError, "without a `query_table`"),
        ({"dropout": 1.0}, ValueError, r"`dropout` must be in \[0, 1\). Received: dropout=1.0"),
        ({"dropout": float("nan")}, ValueError, r"`dropout` must be in \[0, 1\)"),
        ({"max_length": 0}, ValueError, "`max_length` must be a positive int"),
        ({"mask_zero": 1}, TypeError, "`mask_zero` must be a `bool`"),
        ({"num_heads": 2}, ValueError, '`num_heads` is an argument of `encoder="attention"`'),
        ({"num_blocks": 2, "encoder": "gru"}, ValueError, "`num_blocks`.*for 'gru'"),
        ({"num_heads": 3, "encoder": "attention"}, ValueError, "num_heads=3 for 8 dimensions"),
        ({"num_blocks": 0, "encoder": "attention"}, ValueError, "`num_blocks` must be a positive int"),
    ],
)
def test_arguments_are_checked(kwargs, error, message):
    with pytest.raises(error, match=message):
        HistoryTower(**{"candidate_table": keras.layers.Embedding(ROWS, DIM), "history_feature": "history", **kwargs})


def test_arguments_by_position_are_explained():
    with pytest.raises(TypeError, match=r"`HistoryTower` takes only `candidate_table` and `history_feature`"):
        HistoryTower(keras.layers.Embedding(ROWS, DIM), "history", "gru")


def test_inputs_are_checked():
    tower = tower_of("mean")
    with pytest.raises(TypeError, match=r"'history' must hold ids, as integers. Received: dtype float32"):
        tower(np.ones((2, 3)))
    with pytest.raises(TypeError, match="dtype bool"):
        tower(np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"`\[batch, length\]`.*Received: shape \(3,\)"):
        tower(np.ones(3, "int32"))
    with pytest.raises(ValueError, match=r"\['history'\]. Received: \['films'\], without 'history'"):
        tower({"films": np.ones((2, 3), "int32")})
    with pytest.raises(ValueError, match="without 'history'"):
        HistoryTower(table_of(), "history")({"films": np.ones((2, 3), "int32")})
    with_rows = tower_of("mean", query_table=table_of(num_rows=USERS), query_feature="user")
    with pytest.raises(ValueError, match=r"takes a dict with the features \['history', 'user'\]"):
        with_rows(np.ones((2, 3), "int32"))
    with pytest.raises(ValueError, match=r"'user' must hold one id for each query.*Received: shape \(2, 2\)"):
        with_rows({"history": np.ones((2, 3), "int32"), "user": np.ones((2, 2), "int32")})


# In a model.


def make_model(encoder="mean", table="plain", query_table=True, optimizer=None, **kwargs):
    keras.utils.set_random_seed(0)
    candidates = TABLES[table]()
    own = {}
    if query_table:
        own = {"query_table": keras.layers.Embedding(USERS, DIM, name="user"), "query_feature": "user"}
    tower = HistoryTower(candidates, "history", encoder=encoder, max_length=6, **own, **kwargs)
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), candidates, exclude_ids=[0])
    model = TwoTowerModel(tower, candidates, ["user", "history"] if own else "history", "movie", retrieval=index)
    model.compile(optimizer or keras.optimizers.SGD(0.5))
    return model


def data_of(num_rows, length=5):
    rng = np.random.default_rng(num_rows)
    return {
        "user": rng.integers(1, USERS, num_rows),
        "history": histories(num_rows, length, empty=[0]),
        "movie": rng.integers(1, ROWS, num_rows),
    }


def data_without_movie(data):
    return {name: values for name, values in data.items() if name != "movie"}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_ids_without_a_row_are_refused_in_histories(encoder):
    model = make_model(encoder)
    data = data_of(16)
    model.fit(data, batch_size=16, shuffle=False, verbose=0)
    weights = model.get_weights()
    for wrong in (ROWS, -2, 2**31 - 1):
        bad = {**data, "history": data["history"].copy()}
        bad["history"][5, -1] = wrong
        for call in (
            lambda bad=bad: model.fit(bad, batch_size=16, shuffle=False, verbose=0),
            lambda bad=bad: model.evaluate(bad, batch_size=16, verbose=0),
            lambda bad=bad: model.recommend(data_without_movie(bad)),
        ):
            with pytest.raises(
                ValueError, match=rf"'history' must be in \[0, 23\].*'movie'. Received: {wrong} for row"
            ):
                call()
    bad = {**data, "user": np.where(np.arange(16) == 5, USERS, data["user"])}
    with pytest.raises(ValueError, match=r"'user' must be a whole number in \[0, 10\].*Received: 11 in row 5"):
        model.fit(bad, batch_size=16, shuffle=False, verbose=0)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.slow
def test_ids_are_checked_in_batches_of_every_length():
    model = make_model("attention", mask_zero=True)
    for length in (4, 0, 9, 1, 4):
        data = data_of(8, max(length, 1))
        data["history"] = data["history"][:, :length]
        model.recommend(data_without_movie(data))
        if length:
            data["history"][3, -1] = ROWS
            with pytest.raises(ValueError, match=rf"'history'.*Received: {ROWS} for row 3"):
                model.recommend(data_without_movie(data))
    # Ids before the most recent ones are not used.
    data = data_of(8, 7)
    data["history"][:] = np.arange(1, 8)
    data["history"][3, 0] = ROWS
    model.recommend(data_without_movie(data))


def trained(distribution, encoder, table):
    keras.distribution.set_distribution(distribution)
    model = make_model(encoder, table)
    # 21 rows divide over no number of devices.
    data = data_of(21)
    losses = model.fit(data, epochs=2, batch_size=21, shuffle=False, verbose=0).history["loss"]
    lists = model.recommend(data_without_movie(data))
    return model, (losses, lists.ids, lists.scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "table", "distributions"),
    [
        ("mean", "plain", [lambda: data_parallel(1), lambda: data_parallel(2), lambda: data_parallel(8)]),
        ("gru", "row-sparse", [lambda: data_parallel(2), lambda: model_parallel((2, 4))]),
        ("attention", "plain", [lambda: data_parallel(8), lambda: model_parallel((2, 4))]),
    ],
)
def test_each_distribution_gives_the_results_of_one_device(encoder, table, distributions):
    _, expected = trained(None, encoder, table)
    for distribution in distributions:
        _, results = trained(distribution(), encoder, table)
        for value, right in zip(results, expected, strict=True):
            np.testing.assert_allclose(value, right, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["mean", "gru"])
def test_a_table_that_is_split_over_devices_gives_the_same_results(encoder):
    _, expected = trained(None, encoder, "plain")
    model, results = trained(data_parallel(8), encoder, "split")
    table = model.candidate_tower
    assert {shard.data.shape for shard in table.embeddings.value.addressable_shards} == {(192 // 8, DIM)}
    for value, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(value, right, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "table"), [("mean", "row-sparse"), ("gru", "sharded"), ("attention", "plain")])
def test_a_saved_model_loads_and_trains_on(encoder, table, tmp_path):
    sizes = {"num_blocks": 2, "num_heads": 2} if encoder == "attention" else {}
    model = make_model(encoder, table, mask_zero=True, **sizes)
    data, queries = data_of(16), data_without_movie(data_of(9))
    model.fit(data, shuffle=False, verbose=0)
    model.save(tmp_path / "a.keras")
    model.save_weights(tmp_path / "a.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert loaded.query_tower.candidate_table is loaded.candidate_tower
    same = TwoTowerModel.from_config(model.get_config())
    same.compile(keras.optimizers.SGD(0.5))
    same.evaluate(data, verbose=0)
    assert same.query_tower.candidate_table is same.candidate_tower
    assert len(same.weights) == len(model.weights)
    same.load_weights(tmp_path / "a.weights.h5")
    expected = model.recommend(queries)
    for copy in (loaded, same):
        assert {name: getattr(copy.query_tower, name) for name in PLAIN} == {
            name: getattr(model.query_tower, name) for name in PLAIN
        }
        np.testing.assert_array_equal(copy.recommend(queries).ids, expected.ids)
        np.testing.assert_allclose(copy.recommend(queries).scores, expected.scores, atol=1e-6)
    losses = [each.fit(data, shuffle=False, verbose=0).history["loss"] for each in (model, loaded)]
    np.testing.assert_allclose(*losses, atol=1e-5)


PLAIN = ("history_feature", "query_feature", "query_dropout", "mask_zero", "max_length", "num_blocks", "num_heads",
         "dropout", "encoder_name")  # fmt: skip


def test_a_tower_alone_comes_back_from_its_config():
    tower = tower_of("attention", max_length=7, num_blocks=2, dropout=0.1)
    copy = HistoryTower.from_config(tower.get_config())
    history = histories(4, 3)
    copy(history)
    copy.set_weights(tower.get_weights())
    np.testing.assert_array_equal(numpy_of(copy(history)), numpy_of(tower(history)))
    assert copy.dropout == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["gru", "attention"])
def test_a_row_sparse_table_trains_like_a_dense_one(encoder):
    results = []
    for table in ("plain", "row-sparse"):
        model = make_model(encoder, table)
        losses = model.fit(data_of(40), epochs=3, batch_size=16, shuffle=False, verbose=0).history["loss"]
        results.append((losses, model.candidate_tower.embeddings.numpy()[:ROWS]))
    for value, expected in zip(results[1], results[0], strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


def test_both_tables_may_be_row_sparse():
    candidates = RowSparseEmbedding(ROWS, DIM, LazyAdam(0.01), name="movie")
    users = RowSparseEmbedding(USERS, DIM, LazyAdam(0.01), name="user")
    tower = HistoryTower(candidates, "history", query_table=users, query_feature="user", dropout=0.2)
    model = TwoTowerModel(tower, candidates, ["user", "history"], "movie")
    model.compile("adam")
    losses = model.fit(data_of(32), epochs=10, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert (int(candidates.iterations), int(users.iterations)) == (10, 10)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_mixed_precision_computes_in_bfloat16_and_keeps_ids(encoder):
    keras.config.set_dtype_policy("mixed_bfloat16")
    # bfloat16 has no 257.
    table = keras.layers.Embedding(300, DIM, name="movie")
    tower = HistoryTower(table, "history", encoder=encoder)
    model = TwoTowerModel(tower, table, "history", "movie")
    model.compile("adam")
    history = np.arange(200, 296, 3)[:, None] + np.arange(3)
    model.fit({"history": history, "movie": np.arange(32)}, verbose=0)
    outputs = tower(history)
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert all(variable.dtype == "float32" for variable in tower.trainable_variables)
    other = HistoryTower(table, "history", encoder=tower.encoder)
    first, second = numpy_of(ops.cast(other(np.array([[256], [257]])), "float32"))
    assert (first != second).any()


def test_a_functional_model_may_hold_the_tower():
    tower = tower_of("gru")
    history = keras.Input((None,), dtype="int32")
    model = keras.Model(history, keras.layers.Dense(2)(tower(history)))
    assert model.output_shape == (None, 2)
    for length in (2, 5):
        assert model.predict(histories(4, length), verbose=0).shape == (4, 2)


@pytest.mark.slow
def test_a_new_user_is_served_from_the_history():
    model = make_model("mean", mask_zero=True, optimizer=keras.optimizers.Adam(0.05))
    rng = np.random.default_rng(0)
    # The next film is the one after the last film.
    last = rng.integers(1, ROWS - 1, 400)
    history = np.c_[np.full((400, 2), -1), last]
    model.fit({"user": rng.integers(0, USERS, 400), "history": history, "movie": last + 1}, epochs=30, verbose=0)
    queries = {"user": np.zeros(ROWS - 2, int), "history": np.arange(1, ROWS - 1)[:, None]}
    hits = (model.recommend(queries, k=3).ids == queries["history"] + 1).any(axis=1)
    assert hits.mean() > 0.8
    single = model.recommend({"user": 0, "history": [3, 4]}, k=3)
    assert np.shape(single.ids) == (1, 3)


def test_the_steps_are_compiled_once_for_each_shape():
    model = make_model("attention", dropout=0.1)
    traces = []
    call = model.query_tower.call

    def counting(*args, **kwargs):
        traces.append(1)
        return call(*args, **kwargs)

    object.__setattr__(model.query_tower, "call", counting)
    model.fit(data_of(32), batch_size=16, verbose=0)
    before = len(traces)
    model.fit(data_of(32), batch_size=16, epochs=2, verbose=0)
    assert before
    assert len(traces) == before
