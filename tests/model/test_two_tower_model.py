import functools
import itertools
import re

import jax
import keras
import keras_rs
import numpy as np
import pytest
import reference
import tensorflow as tf
from conftest import DISTRIBUTIONS, data_parallel

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    NDCGAtK,
    RecallAtK,
    ShardedEmbedding,
    StreamingSamplingProbability,
    TwoTowerModel,
    group_candidate_ids,
    shard_candidates,
)

NUM_USERS, NUM_MOVIES, NUM_TOKENS, NUM_ROWS, DIMENSION = 40, 30, 12, 1003, 8
TOKENS = np.random.default_rng(3).integers(0, NUM_TOKENS, (NUM_MOVIES, 4)).astype("int32")
MOVIES = {"movie_id": np.arange(NUM_MOVIES, dtype="int32"), "tokens": TOKENS}


def make_data(num_rows=NUM_ROWS):
    rng = np.random.default_rng(0)
    movies = rng.zipf(1.5, num_rows) % NUM_MOVIES
    return {
        "user_id": rng.integers(0, NUM_USERS, num_rows),
        "age": rng.random(num_rows).astype("float32"),
        "movie_id": movies,
        "tokens": TOKENS[movies],
        "rating": rng.random(num_rows).astype("float32"),
        "seen": rng.integers(-1, NUM_MOVIES, (num_rows, 3)),
        "title": np.array([f"Film {movie}" for movie in movies]),
    }


DATA = make_data()
# Keras on JAX warns at the end of each dataset of unknown length.
RUNS_OUT = pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
USERS = {"user_id": np.arange(NUM_USERS)}


def make_model(label=None, kind=TwoTowerModel, task=None, compiled=True, movie_tower=ShardedEmbedding, **kwargs):
    """Two embeddings. Without `label`, with all options of the in-batch softmax."""
    keras.utils.set_random_seed(1)
    if label is None:
        task = task or DistributedTwoTowerTask(similarity="cosine", temperature=0.2, remove_accidental_hits=True)
        kwargs.setdefault("sampling_probability", StreamingSamplingProbability(NUM_MOVIES))
    model = kind(
        keras.layers.Embedding(NUM_USERS, DIMENSION, name="user"),
        movie_tower(NUM_MOVIES, DIMENSION, name="movie"),
        query_features="user_id",
        candidate_features="movie_id",
        label=label,
        task=task,
        **kwargs,
    )
    if compiled:
        model.compile(
            keras.optimizers.Adam(0.01), metrics=[keras.metrics.RootMeanSquaredError(name="rmse")] if label else None
        )
    return model


@keras.saving.register_keras_serializable(package="tests")
class UserTower(keras.Model):
    """A tower with its own `call`, which looks up an embedding."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(NUM_USERS, DIMENSION, name="user_table")
        self.dense = keras.layers.Dense(DIMENSION)

    def call(self, features, training=False):
        age = keras.ops.expand_dims(features["age"], 1)
        return self.dense(keras.ops.concatenate([self.table(features["user_id"]), age], axis=1))


def make_movie_tower():
    movie, tokens = keras.Input((), dtype="int32", name="movie_id"), keras.Input((4,), dtype="int32", name="tokens")
    words = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(NUM_TOKENS, DIMENSION, name="words")(tokens))
    hidden = keras.layers.Concatenate()([keras.layers.Embedding(NUM_MOVIES, DIMENSION, name="ids")(movie), words])
    hidden = keras.layers.Dropout(0.1)(keras.layers.Dense(DIMENSION, activation="relu")(hidden))
    return keras.Model({"movie_id": movie, "tokens": tokens}, keras.layers.Dense(DIMENSION)(hidden))


def make_deep_model(kind=TwoTowerModel, **kwargs):
    """A query tower with its own `call`, and a functional candidate tower of ids and text."""
    keras.utils.set_random_seed(1)
    tower = make_movie_tower()
    model = kind(
        UserTower(),
        tower,
        query_features=["user_id", "age"],
        candidate_features=["movie_id", "tokens"],
        candidate_id="movie_id",
        retrieval=shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), tower, candidates=MOVIES),
        **kwargs,
    )
    model.compile(keras.optimizers.Adam(0.01))
    return model


def weights_of(model):
    return [weight.numpy() for weight in model.trainable_weights]


def assert_close(results, expected, atol=1e-5):
    for result, value in zip(keras.tree.flatten(results), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(result, value, rtol=0, atol=atol)


# Batches of any size on any number of devices.


def run(label, data=DATA, **fit):
    model = make_model(label)
    history = model.fit(data, batch_size=64, epochs=2, shuffle=False, validation_data=DATA, verbose=0, **fit).history
    scores, ids = model.predict({"user_id": DATA["user_id"]}, batch_size=64, verbose=0)
    return history, model.evaluate(DATA, batch_size=64, verbose=0, return_dict=True), scores, ids


@pytest.fixture(scope="module")
def on_one_device():
    keras.distribution.set_distribution(None)
    return {label: run(label) for label in (None, "rating")}


@pytest.mark.parametrize(
    ("name", "label"),
    [("ModelParallel(2x4)", None), ("DataParallel(3)", "rating")],
)
def test_1003_rows_in_batches_of_64_give_the_results_of_one_device(name, label, on_one_device):
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    history, evaluation, scores, ids = run(label)
    expected_history, expected_evaluation, expected_scores, expected_ids = on_one_device[label]
    assert history.keys() == expected_history.keys()
    assert_close([history[name] for name in sorted(history)], [expected_history[name] for name in sorted(history)])
    assert evaluation.keys() == expected_evaluation.keys()
    assert_close(list(evaluation.values()), list(expected_evaluation.values()))
    assert ids.shape == (NUM_ROWS, 10)
    assert_close(scores, expected_scores)
    np.testing.assert_array_equal(ids, expected_ids)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return -(-NUM_ROWS // 64)

    def __getitem__(self, i):
        return {name: values[64 * i : 64 * (i + 1)] for name, values in DATA.items()}


@RUNS_OUT
@pytest.mark.parametrize("source", ["tf.data", "tf.data of unknown length", "PyDataset"])
def test_datasets_train_like_arrays(source, on_one_device):
    keras.distribution.set_distribution(data_parallel(8))
    dataset = Batches(workers=1) if source == "PyDataset" else tf.data.Dataset.from_tensor_slices(DATA).batch(64)
    if source == "tf.data of unknown length":
        dataset = dataset.filter(lambda batch: True)
    model = make_model()
    history = model.fit(dataset, epochs=2, shuffle=False, verbose=0).history
    assert_close(history["loss"], on_one_device[None][0]["loss"])
    scores, ids = model.predict(dataset, verbose=0)
    assert_close(scores, on_one_device[None][2])
    assert ids.shape == (NUM_ROWS, 10)


@RUNS_OUT
@pytest.mark.parametrize("sizes", [(1,), (5, 0, 3), (0, 7), (64, 1)])
def test_short_and_empty_batches_keep_all_rows(sizes):
    keras.distribution.set_distribution(data_parallel(8))
    starts = np.cumsum([0, *sizes])
    parts = [{"user_id": DATA["user_id"][a:b]} for a, b in itertools.pairwise(starts)]
    spec = {"user_id": tf.TensorSpec((None,), tf.int64)}
    dataset = tf.data.Dataset.from_generator(lambda: iter(parts), output_signature=spec)
    model = make_model()
    _, ids = model.predict(dataset, verbose=0)
    np.testing.assert_array_equal(ids, model.recommend({"user_id": DATA["user_id"][: sum(sizes)]}).ids)


def test_single_batches_need_not_divide_over_the_devices():
    results = []
    for distribution in (None, data_parallel(8)):
        keras.distribution.set_distribution(distribution)
        model = make_model()
        batch = {name: values[:13] for name, values in DATA.items()}
        results.append([model.train_on_batch(batch), model.test_on_batch(batch, return_dict=True)])
        assert model.predict_on_batch({"user_id": DATA["user_id"][:13]})[1].shape == (13, 10)
    assert_close(results[1], results[0])


# Evaluation.


def table_of(tower):
    table = tower.embeddings.numpy()[: tower.input_dim]
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def test_evaluation_ranks_each_positive_in_the_whole_corpus():
    model = make_model(exclude_feature="seen", corpus_metrics=[RecallAtK(3), NDCGAtK(3)])
    model.fit(DATA, epochs=1, verbose=0)
    weights = np.random.default_rng(5).integers(0, 3, NUM_ROWS).astype("float32")
    result = model.evaluate(DATA, sample_weight=weights, batch_size=64, verbose=0, return_dict=True)
    queries, table = table_of(model.query_tower)[DATA["user_id"]], table_of(model.candidate_tower)
    ranks = np.array(reference.ranks(queries, table, DATA["movie_id"], exclude_ids_by_query=DATA["seen"]))
    hits = ranks < 3
    assert result["recall_at_3"] == pytest.approx(np.average(hits, weights=weights), abs=1e-5)
    gains = np.where(hits, 1 / np.log2(ranks + 2.0), 0.0)
    assert result["ndcg_at_3"] == pytest.approx(np.average(gains, weights=weights), abs=1e-5)


def test_only_evaluation_reports_rank_metrics():
    history = make_model().fit(DATA, validation_data=DATA, verbose=0).history
    ranks = {"recall_at_10", "ndcg_at_10", "mean_reciprocal_rank"}
    assert set(history) == {"loss", "val_loss", *(f"val_{name}" for name in ranks)}


def test_label_metrics_ignore_padding():
    keras.distribution.set_distribution(data_parallel(8))
    model = make_model("rating")
    model.fit(DATA, verbose=0)
    result = model.evaluate({name: values[:13] for name, values in DATA.items()}, verbose=0, return_dict=True)
    users, movies = DATA["user_id"][:13], DATA["movie_id"][:13]
    scores = (model.query_tower.embeddings.numpy()[users] * model.candidate_tower.embeddings.numpy()[movies]).sum(1)
    error = np.mean((scores - DATA["rating"][:13]) ** 2)
    assert result["loss"] == pytest.approx(error, abs=1e-6)
    assert result["rmse"] == pytest.approx(np.sqrt(error), abs=1e-6)


def test_labels_may_come_as_y():
    without = {name: values for name, values in DATA.items() if name != "rating"}
    losses = [make_model("rating").fit(DATA, shuffle=False, verbose=0).history["loss"]]
    losses.append(make_model("rating").fit(without, DATA["rating"], shuffle=False, verbose=0).history["loss"])
    assert losses[0] == losses[1]


def test_a_row_of_weight_0_is_absent():
    model = make_model()
    weights = np.ones(64, "float32")
    weights[[0, 10, 63]] = 0.0
    batch = {name: values[:64] for name, values in DATA.items()}
    kept = {name: values[weights > 0] for name, values in batch.items()}
    assert_close(model.test_on_batch(batch, sample_weight=weights), model.test_on_batch(kept))


def test_the_loss_of_an_epoch_is_the_mean_over_rows():
    model = make_model(task=DistributedTwoTowerTask(), sampling_probability=None)
    whole = model.evaluate({name: values[:70] for name, values in DATA.items()}, batch_size=64, verbose=0)
    parts = [{name: values[rows] for name, values in DATA.items()} for rows in (slice(0, 64), slice(64, 70))]
    losses = [model.test_on_batch(part, return_dict=True)["loss"] for part in parts]
    assert whole[0] == pytest.approx((64 * losses[0] + 6 * losses[1]) / 70, abs=1e-5)


def test_queries_with_several_positives_count_once():
    model = make_model()
    model.fit(DATA, verbose=0)
    rng = np.random.default_rng(2)
    positives = [rng.choice(NUM_MOVIES, size=rng.integers(0, 4), replace=False) for _ in range(NUM_USERS)]
    seen = [np.setdiff1d(rng.integers(0, NUM_MOVIES, 5), own)[:2] for own in positives]
    pairs = [(user, movie) for user, own in enumerate(positives) for movie in own]
    rows = group_candidate_ids(*zip(*pairs, strict=True), queries=USERS["user_id"])
    pairs_seen = [(user, movie) for user, own in enumerate(seen) for movie in own]
    excluded = group_candidate_ids(*zip(*pairs_seen, strict=True), queries=USERS["user_id"])
    result = model.evaluate_queries(USERS, rows, excluded, metrics=[RecallAtK(4), NDCGAtK(4)])
    queries, table = table_of(model.query_tower), table_of(model.candidate_tower)
    recalls, gains = [], []
    for user in range(NUM_USERS):
        if not len(positives[user]):
            continue
        scores = table @ queries[user]
        scores[seen[user]] = -np.inf
        hits = np.isin(np.argsort(-scores)[:4], positives[user])
        recalls.append(hits.sum() / len(positives[user]))
        discounts = 1 / np.log2(np.arange(2, 6))
        gains.append((hits * discounts).sum() / discounts[: len(positives[user])].sum())
    assert result == pytest.approx({"recall_at_4": np.mean(recalls), "ndcg_at_4": np.mean(gains)}, abs=1e-5)


def test_an_evaluation_makes_no_more_products_than_it_needs():
    """It computes the logits of the batch and the scores of the corpus once each."""
    model = make_model(movie_tower=keras.layers.Embedding)
    model.fit(DATA, verbose=0)
    batch = {name: DATA[name][:64].astype("int32") for name in ("user_id", "movie_id")}
    state = model._get_jax_state(trainable_variables=True, non_trainable_variables=True, metrics_variables=True)
    compiled = jax.jit(model.test_step).lower(state, (batch, None, np.ones(64, "float32"))).compile()
    flops = sum(
        2 * 64 * int(columns) * DIMENSION
        for columns in re.findall(r"f32\[(?:64,)?(\d+)(?:,64)?\]\S* dot\(", compiled.as_text())
    )
    assert 0 < flops <= 2 * 2 * 64 * (64 + NUM_MOVIES) * DIMENSION


# Retrieval.


def test_predictions_need_only_query_features():
    model = make_model()
    expected = model.predict(USERS, verbose=0)
    assert_close(model.predict({**USERS, "movie_id": np.full(NUM_USERS, 99)}, verbose=0), expected)
    assert_close(model(USERS), expected)
    assert [output.shape for output in expected] == [(NUM_USERS, 10)] * 2


def test_predictions_exclude_the_ids_of_the_exclude_feature():
    model = make_model(exclude_feature="seen")
    seen = np.tile(np.arange(10, dtype="int32"), (NUM_USERS, 1))
    assert model.predict({**USERS, "seen": seen}, verbose=0)[1].min() == 10
    assert model.recommend({**USERS, "seen": seen}).ids.min() == 10
    assert model.recommend({**USERS, "seen": seen}, exclude_ids=seen + 10).ids.min() == 0


@pytest.mark.parametrize("name", ["1 device", "ModelParallel(2x4)"])
def test_recommendations_are_the_best_candidates_that_are_not_excluded(name):
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    model = make_model()
    model.fit(DATA, verbose=0)
    excluded = np.random.default_rng(0).integers(-1, NUM_MOVIES, (NUM_USERS, 6))
    ids, scores = model.recommend(USERS, k=7, exclude_ids=excluded)
    assert (type(ids), ids.dtype, type(scores), scores.dtype) == (np.ndarray, np.int32, np.ndarray, np.float32)
    expected_scores, expected_ids = reference.top_k(
        table_of(model.query_tower), table_of(model.candidate_tower), 7, exclude_ids_by_query=excluded
    )
    np.testing.assert_array_equal(ids, expected_ids)
    assert_close(scores, expected_scores)


@pytest.mark.parametrize("num_queries", [0, 1])
def test_recommendations_for_zero_queries_and_for_one(num_queries):
    ids, scores = make_model().recommend({"user_id": np.arange(num_queries)}, k=3)
    assert ids.shape == scores.shape == (num_queries, 3)


def test_recommendations_do_not_change_the_k_of_the_index():
    model = make_model()
    model.recommend(USERS, k=3)
    assert model.predict(USERS, verbose=0)[1].shape == (NUM_USERS, 10)


# Towers of any kind.


@pytest.fixture
def deep_model():
    model = make_deep_model()
    model.fit(DATA, batch_size=64, validation_data=DATA, verbose=0)
    return model


def fresh_scores(model, features):
    return keras.ops.convert_to_numpy(
        keras.ops.matmul(model.query_tower(features), keras.ops.transpose(model.candidate_tower(MOVIES)))
    )


PEOPLE = {"user_id": np.arange(NUM_USERS, dtype="int32"), "age": np.linspace(0, 1, NUM_USERS, dtype="float32")}


def test_a_stale_index_is_refreshed_before_use(deep_model):
    def best():
        return np.sort(fresh_scores(deep_model, PEOPLE), axis=1)[:, ::-1][:, :5]

    assert_close(deep_model.predict(PEOPLE, verbose=0)[0], best(), 1e-4)
    deep_model.train_on_batch({name: values[:16] for name, values in DATA.items()})
    assert_close(deep_model.recommend(PEOPLE).scores, best(), 1e-4)
    kernel = deep_model.candidate_tower.layers[-1].kernel
    kernel.assign(-3.0 * kernel)
    assert_close(deep_model.predict_on_batch(PEOPLE)[0], best(), 1e-4)
    kernel.assign(2.0 * kernel)
    ranks = [np.flatnonzero(np.argsort(-row) == 4)[0] for row in fresh_scores(deep_model, PEOPLE)]
    value = deep_model.evaluate_queries(PEOPLE, np.full((NUM_USERS, 1), 4), metrics=[RecallAtK(3)])["recall_at_3"]
    assert value == pytest.approx(np.mean(np.array(ranks) < 3))


def test_the_index_is_fresh_in_validation():
    model = make_deep_model()
    last = {}

    class Noting(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            last["table"] = model.retrieval.candidate_embeddings.numpy()
            last["tower"] = keras.ops.convert_to_numpy(model.candidate_tower(MOVIES))

    model.fit(DATA, batch_size=64, epochs=2, validation_data=DATA, verbose=0, callbacks=[Noting()])
    assert_close(last["table"], last["tower"])


def test_a_current_index_is_not_refreshed(deep_model, monkeypatch):
    deep_model.recommend(PEOPLE)
    monkeypatch.setattr(deep_model.retrieval, "refresh", lambda: pytest.fail("refreshed"))
    deep_model.recommend(PEOPLE)
    deep_model.evaluate(DATA, verbose=0)
    deep_model.predict(PEOPLE, verbose=0)


def test_a_deep_model_is_saved_with_a_fresh_index_and_trains_after_loading(deep_model, tmp_path):
    path = tmp_path / "model.keras"
    # The tower changes after the last refresh of the index.
    deep_model.train_on_batch({name: values[:16] for name, values in DATA.items()})
    deep_model.save(path)
    loaded = keras.models.load_model(path)
    expected = deep_model.recommend(PEOPLE)
    result = loaded.recommend(PEOPLE)
    np.testing.assert_array_equal(result.ids, expected.ids)
    assert_close(result.scores, expected.scores, 1e-6)
    loaded.fit(DATA, verbose=0)
    with pytest.raises(
        ValueError, match=r"Received: a stale index. Pass them: `model.retrieval.refresh\(candidates\)`"
    ):
        loaded.recommend(PEOPLE)
    # The model can still be saved, and the file records that its index is stale.
    loaded.save(path)
    again = keras.models.load_model(path)
    with pytest.raises(ValueError, match="a stale index"):
        again.predict(PEOPLE, verbose=0)
    again.retrieval.refresh(MOVIES)
    scores = np.sort(fresh_scores(loaded, PEOPLE), axis=1)[:, ::-1][:, :5]
    assert_close(again.recommend(PEOPLE).scores, scores, 1e-4)


@pytest.mark.parametrize("label", [None, "rating"])
@pytest.mark.parametrize("name", ["1 device", "DataParallel(8)"])
def test_a_loaded_model_continues_training_as_if_never_saved(name, label, tmp_path):
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    model = make_model(label)
    model.fit(DATA, batch_size=64, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(DATA, batch_size=64, shuffle=False, verbose=0)
    assert_close(weights_of(loaded), weights_of(model), 1e-6)
    assert loaded.metrics_names == model.metrics_names
    assert loaded.get_config().keys() == model.get_config().keys()
    assert loaded.task.get_config() == model.task.get_config()


def test_towers_may_compute_in_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = make_model()
    losses = model.fit(DATA, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert model.recommend(USERS).scores.dtype == np.float32


def test_a_model_without_an_index_trains_but_cannot_retrieve():
    tower = keras.Sequential([keras.layers.Embedding(NUM_MOVIES, 4), keras.layers.Dense(4)])
    model = TwoTowerModel(keras.layers.Embedding(NUM_USERS, 4), tower, "user_id", "movie_id")
    model.compile("adam")
    assert set(model.fit(DATA, validation_data=DATA, verbose=0).history) == {"loss", "val_loss"}
    with pytest.raises(
        ValueError,
        match=r"Retrieval needs an index. Received: a model without one.* Pass `retrieval=shard_candidates\(",
    ):
        model.recommend(USERS)


def test_an_index_with_its_own_candidate_ids():
    """Film ids are 1000, 1003, ... in the data, and row numbers in the tower."""
    ids = np.arange(NUM_MOVIES) * 3 + 1000
    tower = keras.layers.Embedding(NUM_MOVIES, DIMENSION)
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), tower, candidate_ids=ids)
    arguments = (keras.layers.Embedding(NUM_USERS, DIMENSION), tower, "user_id", "movie_id")
    with pytest.raises(
        ValueError, match=r"the feature that holds them. Received: candidate_id=None. Set `candidate_id`"
    ):
        TwoTowerModel(*arguments, retrieval=index)
    model = TwoTowerModel(*arguments, retrieval=index, candidate_id="catalogue_id")
    model.compile("adam")
    data = {**DATA, "catalogue_id": ids[DATA["movie_id"]]}
    assert model.fit(data, validation_data=data, verbose=0).history["val_recall_at_5"][0] > 0
    assert set(model.recommend(USERS).ids.flat) <= set(ids)
    with pytest.raises(ValueError, match=r"'catalogue_id' must be one of the 30 ids .* Received: 1001"):
        model.fit({**data, "catalogue_id": np.full(NUM_ROWS, 1001)}, verbose=0)


# Customization.


def test_the_sampling_probability_does_not_count_padding():
    keras.distribution.set_distribution(data_parallel(8))
    model = make_model(sampling_probability=StreamingSamplingProbability(NUM_MOVIES, window=1e9))
    model.fit(DATA, batch_size=60, verbose=0)
    expected = np.bincount(DATA["movie_id"], minlength=NUM_MOVIES) / NUM_ROWS
    before = model.sampling_probability(np.arange(NUM_MOVIES))
    assert_close(before, expected)
    model.evaluate({name: values[:20] for name, values in DATA.items()}, verbose=0)
    assert_close(model.sampling_probability(np.arange(NUM_MOVIES)), before, 0)


def test_losses_added_by_layers_are_included():
    keras.utils.set_random_seed(1)
    towers = [keras.layers.Embedding(rows, 4, embeddings_regularizer="l2") for rows in (NUM_USERS, NUM_MOVIES)]
    model = TwoTowerModel(*towers, "user_id", "movie_id", label="rating")
    model.compile("adam")
    loss = model.test_on_batch(DATA, return_dict=True)["loss"]
    tables = [tower.embeddings.numpy() for tower in towers]
    scores = (tables[0][DATA["user_id"]] * tables[1][DATA["movie_id"]]).sum(axis=1)
    expected = np.mean((scores - DATA["rating"]) ** 2) + 0.01 * sum((table**2).sum() for table in tables)
    assert loss == pytest.approx(expected, abs=1e-5)


class OwnSteps(TwoTowerModel):
    """Overrides the methods that the Keras guides override."""

    def train_step(self, state, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        assert set(x) >= {"user_id", "movie_id", "rating"}
        logs, state = super().train_step(state, (x, y, sample_weight))
        return {**logs, "own": logs["loss"] * 0 + 7.0}, state

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 2.0 * super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "rows": keras.ops.sum(sample_weight)}


def test_steps_losses_and_metrics_can_be_overridden():
    keras.distribution.set_distribution(data_parallel(8))
    data = {name: values[:20] for name, values in DATA.items()}
    plain = make_model().fit(data, validation_data=data, shuffle=False, verbose=0).history
    own = make_model(kind=OwnSteps).fit(data, validation_data=data, shuffle=False, verbose=0).history
    assert own["loss"][0] == pytest.approx(2 * plain["loss"][0], abs=1e-5)
    assert own["own"] == [7.0]
    assert own["rows"] == own["val_rows"] == [20.0]
    assert "val_recall_at_10" in own


def test_eager_and_grouped_steps_give_the_same_results():
    data = {name: values[:40] for name, values in DATA.items()}
    histories, tables = [], []
    for arguments in ({}, {"run_eagerly": True}, {"steps_per_execution": 3}):
        model = make_model(compiled=False)
        model.compile(keras.optimizers.SGD(0.1), **arguments)
        histories.append(model.fit(data, batch_size=20, shuffle=False, verbose=0).history)
        tables.append(model.candidate_tower.embeddings.numpy())
    for history, table in zip(histories[1:], tables[1:], strict=True):
        assert_close(list(history.values()), list(histories[0].values()))
        assert_close(table, tables[0])


def test_validation_split_holds_out_a_part_of_the_data():
    history = make_model().fit(DATA, validation_split=0.2, verbose=0).history
    assert history["val_recall_at_10"][0] > 0


# Errors.


def broken(name, value, row):
    values = DATA[name].astype("int64" if isinstance(value, int) else "float64")
    values[row] = value
    return {**DATA, name: values}


FAULTS = {
    "user out of range": (
        "user_id",
        NUM_USERS,
        r"'user_id' must be a whole number in \[0, 39\], the rows of 'user_table'. Received: 40",
    ),
    "negative user": ("user_id", -1, r"'user_id' must be a whole number in \[0, 39\].*Received: -1"),
    "movie out of range": ("movie_id", NUM_MOVIES, r"'movie_id' must be a whole number in \[0, 29\].*Received: 30"),
    "movie that wraps": ("movie_id", 2**32 + 1, r"'movie_id' must be a whole number in .*Received: 4294967297"),
    "token out of range": (
        "tokens",
        NUM_TOKENS,
        r"'tokens' must be a whole number in \[0, 11\], the rows of 'words'. Received: 12",
    ),
    "fraction": ("movie_id", 2.5, r"'movie_id' must be a whole number in .*Received: 2.5"),
    "infinity": ("age", np.inf, r"'age' must hold finite numbers. Received: inf"),
    "NaN": ("age", np.nan, r"'age' must hold finite numbers. Received: nan"),
}
OTHER_FAULTS = {
    "no age": ({name: values for name, values in DATA.items() if name != "age"}, "without 'age'"),
    "strings": ({**DATA, "user_id": DATA["user_id"].astype(str)}, "'user_id' must hold numbers"),
    "empty": ({name: values[:0] for name, values in DATA.items()}, "at least one batch"),
}


@pytest.mark.parametrize("name", ["1 device", "DataParallel(8)"])
def test_bad_data_raises_and_keeps_the_weights(name):
    """In the first batch and in a later one, with and without a preceding validation."""
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    model = make_deep_model()
    model.fit(DATA, batch_size=64, validation_data=DATA, verbose=0)
    bad = [
        (broken(feature, value, 2), message + ".* in row 2 of batch 0") for feature, value, message in FAULTS.values()
    ]
    bad += [(broken("user_id", -1, 500), "in row 52 of batch 7"), *OTHER_FAULTS.values()]
    for data, message in bad:
        before = weights_of(model)
        for method in (model.fit, model.evaluate):
            with pytest.raises(ValueError, match=message):
                method(data, batch_size=64, verbose=0, **({"shuffle": False} if method == model.fit else {}))
        if "batch 7" not in message:
            assert_close(weights_of(model), before, 0.0)
        assert all(np.isfinite(weight).all() for weight in weights_of(model))
    assert np.isfinite(model.evaluate(DATA, batch_size=64, verbose=0)[0])


@pytest.mark.parametrize("fault", [*FAULTS, *OTHER_FAULTS])
def test_bad_data_raises_before_the_model_is_built(fault):
    if fault in FAULTS:
        feature, value, message = FAULTS[fault]
        data = broken(feature, value, 2)
    else:
        data, message = OTHER_FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        make_deep_model().fit(data, batch_size=64, shuffle=False, verbose=0)


def test_bad_data_in_the_first_batch_changes_no_weight():
    model = make_model()
    model.fit(DATA, validation_data=DATA, verbose=0)
    before = weights_of(model)
    fit = functools.partial(model.fit, shuffle=False)
    for call in (fit, model.evaluate, model.predict, model.recommend, model.train_on_batch):
        with pytest.raises(ValueError, match="'user_id' must be a whole number in"):
            call(broken("user_id", 99, 0))
    assert_close(weights_of(model), before, 0.0)


@RUNS_OUT
def test_a_failing_dataset_keeps_the_weights():
    """Also in the second epoch, after a validation, when Keras holds no copy of the weights."""

    def batches():
        batches.epoch += 1
        if batches.epoch == 3:
            raise OSError("the disk is gone")
        yield {name: DATA[name][:64] for name in ("user_id", "movie_id")}

    batches.epoch = 0
    spec = {name: tf.TensorSpec((None,), tf.int64) for name in ("user_id", "movie_id")}
    dataset = tf.data.Dataset.from_generator(batches, output_signature=spec)
    model = make_model()
    model.predict(USERS, verbose=0)
    with pytest.raises(tf.errors.UnknownError, match="the disk is gone"):
        model.fit(dataset, epochs=4, validation_data=DATA, verbose=0)
    assert all(np.isfinite(weight).all() for weight in weights_of(model))
    model.fit(DATA, verbose=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_labels_and_weights_must_be_finite(value):
    bad = np.ones(NUM_ROWS)
    bad[5] = value
    without = {name: values for name, values in DATA.items() if name != "rating"}
    model = make_model("rating")
    for name, arguments in (("y", (bad, None)), ("sample_weight", (np.ones(NUM_ROWS), bad))):
        y, sample_weight = arguments
        for call in (functools.partial(model.fit, shuffle=False), model.evaluate, model.train_on_batch):
            with pytest.raises(
                ValueError, match=f"`{name}` must hold finite numbers. Received: .* in row 5 of batch 0"
            ):
                call(without, y, sample_weight=sample_weight)
    assert np.isfinite(model.fit(without, np.ones((NUM_ROWS, 1)), verbose=0).history["loss"][0])


def test_class_weight_weighs_the_classes_of_y():
    labels = np.arange(NUM_ROWS) % 2
    without = {name: values for name, values in DATA.items() if name != "rating"}
    weights = {0: 1.0, 1: 3.0}
    losses = [make_model("rating").fit(without, labels, class_weight=weights, shuffle=False, verbose=0).history["loss"]]
    weighted = make_model("rating").fit(without, labels, sample_weight=1.0 + 2.0 * labels, shuffle=False, verbose=0)
    assert losses[0] == pytest.approx(weighted.history["loss"])
    with pytest.raises(
        ValueError, match=r"`class_weight` weighs the classes of `y`. Received: `class_weight`, and y=None"
    ):
        make_model().fit(DATA, class_weight=weights)


def test_an_unbatched_dataset_raises():
    with pytest.raises(ValueError, match="Batch the dataset first"):
        make_model().fit(tf.data.Dataset.from_tensor_slices(DATA), verbose=0)


def test_lists_are_accepted_as_arrays():
    model = make_model()
    np.testing.assert_array_equal(model.recommend({"user_id": [3, 4]}).ids, model.recommend(USERS).ids[3:5])
    rows = {name: DATA[name][:13].tolist() for name in ("user_id", "movie_id")}
    batch = {name: values[:13] for name, values in DATA.items()}
    losses = [model.evaluate(data, sample_weight=[1.0] * 13, verbose=0)[0] for data in (rows, batch)]
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built:UserWarning")
def test_an_unbuilt_model_can_be_saved(tmp_path):
    make_model().save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(DATA, verbose=0)
    assert loaded.recommend(USERS).ids.shape == (NUM_USERS, 10)


def test_the_index_of_a_clone_belongs_to_the_clones_tower():
    for model in (make_model(), make_deep_model()):
        model({name: values[:8] for name, values in DATA.items() if name != "title"})
        clone = keras.models.clone_model(model)
        assert clone.retrieval.candidate_tower is clone.candidate_tower
        assert clone.candidate_tower is not model.candidate_tower


def test_an_index_that_is_assigned_later_is_the_one_that_is_refreshed():
    model = make_deep_model()
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), model.candidate_tower, candidates=MOVIES)
    # Keras goes on to track the old index, and expects it to be built.
    model.retrieval(np.zeros((1, DIMENSION), "float32"))
    model.retrieval = index
    model.candidate_tower.set_weights([2 * weight for weight in model.candidate_tower.get_weights()])
    model.evaluate(DATA, verbose=0)
    np.testing.assert_allclose(index.candidate_embeddings, model.candidate_tower(MOVIES), rtol=1e-5)


def test_a_loaded_model_that_cannot_validate_raises_before_training(deep_model, tmp_path):
    deep_model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="To validate while the candidate tower is trained"):
        loaded.fit(DATA, validation_data=DATA, verbose=0)
    loaded.retrieval.refresh(MOVIES)
    loaded.fit(DATA, validation_data=DATA, batch_size=512, verbose=0)


def test_labels_need_a_name():
    with pytest.raises(ValueError, match=r"A model without `label`.*Received: `y`"):
        make_model().fit(DATA, DATA["rating"], verbose=0)
    with pytest.raises(ValueError, match="the feature 'rating' and `y`"):
        make_model("rating").fit(DATA, DATA["rating"], verbose=0)


def test_batches_must_be_dicts():
    with pytest.raises(TypeError, match="A batch must be a dict of features"):
        make_model().fit(DATA["user_id"], verbose=0)


@pytest.mark.parametrize("name", ["1 device", "DataParallel(8)"])
def test_a_loss_that_is_not_finite_raises(name):
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    model = make_model("rating", compiled=False)
    model.compile(keras.optimizers.SGD(1e30))
    with pytest.raises(ValueError, match=r"The loss must be finite. Received: loss=(nan|inf) in epoch 1; .* rows of"):
        model.fit(DATA, epochs=5, verbose=0)
    assert len(model.history.epoch) == 1


def test_checks_can_be_switched_off():
    model = make_model(check_inputs=False)
    assert np.isnan(model.fit(broken("user_id", NUM_USERS, 500), verbose=0).history["loss"][0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"label": "rating", "sampling_probability": StreamingSamplingProbability(20)}, ValueError, "no negatives"),
        ({"label": "rating", "task": DistributedTwoTowerTask(num_hard_negatives=3)}, ValueError, "no negatives"),
        (
            {"corpus_metrics": [RecallAtK(3), RecallAtK(3)]},
            ValueError,
            r"must have different names. Received: \['recall_at_3', 'recall_at_3'\]",
        ),
        ({"query_tower": "user"}, TypeError, "`query_tower` must be a `Layer`"),
        ({"query_features": []}, TypeError, "`query_features` must be the name of a feature"),
        ({"query_features": 3}, TypeError, "`query_features` must be"),
        ({"task": keras.losses.MeanSquaredError()}, TypeError, "`task` must be a `DistributedTwoTowerTask`"),
        ({"retrieval": 10}, TypeError, "`retrieval` must be a `BruteForceRetrieval`"),
        ({"corpus_metrics": [keras.metrics.Mean()]}, TypeError, "`corpus_metrics` must be a `RankMetric`"),
        ({"sampling_probability": [0.5]}, TypeError, "`sampling_probability` must be"),
        (
            {"task": DistributedTwoTowerTask(keras.losses.MeanSquaredError(reduction=None))},
            ValueError,
            "must be a scalar. Received: MeanSquaredError without a reduction. Set `reduction=",
        ),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    given = {
        "query_tower": keras.layers.Embedding(3, 4),
        "candidate_tower": keras.layers.Embedding(20, 4),
        "query_features": "user_id",
        "candidate_features": "movie_id",
        **arguments,
    }
    with pytest.raises(error, match=message):
        TwoTowerModel(**given)


def test_the_index_must_match_the_tower_and_the_similarity():
    users, movies = keras.layers.Embedding(3, 4), keras.layers.Embedding(20, 4)
    other = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), keras.layers.Embedding(20, 4))
    with pytest.raises(
        ValueError, match=r"must belong to the candidate tower of the model. Received: an index of .* Pass the same"
    ):
        TwoTowerModel(users, movies, "user_id", "movie_id", retrieval=other)
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), movies, similarity="cosine")
    with pytest.raises(
        ValueError,
        match=r"the similarity of the task. Received: similarity='cosine' in the index and 'dot' in the task",
    ):
        TwoTowerModel(users, movies, "user_id", "movie_id", retrieval=index, task=DistributedTwoTowerTask())


def test_the_default_task_takes_its_similarity_from_the_index(rng):
    users, movies = keras.layers.Embedding(3, 4), keras.layers.Embedding(20, 4)
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=20, return_scores=True), movies, similarity="biased_cosine"
    )
    model = TwoTowerModel(users, movies, "user_id", "movie_id", retrieval=index)
    assert (model.task.similarity, model.task.temperature) == ("biased_cosine", 0.2)
    assert model.sampling_probability.num_candidates == 20
    model.compile(keras.optimizers.Adam(0.01))
    data = {"user_id": rng.integers(0, 3, 64), "movie_id": rng.integers(0, 20, 64)}
    model.score(data)
    before = [np.array(table.embeddings) for table in (users, movies)]
    model.fit(data, verbose=0)
    changes = [np.abs(table.embeddings - each).max(axis=0) for table, each in zip((users, movies), before, strict=True)]
    # The bias of a user has no effect.
    np.testing.assert_array_equal(np.asarray(changes) > 0, [[True, True, True, False], [True, True, True, True]])
    recommended = model.recommend({"user_id": [2]})
    scores = model.score({"user_id": np.full(20, 2), "movie_id": recommended.ids[0]})
    np.testing.assert_allclose(scores, recommended.scores[0], rtol=1e-5)


def test_options_that_need_candidate_ids_require_candidate_id():
    towers = keras.layers.Embedding(3, 4), keras.Sequential([keras.layers.Embedding(20, 4)])
    with pytest.raises(ValueError, match=r"`remove_accidental_hits` needs candidate ids. Received: candidate_id=None"):
        TwoTowerModel(*towers, "user_id", "movie_id", task=DistributedTwoTowerTask(remove_accidental_hits=True))
    with pytest.raises(ValueError, match=r"`sampling_probability` needs candidate ids. Received: candidate_id=None"):
        TwoTowerModel(*towers, "user_id", "movie_id", sampling_probability=StreamingSamplingProbability(20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "mse"}, "The task defines the loss. Received: a loss in `compile`"),
        ({"metrics": ["mae"]}, "metrics for a model without `label`"),
        ({"metrics": [RecallAtK(3)]}, "Received: a rank metric"),
    ],
)
def test_invalid_compile_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().compile("adam", **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "`k` must be a positive int"),
        ({"k": NUM_MOVIES + 1}, ValueError, "Received: k=31 for 30 candidates"),
        ({"exclude_ids": np.zeros((3, 2), int)}, ValueError, r"needs a row for each query. Received: shape \(3, 2\)"),
        ({"exclude_ids": np.zeros((NUM_USERS, 2))}, TypeError, "`exclude_ids` must be integers"),
    ],
)
def test_invalid_recommend_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        make_model().recommend(USERS, **arguments)


def test_positive_ids_are_checked_and_deduplicated():
    model = make_model()
    with pytest.raises(ValueError, match="needs a row for each query"):
        model.evaluate_queries(USERS, np.zeros((3, 1), int))
    twice = np.tile([3, 5, 3], (NUM_USERS, 1))
    assert model.evaluate_queries(USERS, twice) == model.evaluate_queries(USERS, twice[:, :2])
    with pytest.raises(ValueError, match="at least one positive"):
        model.evaluate_queries(USERS, np.full((NUM_USERS, 1), -1))
    with pytest.raises(ValueError, match="Received: 30 in row 4"):
        model.evaluate_queries(USERS, np.where(np.arange(NUM_USERS) == 4, 30, 0)[:, None])
