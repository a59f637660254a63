"""Models with vocabularies: names in, names out, through every entry point."""

import keras
import keras_rs
import numpy as np
import pandas as pd
import pytest
from conftest import data_parallel

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    EvaluateQueries,
    HistoryTower,
    RecallAtK,
    TwoTowerModel,
    Vocabulary,
    group_candidate_ids,
    shard_candidates,
)

USERS = [f"u{i}" for i in range(12)]
MOVIES = [f"film {i}" for i in range(9)]
RNG = np.random.default_rng(0)
DATA = pd.DataFrame({"user": RNG.choice(USERS, 80), "movie": RNG.choice(MOVIES, 80)})
# Each name occurs.
DATA = pd.concat([DATA, pd.DataFrame({"user": USERS, "movie": (MOVIES * 2)[:12]})], ignore_index=True)


def named_model(**kwargs):
    users, movies = Vocabulary(USERS), Vocabulary(MOVIES)
    keras.utils.set_random_seed(0)
    arguments = {"query_features": "user", "candidate_features": "movie", **kwargs}
    return TwoTowerModel(
        keras.layers.Embedding(len(users), 4),
        keras.layers.Embedding(len(movies), 4),
        vocabularies={"user": users, "movie": movies},
        **arguments,
    )


def model_of_rows(**kwargs):
    """The same model without vocabularies, on rows."""
    keras.utils.set_random_seed(0)
    user_tower = keras.layers.Embedding(len(USERS) + 1, 4)
    movie_tower = keras.layers.Embedding(len(MOVIES) + 1, 4)
    retrieval = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=9), movie_tower, exclude_ids=[0], similarity="cosine"
    )
    return TwoTowerModel(user_tower, movie_tower, "user", "movie", retrieval=retrieval, **kwargs)


def rows_of(data):
    return {"user": Vocabulary(USERS).encode(data["user"]), "movie": Vocabulary(MOVIES).encode(data["movie"])}


def weights(model):
    return [w.numpy() for w in (*model.query_tower.weights, *model.candidate_tower.weights)]


def as_py_dataset(data, batch_size):
    class Data(keras.utils.PyDataset):
        def __len__(self):
            return -(-len(data) // batch_size)

        def __getitem__(self, number):
            rows = data.iloc[number * batch_size : (number + 1) * batch_size]
            return {name: rows[name].to_numpy() for name in rows}

    return Data()


def as_tf_data(data, batch_size):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices({name: data[name].tolist() for name in data}).batch(batch_size)


FORMS = {
    "frame": lambda data: data,
    "lists": lambda data: {name: data[name].tolist() for name in data},
    "arrays": lambda data: {name: np.array(data[name].tolist()) for name in data},
    "objects": lambda data: {name: data[name].to_numpy(dtype=object) for name in data},
    "bytes": lambda data: {name: np.array([value.encode() for value in data[name]]) for name in data},
    "series": lambda data: {name: data[name] for name in data},
    "category": lambda data: data.astype("category"),
    "column": lambda data: {name: np.array(data[name].tolist())[:, None] for name in data},
    "py_dataset": lambda data: as_py_dataset(data, 32),
    "tf_data": lambda data: as_tf_data(data, 32),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_in_any_form_train_as_rows(form):
    model, expected = named_model(), model_of_rows()
    for each, data in ((model, FORMS[form](DATA)), (expected, rows_of(DATA))):
        each.compile("adam")
        each.fit(data, batch_size=32, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(weights(model), weights(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    metrics = model.evaluate(FORMS[form](DATA), batch_size=32, return_dict=True, verbose=0)
    assert metrics == pytest.approx(expected.evaluate(rows_of(DATA), batch_size=32, return_dict=True, verbose=0))
    scores, rows = model.predict(FORMS[form](DATA[["user"]]), batch_size=32, verbose=0)
    _, expected_rows = expected.predict(rows_of(DATA), batch_size=32, verbose=0)
    np.testing.assert_array_equal(rows, expected_rows)
    assert scores.shape == (len(DATA), 9)


@pytest.fixture
def trained():
    model = named_model()
    model.compile("adam")
    model.fit(DATA, batch_size=32, verbose=0)
    return model


QUERIES = {
    "a name": ("u3", 1),
    "a dict": ({"user": "u3"}, 1),
    "a list": (["u3", "u5"], 2),
    "an array": (np.array(["u3", "u5"]), 2),
    "a dict of lists": ({"user": ["u3", "u5"]}, 2),
    "a series": (pd.Series(["u3", "u5"], index=[7, 8]), 2),
    "a frame": (pd.DataFrame({"user": ["u3", "u5"]}), 2),
    "bytes": (b"u3", 1),
}


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_is_written_in_any_form(trained, query):
    query, number = QUERIES[query]
    ids, scores = trained.recommend(query, k=4)
    rows = Vocabulary(USERS).encode(["u3", "u5"][:number])
    _, expected = trained.retrieval.find(trained.query_tower(rows), 4)
    assert ids.shape == scores.shape == (number, 4)
    np.testing.assert_array_equal(ids, Vocabulary(MOVIES).decode(np.asarray(expected)))
    assert ids.dtype == object


def test_the_row_of_unknown_names_is_never_recommended(trained):
    ids, scores = trained.recommend(USERS, k=9)
    assert all(sorted(row) == sorted(MOVIES) for row in ids.tolist())
    assert np.isfinite(scores).all()


def test_excluded_and_included_ids_are_names(trained):
    everything = trained.recommend("u3", k=9).ids[0].tolist()
    best, second, third = everything[:3]
    assert trained.recommend("u3", k=2, exclude_ids=[best]).ids[0].tolist() == [second, third]
    assert trained.recommend("u3", k=2, exclude_ids={best, "no such film"}).ids[0].tolist() == [second, third]
    ids = trained.recommend(["u3", "u3", "u3"], k=2, exclude_ids=[[best], [], [best, second]]).ids
    assert ids.tolist() == [[second, third], [best, second], [third, everything[3]]]
    assert trained.recommend("u3", k=3, include_ids=[third, best]).ids[0].tolist() == [best, third, None]
    rows = np.array([[best, second], [best, None]], object)
    assert trained.recommend(["u3", "u3"], k=1, exclude_ids=rows).ids.tolist() == [[third], [second]]


def test_queries_are_evaluated_with_names(trained):
    positives = group_candidate_ids(DATA["user"], DATA["movie"], USERS)
    assert positives.dtype == object
    metrics = trained.evaluate_queries({"user": USERS}, positives)
    expected = model_of_rows()
    expected.query_tower.build(None)
    expected.query_tower.set_weights(trained.query_tower.get_weights())
    expected.candidate_tower.build(None)
    expected.candidate_tower.set_weights(trained.candidate_tower.get_weights())
    rows = Vocabulary(USERS).encode(USERS), Vocabulary(MOVIES).encode(positives, padded=True)
    assert metrics == pytest.approx(expected.evaluate_queries({"user": rows[0]}, rows[1]))
    with pytest.raises(ValueError, match="`positive_ids` must be names of the vocabulary"):
        trained.evaluate_queries({"user": USERS[:1]}, [["no such film"]])


def test_queries_are_evaluated_in_each_epoch_with_names():
    model = named_model()
    model.compile("adam")
    callback = EvaluateQueries({"user": USERS}, group_candidate_ids(DATA["user"], DATA["movie"], USERS))
    history = model.fit(DATA, epochs=2, verbose=0, callbacks=[callback]).history
    assert len(history["val_query_mean_reciprocal_rank"]) == 2


def test_an_unknown_query_gets_the_most_popular_candidates_and_the_answer_says_so(trained):
    counts = DATA["movie"].value_counts()
    by_count = sorted(MOVIES, key=lambda name: (-counts[name], MOVIES.index(name)))
    answer = trained.recommend(["nobody", "u3", "nobody"], k=4, exclude_ids=[[], [], by_count[:1]])
    np.testing.assert_array_equal(answer.are_popular, [True, False, True])
    assert answer.ids[0].tolist() == by_count[:4]
    assert answer.scores[0].tolist() == [counts[name] for name in by_count[:4]]
    assert answer.ids[2].tolist() == by_count[1:5]
    assert answer.ids[1].tolist() == trained.recommend("u3", k=4).ids[0].tolist()
    assert "are_popular=array([ True, False,  True])" in repr(answer)
    mask = np.isin([None, *MOVIES], by_count[5:7])
    assert trained.recommend("nobody", k=3, include_mask=mask).ids[0].tolist() == [*by_count[5:7], None]
    assert trained.recommend("nobody", k=1, include_ids=by_count[5:7]).ids[0].tolist() == by_count[5:6]


def test_an_unknown_query_of_an_untrained_model_is_an_error():
    with pytest.raises(ValueError, match="Received: an unknown query in row 1, of a model that was not trained"):
        named_model().recommend(["u1", "nobody"])


def test_an_unknown_candidate_is_an_error_before_anything_changes(trained):
    before = weights(trained)
    data = pd.concat([DATA, pd.DataFrame({"user": ["u1"], "movie": ["no such film"]})], ignore_index=True)
    for call in (trained.fit, trained.evaluate, trained.train_on_batch):
        with pytest.raises(ValueError, match=f"Received: 'no such film' in row {len(DATA)}"):
            call(data)
    for ours, theirs in zip(weights(trained), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("form", ["frame", "tf_data"])
def test_unknown_candidates_are_skipped_and_counted(form):
    others = pd.DataFrame({"user": ["u1", "u2"], "movie": ["no such film", "nor this one"]})
    model, expected = named_model(unknown_candidates="skip"), named_model()
    for each in (model, expected):
        each.compile("sgd")
    # In one batch, so that the weights of the rows make no difference.
    data = pd.concat([others, DATA], ignore_index=True)
    with pytest.warns(UserWarning, match=r"2 of 94 rows were skipped.*Received: b?'no such film'"):
        model.fit(data if form == "frame" else as_tf_data(data, 94), batch_size=94, shuffle=False, verbose=0)
    expected.fit(DATA, batch_size=94, shuffle=False, verbose=0)
    for ours, theirs in zip(weights(model), weights(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    with pytest.warns(UserWarning, match="2 of 94 rows were skipped"):
        metrics = model.evaluate(pd.concat([DATA, others], ignore_index=True), return_dict=True, verbose=0)
    assert metrics == pytest.approx(model.evaluate(DATA, return_dict=True, verbose=0), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"user": None}, ValueError, "The feature 'user' must hold names.*must not be missing"),
        ({"user": ""}, ValueError, "The feature 'user' must hold names.*must not be empty"),
        ({"user": 3}, TypeError, "The feature 'user' must hold names.*Received: 3"),
        ({"movie": 2.5}, TypeError, "The feature 'movie' must hold names.*Received: 2.5"),
    ],
)
def test_values_that_are_no_names_are_errors(trained, change, error, message):
    row = {"user": "u1", "movie": "film 1", **change}
    data = {name: [*DATA[name].tolist(), value] for name, value in row.items()}
    with pytest.raises(error, match=message):
        trained.fit(data, verbose=0)


def test_a_model_with_names_is_saved_and_loaded(trained, tmp_path):
    trained.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for query in ("u3", ["nobody", "u5"]):
        for ours, theirs in zip(loaded.recommend(query, k=4), trained.recommend(query, k=4), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    loaded.fit(DATA, epochs=1, verbose=0)
    again = TwoTowerModel.from_config(trained.get_config())
    assert {name: each.names for name, each in again.vocabularies.items()} == {"user": USERS, "movie": MOVIES}
    again({"user": np.array([1]), "movie": np.array([1])})
    trained.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again.recommend(["nobody", "u5"]).ids, trained.recommend(["nobody", "u5"]).ids)


def test_many_names_are_saved_and_loaded_once_for_the_features_that_share_them(tmp_path):
    names = Vocabulary([f"name {i}" for i in range(2000)])
    model = TwoTowerModel(
        keras.layers.Embedding(len(names), 2),
        keras.layers.Embedding(len(names), 2),
        "follower",
        "followed",
        vocabularies={"follower": names, "followed": names},
    )
    model.compile("adam")
    model.fit({"follower": ["name 1", "name 7"], "followed": ["name 8", "name 3"]}, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.vocabularies["follower"] is loaded.vocabularies["followed"]
    assert loaded.vocabularies["follower"].names == names.names
    np.testing.assert_array_equal(loaded.recommend("name 7").ids, model.recommend("name 7").ids)


def test_integers_of_any_size_are_names():
    users, movies = Vocabulary([2**40, 2**40 + 5, -7]), Vocabulary([10**15, 3, 2])
    model = TwoTowerModel(
        keras.layers.Embedding(len(users), 2),
        keras.layers.Embedding(len(movies), 2),
        "user",
        "movie",
        vocabularies={"user": users, "movie": movies},
    )
    model.compile("adam")
    data = {"user": np.array([2**40, -7, 2**40 + 5]), "movie": np.array([3, 10**15, 2])}
    model.fit(data, verbose=0, seen="training")
    assert sorted(model.recommend(2**40, k=3, exclude_seen=False).ids[0]) == [2, 3, 10**15]
    assert set(model.recommend(-7, k=3).ids[0].tolist()) == {2, 3, None}
    positives = group_candidate_ids(data["user"], data["movie"], [-7, 2**40])
    assert positives.tolist() == [[10**15], [3]]
    assert 0 <= model.evaluate_queries({"user": [-7, 2**40]}, positives)["mean_reciprocal_rank"] <= 1


def test_the_score_of_pairs(trained):
    pairs = DATA[:5]
    rows = rows_of(pairs)
    queries, candidates = trained.query_tower(rows["user"]), trained.candidate_tower(rows["movie"])
    queries, candidates = (
        np.asarray(x) / np.linalg.norm(np.asarray(x), axis=1, keepdims=True) for x in (queries, candidates)
    )
    expected = (queries * candidates).sum(axis=1)
    np.testing.assert_allclose(trained.score(pairs), expected, rtol=1e-5)
    np.testing.assert_allclose(trained.score(dict(pairs.iloc[2])), expected[2:3], rtol=1e-5)
    scores = trained.score({"user": ["u1", "nobody"], "movie": ["film 1", "film 1"]})
    np.testing.assert_array_equal(np.isnan(scores), [False, True])
    ids, scores = trained.recommend("u1", k=2)
    np.testing.assert_allclose(trained.score({"user": ["u1", "u1"], "movie": ids[0]}), scores[0], rtol=1e-5)


def test_the_score_of_a_pair_is_the_predicted_label():
    data = {**rows_of(DATA), "rating": np.linspace(0, 1, len(DATA))}
    task = DistributedTwoTowerTask(temperature=0.5)
    model = TwoTowerModel(
        keras.layers.Embedding(13, 4), keras.layers.Embedding(10, 4), "user", "movie", label="rating", task=task
    )
    model.compile("adam", metrics=[keras.metrics.MeanSquaredError("mse")])
    model.fit(data, verbose=0)
    errors = model.score(data) - data["rating"]
    metrics = model.evaluate(data, return_dict=True, verbose=0)
    assert np.mean(errors**2) == pytest.approx(metrics["mse"], rel=1e-4)


def test_names_of_a_feature_tower_and_its_index(tmp_path):
    genres, movies = Vocabulary(["drama", "comedy"]), Vocabulary(MOVIES)
    genre_of = dict(zip(MOVIES, ["drama", "comedy", "unheard of"] * 3, strict=True))
    inputs = {
        "genre": keras.Input((), dtype="int32", name="genre"),
        "movie": keras.Input((), dtype="int32", name="movie"),
    }
    tower = keras.Model(
        inputs,
        keras.layers.Embedding(len(genres), 4)(inputs["genre"])
        + keras.layers.Embedding(len(movies), 4)(inputs["movie"]),
    )
    catalogue = pd.DataFrame({"genre": genre_of.values(), "movie": MOVIES, "title": "not used"})
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=3),
        tower,
        candidates=catalogue,
        vocabularies={"genre": genres, "movie": movies},
        similarity="cosine",
    )
    model = TwoTowerModel(
        keras.layers.Embedding(13, 4), tower, "user", ["genre", "movie"], candidate_id="movie", retrieval=index,
        vocabularies={"user": Vocabulary(USERS), "movie": movies, "genre": genres},
    )  # fmt: skip
    model.compile("adam")
    data = DATA.assign(genre=DATA["movie"].map(genre_of))
    model.fit(data, verbose=0, validation_data=data, seen="training")
    ids = model.recommend("u3", k=3).ids
    assert set(ids[0]) <= set(MOVIES)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.recommend("u3", k=3).ids, ids)
    # A part of the catalogue, in another order.
    part = catalogue[::-2]
    loaded.retrieval.refresh(part, part["movie"])
    assert set(loaded.recommend("u3", k=5, exclude_seen=False).ids[0]) == set(part["movie"])
    with pytest.raises(ValueError, match="Received: 'no such film'"):
        loaded.retrieval.refresh(part[:3], ["film 0", "film 1", "no such film"])


def test_features_of_candidate_ids_hold_names():
    model = named_model(
        exclude_feature="seen", positive_feature="watched", negative_feature="skipped", task=DistributedTwoTowerTask()
    )
    model.compile("adam")
    rows = {
        "user": ["u1", "u2"],
        "movie": ["film 1", "film 2"],
        "seen": [["film 3"], []],
        "watched": [["film 4", "film 5"], ["film 1"]],
        "skipped": [["film 7"], ["film 8"]],
    }
    model.fit(rows, verbose=0)
    assert "film 3" not in model.recommend({"user": ["u1"], "seen": [["film 3"]]}, k=8).ids
    # Rows of ids, as the model without vocabularies takes them.
    expected = model.evaluate(
        {**rows, "seen": [["film 3", ""], ["", ""]], "watched": [["film 4", "film 5"], ["film 1", None]]},
        return_dict=True,
        verbose=0,
    )
    assert model.evaluate(rows, return_dict=True, verbose=0) == pytest.approx(expected)


@pytest.mark.parametrize("num_devices", [2, 3])
def test_names_train_on_many_devices_as_on_one(num_devices):
    expected = named_model()
    expected.compile("adam")
    expected.fit(DATA, batch_size=30, shuffle=False, verbose=0, validation_data=DATA, seen="training")
    keras.distribution.set_distribution(data_parallel(num_devices))
    model = named_model()
    model.compile("adam")
    history = model.fit(DATA, batch_size=30, shuffle=False, verbose=0, validation_data=DATA, seen="training")
    answer = model.recommend(["u3", "nobody"], k=3)
    for ours, theirs in zip(weights(model), weights(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(answer.ids, expected.recommend(["u3", "nobody"], k=3).ids)
    assert history.history["val_ndcg_at_9"] == pytest.approx(expected.history.history["val_ndcg_at_9"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vocabularies": [Vocabulary(USERS)]}, TypeError, "`vocabularies` must be a dict"),
        ({"vocabularies": {"user": USERS}}, TypeError, r"`vocabularies\['user'\]` must be a `Vocabulary`"),
        ({"vocabularies": {"usr": Vocabulary(USERS)}}, ValueError, "Received: 'usr'"),
        ({"vocabularies": {"user": Vocabulary([*USERS, "u99"])}}, ValueError, "input_dim=13 for 14 rows"),
        ({"vocabularies": {"movie": Vocabulary(MOVIES[:5])}}, ValueError, "Received: 10 rows for 6"),
        ({"unknown_candidates": "drop"}, ValueError, "Received: 'drop'"),
        ({"query_id": 3}, TypeError, "`query_id`"),
    ],
)
def test_vocabularies_that_do_not_fit_are_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        TwoTowerModel(keras.layers.Embedding(13, 4), keras.layers.Embedding(10, 4), "user", "movie", **arguments)


def test_ids_of_an_index_that_are_no_rows_of_the_vocabulary_are_an_error():
    tower = keras.layers.Embedding(10, 4)
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=3), tower, candidate_ids=np.arange(10), similarity="cosine"
    )
    with pytest.raises(ValueError, match=r"must be rows of the vocabulary of candidates, in \[1, 9\]. Received: 0"):
        TwoTowerModel(
            keras.layers.Embedding(13, 4), tower, "user", "movie", candidate_id="movie", retrieval=index,
            vocabularies={"movie": Vocabulary(MOVIES)},
        )  # fmt: skip


@pytest.mark.parametrize("form", ["frame", "tf_data"])
def test_unknown_queries_are_evaluated_by_popularity(form):
    """In pairs and in lists, as they are recommended to."""
    data = DATA.copy()
    data["user"] = np.where(np.arange(len(data)) % 3, data["user"], "nobody")
    model = named_model(corpus_metrics=[RecallAtK(3)])
    model.compile("adam")
    history = model.fit(DATA, validation_data=FORMS[form](data), batch_size=32, verbose=0).history
    lists = model.recommend(data["user"], k=3).ids.tolist()
    expected = np.mean([movie in movies for movie, movies in zip(data["movie"], lists, strict=True)])
    assert history["val_recall_at_3"][-1] == pytest.approx(expected)
    assert model.evaluate(FORMS[form](data), return_dict=True, verbose=0)["recall_at_3"] == pytest.approx(expected)
    metrics = model.evaluate_queries(data["user"], [[movie] for movie in data["movie"]])
    assert metrics["recall_at_3"] == pytest.approx(expected)


@pytest.mark.parametrize("names", [[4, 1, 3, 2], [101, 102, 103, 104], ["a", "b", "c", "d"]])
def test_the_part_for_validation_is_encoded_once(names):
    columns = {
        "user": np.array(names)[[0, 1, 2, 3, 0, 1, 1, 3]], "movie": np.array(names)[[3, 2, 1, 0, 1, 1, 0, 0]]
    }  # fmt: skip
    histories = []
    for split in (True, False):
        keras.utils.set_random_seed(0)
        vocabulary = Vocabulary(names)
        model = TwoTowerModel(
            keras.layers.Embedding(5, 4),
            keras.layers.Embedding(5, 4),
            "user",
            "movie",
            vocabularies={"user": vocabulary, "movie": vocabulary},
        )
        model.compile("adam")
        first, last = ({name: x[rows] for name, x in columns.items()} for rows in (slice(4), slice(4, 8)))
        arguments = {"x": columns, "validation_split": 0.5} if split else {"x": first, "validation_data": last}
        histories.append(model.fit(**arguments, shuffle=False, verbose=0).history)
    for name, values in histories[0].items():
        assert values == pytest.approx(histories[1][name])


def test_unknown_queries_have_nothing_in_common():
    """Rare users are unknown, and others must not lose what these have seen."""
    users, movies = Vocabulary(["u1"]), Vocabulary(MOVIES)
    model = TwoTowerModel(
        keras.layers.Embedding(2, 4), keras.layers.Embedding(len(movies), 4), "user", "movie",
        vocabularies={"user": users, "movie": movies},
    )  # fmt: skip
    model.compile("adam")
    model.fit({"user": ["u1", "rare", "rarer"], "movie": MOVIES[:3]}, seen="training", verbose=0)
    model.fit({"user": ["u1"], "movie": MOVIES[:1]}, seen={"user": ["new"], "movie": [MOVIES[3]]}, verbose=0)
    assert model.recommend("new", k=9).ids[0].tolist() == MOVIES
    assert set(model.recommend("u1", k=9).ids[0]) == {None, *MOVIES[1:]}


def test_a_query_without_a_row_in_training_gets_the_most_popular_candidates(trained):
    extended = trained.extend({"user": ["later"]})
    assert extended.recommend(["later", "u3"], k=2).are_popular.tolist() == [True, False]
    extended.fit({"user": ["later"], "movie": ["film 1"]}, verbose=0)
    assert extended.recommend(["later", "u3"], k=2).are_popular.tolist() == [False, False]
    # The counts of the first training stay.
    counts = DATA["movie"].value_counts()
    counts["film 1"] += 1
    assert extended.recommend("nobody", k=1).scores[0, 0] == counts.max()


@pytest.mark.parametrize("action", ["error", "skip"])
def test_unknown_negatives_are_not_trained(action):
    model = named_model(negative_feature="shown", unknown_candidates=action, task=DistributedTwoTowerTask())
    model.compile("sgd")
    model.build({"user": (None,), "movie": (None,)})
    before = weights(model)[1][0]
    data = {"user": ["u1", "u2"], "movie": ["film 1", "film 2"], "shown": [["no such film", "film 3"], ["film 4"]]}
    if action == "error":
        with pytest.raises(ValueError, match="The feature 'shown' must hold names of the vocabulary of 'movie'"):
            model.fit(data, verbose=0)
    else:
        model.fit(data, verbose=0)
    np.testing.assert_array_equal(weights(model)[1][0], before)


def test_a_query_id_that_is_not_a_feature_of_the_tower_is_written_as_one_value():
    movies = Vocabulary(MOVIES)
    table = keras.layers.Embedding(len(movies), 4)
    tower = HistoryTower(table, "history", mask_zero=True)
    vocabularies = {"user": Vocabulary(["u1", "u2"]), "movie": movies, "history": movies}
    model = TwoTowerModel(tower, table, "history", "movie", query_id="user", vocabularies=vocabularies)
    model.compile("adam")
    data = {"user": ["u1", "u2"], "movie": MOVIES[:2], "history": [MOVIES[2:4], MOVIES[4:5]]}
    model.fit(data, seen="training", verbose=0)
    expected = model.recommend({"user": ["u1"], "history": [MOVIES[5:7]]}, k=9).ids
    answer = model.recommend({"user": "u1", "history": MOVIES[5:7]}, k=9)
    assert answer.ids.tolist() == expected.tolist()
    assert MOVIES[0] not in answer.ids
    assert not answer.are_popular.any()
    # One film, and a new user.
    assert model.recommend({"user": "new", "history": MOVIES[5:6]}, k=9).are_popular.tolist() == [False]
    assert model.recommend({"user": "new", "history": []}, k=9).are_popular.tolist() == [True]
    without_ids = TwoTowerModel(tower, table, "history", "movie", vocabularies={"movie": movies, "history": movies})
    without_ids.compile("adam")
    without_ids.fit(data, verbose=0, validation_data=data)
    with pytest.raises(ValueError, match=r"`seen` needs one id of a query in each row. Received: .* shape \(2, 2\)"):
        without_ids.fit(data, seen="training", verbose=0)
    pairs = pd.DataFrame({"history": [None, MOVIES[:2]]})["history"]
    assert model.recommend({"history": pairs}, k=2).are_popular.tolist() == [True, False]


def test_no_queries_get_no_lists(trained):
    answer = trained.recommend([], k=3)
    assert answer.ids.shape == answer.scores.shape == (0, 3)


def test_the_score_of_an_unknown_candidate_is_nan(trained):
    scores = trained.score({"user": ["u1", "u2", "zz"], "movie": ["film 1", "no such film", "film 1"]})
    np.testing.assert_array_equal(np.isnan(scores), [False, True, True])


def test_ids_of_an_index_are_names_of_one_vocabulary():
    genres, movies = Vocabulary(["drama", "comedy"]), Vocabulary(MOVIES)
    tower = keras.Sequential([keras.layers.Embedding(3, 4)])
    arguments = {"candidates": {"genre": ["drama"] * 9}, "vocabularies": {"genre": genres, "movie": movies}}
    retrieval = keras_rs.layers.BruteForceRetrieval(k=3)
    tower.build((None,))
    with pytest.raises(ValueError, match=r"names of one of the `vocabularies`\. Received: names that 0 of 2"):
        shard_candidates(retrieval, tower, candidate_ids=[*MOVIES[:8], "zz"], **arguments)
    index = shard_candidates(
        retrieval,
        keras.layers.Embedding(10, 4),
        candidate_ids=["film 9", *MOVIES],
        vocabularies={"movie": Vocabulary([*MOVIES, "film 9"])},
    )
    assert np.asarray(index.candidate_ids).tolist() == [10, *range(1, 10)]


@pytest.mark.parametrize("values", [[{"u1"}], [["u1"], {"u2"}], [object()]])
def test_values_that_cannot_be_names_raise_a_type_error(values):
    with pytest.raises((TypeError, ValueError), match="Received"):
        Vocabulary(USERS).encode(values)
    with pytest.raises(ValueError, match="must not be -1"):
        Vocabulary([3, -1])
