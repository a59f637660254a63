"""Features as users have them: DataFrames and other columns, names in a list, features that both towers use."""

import keras
import keras_rs
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import DistributedTwoTowerTask, RecallAtK, TwoTowerModel, pad_batches, shard_candidates

pytestmark = pytest.mark.slow

pandas = pytest.importorskip("pandas")

USERS, MOVIES = np.arange(96) % 20, np.arange(96) % 12


def embedding(rows=20):
    return keras.layers.Embedding(rows, 8)


def make_model(query_features="user", candidate_features="movie", towers=None, **kwargs):
    query_tower, candidate_tower = towers or (embedding(), embedding(12))
    model = TwoTowerModel(query_tower, candidate_tower, query_features, candidate_features, **kwargs)
    model.compile("adam")
    return model


def frame(**columns):
    return pandas.DataFrame({"user": USERS, "movie": MOVIES, **columns})


UNUSED = {
    "str": [f"title {movie}" for movie in MOVIES],
    "category": pandas.Series(MOVIES).map(str).astype("category"),
    "Int64 with gaps": pandas.Series([None, *MOVIES[1:]], dtype="Int64"),
    "datetime": np.arange(96).astype("M8[s]"),
    "lists": [[1] * (movie % 3) for movie in MOVIES],
    "dicts": [{"a": 1}] * 96,
}

DATA = {
    "arrays": lambda: {"user": USERS, "movie": MOVIES},
    "frame": frame,
    "series": lambda: dict(frame()),
    "Int64": lambda: frame().astype("Int64"),
    "lists": lambda: frame().to_dict("list"),
    "tuples": lambda: {"user": tuple(USERS), "movie": tuple(MOVIES)},
    "ranges": lambda: {"user": USERS, "movie": MOVIES, "row": range(96)},
    "objects": lambda: {"user": USERS.astype(object), "movie": MOVIES.astype(object)},
    "[n, 1]": lambda: {"user": USERS[:, None], "movie": MOVIES[:, None]},
    "unused columns": lambda: frame(**UNUSED),
    "unused columns as arrays": lambda: {"user": USERS, "movie": MOVIES, "title": np.array(UNUSED["str"])},
}


def results(data):
    keras.utils.set_random_seed(0)
    model = make_model()
    losses = model.fit(data, shuffle=False, validation_split=0.5, verbose=0).history
    lists = [model.predict(data, verbose=0)[1], model.recommend({"user": data["user"]}).ids]
    return losses, lists, model.train_on_batch(data)


@pytest.fixture(scope="module")
def of_arrays():
    return results(DATA["arrays"]())


@pytest.mark.parametrize("name", [name for name in DATA if name != "arrays"])
def test_columns_of_any_form_give_the_results_of_arrays(name, of_arrays):
    for value, expected in zip(keras.tree.flatten(results(DATA[name]())), keras.tree.flatten(of_arrays), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)


class Frames(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, number):
        return dict(frame(**UNUSED)[32 * number : 32 * number + 32])


@pytest.mark.parametrize("source", [Frames, lambda: pad_batches(frame(), batch_size=32)])
def test_frames_come_in_batches(source):
    def table(*data, **kwargs):
        keras.utils.set_random_seed(0)
        model = make_model()
        model.fit(*data, shuffle=False, verbose=0, **kwargs)
        return model.query_tower.embeddings.numpy()

    np.testing.assert_allclose(table(source()), table(DATA["arrays"](), batch_size=32), atol=1e-6)


@pytest.mark.parametrize("make", [pandas.Series, pandas.DataFrame, list, lambda x: x[:, None], lambda x: x])
def test_labels_and_weights_come_in_any_form(make):
    labels, weights = (MOVIES % 5).astype("float32"), (MOVIES % 3).astype("float32")

    def loss(y, sample_weight):
        keras.utils.set_random_seed(0)
        model = make_model(label="rating")
        model.fit(frame(), y, sample_weight=sample_weight, shuffle=False, verbose=0)
        return model.evaluate(frame(), y, sample_weight=sample_weight, verbose=0)

    np.testing.assert_allclose(loss(make(labels), make(weights)), loss(labels, weights), atol=1e-6)


FAULTS = {
    "missing": ({"user": pandas.Series([None, *USERS[1:]], dtype="Int64")}, "'user'.*missing value in row 0"),
    "strings": ({"user": [f"u{user}" for user in USERS]}, "'user' must hold numbers.*StringLookup"),
    "category": ({"user": pandas.Series(USERS).astype("category")}, "'user' must hold numbers.*category.*cat.codes"),
    "datetime": ({"user": USERS.astype("M8[s]")}, "'user' must hold numbers.*datetime.*astype"),
    "ragged": ({"user": [[1] * (1 + user % 2) for user in USERS]}, "'user' must have rows of equal length.*Pad"),
    "scalar": ({"user": 3}, "'user' must have a row for each example.*single value 3"),
    "lengths": ({"user": USERS[:-1]}, "lengths"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_columns_that_a_tower_cannot_use_are_named(name):
    fault, message = FAULTS[name]
    model = make_model()
    model.fit(frame(), verbose=0)
    weights = [weight.numpy() for weight in model.weights]
    for call in (model.fit, model.evaluate, model.train_on_batch, model.test_on_batch):
        with pytest.raises(ValueError, match=message):
            call({"movie": MOVIES, **fault})
    if name != "lengths":
        for call in (model.predict, model.predict_on_batch):
            with pytest.raises(ValueError, match=message):
                call(fault)
    for before, after in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(after, before)


def test_weights_must_be_one_array_that_is_not_negative():
    model = make_model()
    with pytest.raises(TypeError, match=r"`sample_weight` must be one array.*dict with the keys \['user'\]"):
        model.fit(frame(), sample_weight={"user": np.ones(96)}, verbose=0)
    for call in (model.fit, model.evaluate, model.train_on_batch):
        with pytest.raises(ValueError, match=r"`sample_weight` must not be negative. Received: -1.0 in row"):
            call(frame(), sample_weight=np.where(USERS == 3, -1.0, 1.0))


class Names(keras.layers.Layer):
    """Notes the names of the features that it receives."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding()

    def build(self, input_shape):
        self.embedding.build(input_shape["user"])

    def call(self, features):
        assert isinstance(features, dict)
        return self.embedding(features["user"])


def test_a_list_of_features_always_gives_a_dict(tmp_path):
    keras.saving.register_keras_serializable("tests")(Names)
    model = make_model(["user"], towers=(Names(), embedding(12)))
    model.fit(frame(), verbose=0)
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert loaded.query_features == ["user"]
    assert loaded.candidate_features == "movie"
    np.testing.assert_array_equal(loaded.recommend({"user": USERS}).ids, model.recommend({"user": USERS}).ids)
    with pytest.raises(ValueError, match=r"An embedding takes one feature.*'user'"):
        make_model(["user"])


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_a_tower_must_return_one_tensor(kind):
    class Tower(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embedding = embedding()

        def call(self, ids):
            return [self.embedding(ids)] if kind == "list" else {"embeddings": self.embedding(ids)}

    with pytest.raises(TypeError, match=f"`query_tower` must return one tensor.*{kind}"):
        make_model(towers=(Tower(), embedding(12))).fit(frame(), verbose=0)


def test_layers_that_keras_runs_in_tensorflow_are_refused():
    pytest.importorskip("tensorflow")
    for layer in (keras.layers.Hashing(20), keras.layers.IntegerLookup(vocabulary=[1, 2])):
        with pytest.raises(ValueError, match=r"must run on JAX.*input pipeline"):
            make_model(towers=(keras.Sequential([layer, embedding()]), embedding(12)))


def shared_feature_model(k=3):
    def tower(name):
        own, shared = (keras.Input((), dtype="int32", name=each) for each in (name, "country"))
        embeddings = keras.layers.Add()([embedding()(own), embedding(3)(shared)])
        return keras.Model({name: own, "country": shared}, embeddings)

    towers = tower("user"), tower("movie")
    movies = np.arange(20)
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=k), towers[1], candidates={"movie": movies, "country": movies % 3}
    )
    names = ["user", "country"], ["movie", "country"]
    return make_model(*names, towers=towers, candidate_id="movie", retrieval=index)


@pytest.mark.parametrize("num_devices", [None, 2])
def test_a_feature_of_both_towers(num_devices):
    keras.distribution.set_distribution(None if num_devices is None else data_parallel(num_devices))
    model = shared_feature_model()
    data = {"user": USERS, "country": USERS % 3, "movie": MOVIES}
    model.fit(data, verbose=0)
    queries = {"user": USERS, "country": USERS % 3}
    expected = model.recommend(queries).ids
    for ids in (model.predict(data, verbose=0)[1], model.predict(queries, verbose=0)[1]):
        np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(model.predict_on_batch(data)[1], expected)
    np.testing.assert_array_equal(model(queries)[1], expected)
    assert set(model(data)) == {"query_embeddings", "candidate_embeddings", "ranks"}
    with pytest.raises(ValueError, match="without 'country'"):
        model({"user": USERS, "movie": MOVIES})


def test_towers_may_use_the_same_features():
    model = make_model("movie", "movie", towers=(embedding(12), embedding(12)))
    model.fit({"movie": MOVIES}, verbose=0)
    lists = model.predict({"movie": MOVIES}, verbose=0)[1]
    np.testing.assert_array_equal(lists, model.recommend({"movie": MOVIES}).ids)
    np.testing.assert_array_equal(lists, model.predict_on_batch({"movie": MOVIES})[1])


# The ids of a catalogue.


def catalogue_model(ids, candidate_ids=None, **kwargs):
    inputs = {"movie": keras.Input((), dtype="int32", name="movie"), "price": keras.Input((1,), name="price")}
    joined = keras.layers.Concatenate()([keras.layers.Embedding(100, 8)(inputs["movie"]), inputs["price"]])
    tower = keras.Model(inputs, keras.layers.Dense(8)(joined))
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=1), tower, candidate_ids=candidate_ids, candidates=catalogue(ids),
        **kwargs,
    )  # fmt: skip
    model = TwoTowerModel(
        embedding(), tower, "user", ["movie", "price"], candidate_id=kwargs.pop("candidate_id", "movie"),
        retrieval=index,
    )  # fmt: skip
    model.compile(keras.optimizers.Adam(0.05))
    return model


def catalogue(ids):
    return {"movie": ids, "price": np.ones((len(ids), 1), "float32")}


@pytest.mark.parametrize("ids", [np.random.default_rng(0).permutation(12), 3 + 7 * np.arange(12)])
def test_a_catalogue_in_any_order_keeps_its_ids(ids, tmp_path):
    model = catalogue_model(ids)
    liked = ids[USERS % 12]
    data = {"user": USERS, **catalogue(liked)}
    model.fit(data, epochs=60, verbose=0)
    assert model.evaluate(data, verbose=0, return_dict=True)["recall_at_1"] > 0.9
    assert np.mean(model.recommend({"user": USERS}).ids[:, 0] == liked) > 0.9
    model.retrieval.refresh(catalogue(ids[::-1]))
    assert np.mean(model.recommend({"user": USERS}).ids[:, 0] == liked) > 0.9
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    loaded.retrieval.refresh(catalogue(ids))
    assert np.mean(loaded.recommend({"user": USERS}).ids[:, 0] == liked) > 0.9


def test_ids_that_contradict_the_catalogue_are_an_error():
    with pytest.raises(ValueError, match="ids of an index must be those of the feature 'movie'"):
        catalogue_model(np.arange(12)[::-1], candidate_ids=np.arange(12))
    with pytest.raises(ValueError, match="`candidate_ids` must be unique"):
        catalogue_model(np.zeros(12, int))


# Positives.


def test_rows_with_label_0_are_not_positives():
    clicked = MOVIES % 2 == 0
    data = {"user": USERS, "movie": MOVIES, "click": clicked.astype("float32")}
    model = make_model(label="click", corpus_metrics=[RecallAtK(3)])
    model.fit(data, epochs=2, verbose=0)
    of_clicks = model.evaluate({name: values[clicked] for name, values in data.items()}, verbose=0, return_dict=True)
    of_all = model.evaluate(data, verbose=0, return_dict=True)
    assert of_all["recall_at_3"] == pytest.approx(of_clicks["recall_at_3"])
    labels = data.pop("click")
    of_y = model.evaluate(data, labels, verbose=0, return_dict=True)
    assert of_y["recall_at_3"] == pytest.approx(of_clicks["recall_at_3"])


@pytest.mark.parametrize(("positives", "expected"), [(4.0, lambda x: x["rating"] >= 4), ("seen", lambda x: x["seen"])])
def test_what_a_positive_is_can_be_chosen(positives, expected, tmp_path):
    data = {"user": USERS, "movie": MOVIES, "rating": (MOVIES % 5 + 1).astype("float32"), "seen": USERS % 3}
    model = make_model(label="rating", corpus_metrics=[RecallAtK(3)], corpus_positives=positives)
    model.fit(data, verbose=0)
    ranks = np.asarray(model(data)["ranks"])
    weight = expected(data).astype("float32")
    recall = np.sum(weight * (ranks < 3)) / np.sum(weight)
    assert model.evaluate(data, verbose=0, return_dict=True)["recall_at_3"] == pytest.approx(recall)
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert loaded.evaluate(data, verbose=0, return_dict=True)["recall_at_3"] == pytest.approx(recall)


def test_invalid_definitions_of_positives_raise():
    with pytest.raises(ValueError, match="needs `label`"):
        make_model(corpus_positives=4.0)
    with pytest.raises(TypeError, match="least label of a positive"):
        make_model(label="rating", corpus_positives=[4.0])
    model = make_model(corpus_positives="seen")
    with pytest.raises(ValueError, match="'seen'"):
        model.evaluate(frame(), verbose=0)
    with pytest.raises(ValueError, match="'seen' must not be negative"):
        model.evaluate(frame(seen=-USERS), verbose=0)


# Embeddings that are not finite.


def empty_history_model(label=None):
    tower = keras.Sequential([keras.layers.Embedding(20, 8, mask_zero=True), keras.layers.GlobalAveragePooling1D()])
    return make_model("history", "movie", towers=(tower, embedding(12)), label=label)


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_empty_history_is_named(shuffle):
    history = 1 + np.arange(96 * 5).reshape(96, 5) % 19
    history[39] = 0
    data = {"history": history, "movie": MOVIES}
    message = r"embedding of each query must be finite.*loss=nan.*row 7 of batch 1.*history=\[0 0 0 0 0\]"
    for call in (empty_history_model().fit, empty_history_model().evaluate):
        kwargs = {"shuffle": shuffle} if call.__name__ == "fit" else {}
        with pytest.raises(ValueError, match=message) as error:
            call(data, verbose=0, **kwargs)
        assert "learning rate" not in str(error.value)


def test_a_query_without_an_embedding_gets_no_list():
    model = empty_history_model()
    history = np.ones((10, 5), "int32")
    model.recommend({"history": history})
    history[7] = 0
    queries = {"history": history}
    positives = np.zeros((10, 1), int)
    calls = [
        lambda: model.recommend(queries),
        lambda: model.evaluate_queries(queries, positives),
        lambda: model.predict(queries, verbose=0),
        lambda: model.predict_on_batch(queries),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"embedding of each query must be finite.*row 7.*history=\[0 0 0 0 0\]"):
            call()
    model.check_inputs = False
    assert (model.recommend(queries).ids[7] == -1).all()


def test_a_loss_that_is_not_finite_for_another_reason_blames_no_row():
    model = make_model(task=DistributedTwoTowerTask(temperature=1e-30))
    model.compile(keras.optimizers.SGD(1e30))
    with pytest.raises(ValueError, match=r"loss must be finite.*learning rate"):
        model.fit(frame(), epochs=3, verbose=0)
