"""Queries and ids in the forms in which people have them."""

import keras
import numpy as np
import pandas as pd
import pytest
import reference
import tensorflow as tf
from models import brute_force

from keras_rs_contrib import (
    EvaluateQueries,
    MeanReciprocalRank,
    NDCGAtK,
    RecallAtK,
    RefreshCandidates,
    TwoTowerModel,
    shard_candidates,
)
from keras_rs_contrib.model import queries as query_rows

NUM_USERS, NUM_MOVIES, DIMENSION = 12, 20, 4
USERS = {"user_id": np.arange(NUM_USERS)}
THREE = {"user_id": [3, 4, 9]}
LISTS = [[1, 2], [3], [], [5, 19, 7, 7], *[[0]] * 8]


def make_model(movie_ids=None, exclude_feature=None):
    keras.utils.set_random_seed(0)
    movies = keras.layers.Embedding(NUM_MOVIES, DIMENSION, embeddings_initializer="normal")
    retrieval = shard_candidates(brute_force(k=5, return_scores=True), movies, candidate_ids=movie_ids)
    return TwoTowerModel(
        keras.layers.Embedding(NUM_USERS, DIMENSION, embeddings_initializer="normal"),
        movies,
        query_features="user_id",
        candidate_features="movie_id",
        candidate_id="movie_id",
        retrieval=retrieval,
        exclude_feature=exclude_feature,
    )


@pytest.fixture(scope="module")
def model():
    model = make_model()
    model.recommend(USERS)
    return model


def best(model, users, k=5, excluded=None, included=None):
    """The recommendations of a naive search, given lists of ids."""
    tables = [tower.embeddings.numpy() for tower in (model.query_tower, model.candidate_tower)]
    left_out = [[] if excluded is None else list(excluded[i]) for i in range(len(users))]
    if included is not None:
        left_out = [[*own, *(set(range(NUM_MOVIES)) - set(included[i]))] for i, own in enumerate(left_out)]
    return reference.top_k(tables[0][users], tables[1], k, exclude_ids_by_query=left_out)[1]


# For three users: the ids [1, 2], [3] and [5, 19, 7], in the forms that Python libraries have for them.
PADDED = [[1, 2, -1], [3, -1, -1], [5, 19, 7]]
FORMS = {
    "ragged lists": [[1, 2], [3], [5, 19, 7]],
    "sets": [{1, 2}, {3}, frozenset({5, 19, 7})],
    "tuples": ((1, 2), (3,), (5, 19, 7)),
    "arrays": [np.array([1, 2]), np.array([3], "int64"), np.array([5, 19, 7], "uint8")],
    "array of lists": np.array([[1, 2], [3], [5, 19, 7]], dtype=object),
    "padded array": np.array(PADDED),
    "series of lists": pd.Series([[1, 2], [3], [5, 19, 7]], index=[10, 20, 30]),
    "series of sets": pd.Series([{1, 2}, {3}, {5, 19, 7}]),
    "data frame": pd.DataFrame(PADDED),
    "list of series": [pd.Series([1, 2]), pd.Series([3]), pd.Series([5, 19, 7])],
    "tf tensor": tf.constant(PADDED, "int64"),
    "ragged tf tensor": tf.ragged.constant([[1, 2], [3], [5, 19, 7]]),
    "jax array": keras.ops.convert_to_tensor(np.array(PADDED)),
    "ranges": [range(1, 3), range(3, 4), [5, 19, 7]],
}


@pytest.mark.parametrize("form", FORMS)
def test_ids_of_several_queries_may_have_any_form(model, form):
    ids, users = FORMS[form], THREE["user_id"]
    lists = [[i for i in row if i >= 0] for row in PADDED]
    found = model.recommend(THREE, k=5, exclude_ids=ids).ids
    np.testing.assert_array_equal(found, best(model, users, excluded=lists))
    found = model.recommend(THREE, k=5, include_ids=ids).ids
    np.testing.assert_array_equal(found, best(model, users, included=lists))
    metrics = [RecallAtK(5), MeanReciprocalRank()]
    expected = model.evaluate_queries(THREE, np.array(PADDED), metrics=metrics)
    assert model.evaluate_queries(THREE, ids, metrics=metrics) == expected
    others = [[0], [8], [11]]
    expected = model.evaluate_queries(THREE, others, np.array(PADDED), metrics=metrics)
    assert model.evaluate_queries(THREE, others, ids, metrics=metrics) == expected


@pytest.mark.parametrize(
    "ids",
    [
        [4, 9],
        (4, 9),
        {4, 9},
        np.array([4, 9]),
        pd.Series([4, 9]),
        pd.Index([4, 9]),
        tf.constant([4, 9]),
        [[4, 9]],
        [{4, 9}],
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_of_a_single_query_may_be_flat(model, ids):
    one = {"user_id": 7}
    np.testing.assert_array_equal(model.recommend(one, exclude_ids=ids).ids, best(model, [7], excluded=[[4, 9]]))
    np.testing.assert_array_equal(model.recommend(one, include_ids=ids).ids, best(model, [7], included=[[4, 9]]))
    expected = model.evaluate_queries({"user_id": [7]}, [[4, 9]])
    assert model.evaluate_queries(one, ids) == expected


@pytest.mark.parametrize("user", [7, np.int64(7), np.array(7), tf.constant(7), keras.ops.convert_to_tensor(7)])
def test_a_single_value_is_one_query(model, user):
    ids, scores = model.recommend({"user_id": user})
    assert ids.shape == scores.shape == (1, 5)
    np.testing.assert_array_equal(ids, best(model, [7]))
    np.testing.assert_array_equal(model.recommend({"user_id": user}, include_ids=[3, 1], k=4).ids[:, 2:], [[-1, -1]])


def test_the_features_of_a_single_query_may_be_vectors():
    inputs = {"user_id": keras.Input((), dtype="int32", name="user_id"), "tags": keras.Input((3,), name="tags")}
    inputs["age"] = keras.Input((), name="age")
    merged = keras.layers.Concatenate()(
        [keras.layers.Embedding(6, 2)(inputs["user_id"]), inputs["tags"], keras.layers.Reshape((1,))(inputs["age"])]
    )
    movies = keras.layers.Embedding(NUM_MOVIES, DIMENSION)
    tower = keras.Model(inputs, keras.layers.Dense(DIMENSION)(merged))
    model = TwoTowerModel(tower, movies, query_features=["user_id", "tags", "age"], candidate_features="movie_id")
    tags = np.array([0.5, 0.1, 2.0], "float32")
    expected = model.recommend({"user_id": np.array([3]), "tags": tags[None], "age": np.array([0.3], "float32")})
    for age in (0.3, np.float32(0.3), np.array([0.3], "float32")):
        found = model.recommend({"user_id": 3, "tags": tags, "age": age})
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_the_exclude_feature_may_have_rows_of_any_length(model):
    excluding = make_model(exclude_feature="seen")
    for form in ("ragged lists", "series of sets", "padded array"):
        found = excluding.recommend({**THREE, "seen": FORMS[form]}).ids
        np.testing.assert_array_equal(found, best(excluding, THREE["user_id"], excluded=[[1, 2], [3], [5, 19, 7]]))
    found = excluding.recommend({"user_id": 4, "seen": [3, 8]}).ids
    np.testing.assert_array_equal(found, best(excluding, [4], excluded=[[3, 8]]))


def test_empty_lists(model):
    everyone = best(model, np.arange(NUM_USERS))
    for ids in ([], np.zeros(0, int), np.zeros((NUM_USERS, 0)), [[]] * NUM_USERS, pd.Series([[]] * NUM_USERS)):
        np.testing.assert_array_equal(model.recommend(USERS, exclude_ids=ids).ids, everyone)
        ids, scores = model.recommend(USERS, include_ids=ids)
        np.testing.assert_array_equal(ids, np.full((NUM_USERS, 5), -1))
        np.testing.assert_array_equal(scores, np.full((NUM_USERS, 5), -np.inf))
        with pytest.raises(ValueError, match="at least one positive"):
            model.evaluate_queries(USERS, [])
    found = model.recommend(USERS, include_ids=LISTS)
    np.testing.assert_array_equal(found.ids, best(model, np.arange(NUM_USERS), included=LISTS))
    np.testing.assert_array_equal(found.ids[2], [-1] * 5)
    assert model.recommend({"user_id": []}, exclude_ids=[], include_ids=[4]).ids.shape == (0, 5)


@pytest.mark.parametrize("k", [np.int64(3), np.int32(3), np.uint8(3)])
def test_k_may_be_a_numpy_integer(model, k):
    np.testing.assert_array_equal(model.recommend(USERS, k=k).ids, model.recommend(USERS, k=3).ids)
    assert model.retrieval.find(np.ones((2, DIMENSION), "float32"), k)[0].shape == (2, 3)


@pytest.mark.parametrize("k", [True, np.True_, 2.0, np.float32(2), 0, -1, "3"])
def test_other_values_of_k_raise(model, k):
    for call in (lambda: model.recommend(USERS, k=k), lambda: model.retrieval.find(np.ones((2, DIMENSION)), k)):
        with pytest.raises(ValueError, match=r"`k` must be a positive int. Received: k="):
            call()


# Inclusion.


def test_only_films_in_stock_are_recommended(monkeypatch):
    ids = np.random.default_rng(0).permutation(NUM_MOVIES) * 2 + 100
    model = make_model(ids)
    queries, table = model.query_tower, model.candidate_tower
    model.recommend(USERS)
    queries, table = queries.embeddings.numpy(), table.embeddings.numpy()
    monkeypatch.setattr(query_rows, "QUERIES_AT_ONCE", 5)
    in_stock = np.random.default_rng(1).random(NUM_MOVIES) < 0.4
    rows = np.random.default_rng(2).random((NUM_USERS, NUM_MOVIES)) < 0.4
    for mask in (in_stock, rows):
        lists = [ids[row].tolist() for row in np.broadcast_to(mask, rows.shape)]
        left_out = [sorted(set(ids.tolist()) - set(row)) for row in lists]
        expected = reference.top_k(queries, table, 12, ids=ids.tolist(), exclude_ids_by_query=left_out)
        forms = [{"include_mask": mask}, {"include_ids": lists}, {"include_mask": mask.tolist()}]
        if mask.ndim == 1:
            forms += [{"include_ids": lists[0]}, {"include_ids": set(lists[0])}, {"include_mask": pd.Series(mask)}]
        for form in forms:
            found = model.recommend(USERS, k=12, **form)
            np.testing.assert_array_equal(found.ids, expected[1])
            np.testing.assert_allclose(found.scores, expected[0], rtol=1e-5, atol=1e-7)
            positives = ids[np.arange(NUM_USERS) % NUM_MOVIES][:, None]
            ranks = [
                reference.ranks(queries[[i]], table, positives[i], ids=ids.tolist(), exclude_ids_by_query=[left_out[i]])
                for i in range(NUM_USERS)
            ]
            value = model.evaluate_queries(USERS, positives, metrics=[RecallAtK(2)], **form)["recall_at_2"]
            assert value == pytest.approx(np.mean(np.array(ranks) < 2))


def test_positives_outside_of_the_list_are_never_found(model):
    metrics = [RecallAtK(100), NDCGAtK(100), MeanReciprocalRank()]
    for limits in ({"exclude_ids": [[3]]}, {"include_ids": [1, 2]}, {"include_mask": np.arange(NUM_MOVIES) == 1}):
        values = model.evaluate_queries({"user_id": [0]}, [[3]], metrics=metrics, **limits)
        assert list(values.values()) == [0, 0, 0], limits


def test_wide_rows_are_searched_for_fewer_queries_at_once(model, monkeypatch):
    monkeypatch.setattr(query_rows, "MAX_VALUES_AT_ONCE", 2 * NUM_MOVIES)
    sizes = []
    find = type(model.retrieval).find

    def noting(self, query_embeddings, k, **limits):
        sizes.append(len(query_embeddings))
        return find(self, query_embeddings, k, **limits)

    monkeypatch.setattr(type(model.retrieval), "find", noting)
    mask = np.random.default_rng(0).random((NUM_USERS, NUM_MOVIES)) < 0.5
    lists = [np.flatnonzero(row).tolist() for row in mask]
    found = model.recommend(USERS, include_mask=mask).ids
    np.testing.assert_array_equal(found, best(model, np.arange(NUM_USERS), included=lists))
    assert sizes == [2] * 6


def test_the_callback_takes_the_same_forms(model):
    logs, metrics = {}, [RecallAtK(3), NDCGAtK(3)]
    callback = EvaluateQueries(THREE, FORMS["sets"], [[0], [], [4, 8]], metrics, include_ids=range(9))
    callback.set_model(model)
    callback.on_epoch_end(0, logs)
    expected = model.evaluate_queries(THREE, PADDED, [[0, -1], [-1, -1], [4, 8]], include_ids=range(9), metrics=metrics)
    assert logs == {f"val_query_{name}": value for name, value in expected.items()}
    assert expected != model.evaluate_queries(THREE, PADDED, metrics=metrics)


# Errors.


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (
            [1, 2, 3],
            ValueError,
            r"a flat list of 3 ids for 12 queries. Pass a list of lists.*`np.tile\(ids, \(12, 1\)\)`",
        ),
        ([[1]] * 3, ValueError, r"needs a row for each query. Received: shape \(3, 1\) for 12 queries"),
        (7, TypeError, r"must be lists of ids. Received: 7. Pass a list, such as \[42\]"),
        ("seen", TypeError, "must be lists of ids. Received: 'seen'"),
        ([[1], None, *[[2]] * 10], TypeError, r"Received: None for query 1. Pass \[\] for a query without ids"),
        ([[1], 5, *[[2]] * 10], TypeError, "Received: 5 for query 1"),
        (
            [[1], [[2]], *[[2]] * 10],
            ValueError,
            r"a flat list of ids for each query. Received: shape \(1, 1\) for query 1",
        ),
        ([[1], ["a"], *[[2]] * 10], TypeError, "must be integers"),
        ([[1], [1.5], *[[2]] * 10], TypeError, "must be integers. Received: dtype float64"),
        ([[1], [2**40], *[[2]] * 10], ValueError, "1099511627776"),
        (pd.DataFrame({"a": [1.0, np.nan] * 6}), TypeError, "must be integers. Received: dtype float64"),
    ],
)
def test_invalid_ids_raise_before_the_index_is_refreshed(model, monkeypatch, ids, error, message):
    monkeypatch.setattr(type(model), "refresh_index", lambda self: pytest.fail("refreshed"))
    with pytest.raises(error, match="`exclude_ids`.*" + message):
        model.recommend(USERS, exclude_ids=ids)
    with pytest.raises(error, match="`exclude_ids`.*" + message):
        model.evaluate_queries(USERS, [[1]] * NUM_USERS, ids)
    with pytest.raises(error, match="`positive_ids`.*" + message):
        model.evaluate_queries(USERS, ids)
    if ids != [1, 2, 3] if isinstance(ids, list) else True:
        with pytest.raises(error, match="`include_ids`.*" + message):
            model.recommend(USERS, include_ids=ids)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include_ids": np.ones(NUM_MOVIES, bool)}, TypeError, "an array of bools. Pass a mask of the rows"),
        ({"include_mask": np.ones(NUM_MOVIES)}, TypeError, "must be of bools.*Received: dtype float64"),
        ({"include_mask": np.ones(NUM_MOVIES - 1, bool)}, ValueError, r"shape \(19,\) for 20 candidates"),
        ({"include_mask": np.ones((3, NUM_MOVIES), bool)}, ValueError, r"shape \(3, 20\) for 12 queries"),
        ({"include_mask": [True] * NUM_MOVIES, "include_ids": [1]}, ValueError, "Drop one of them"),
        ({"k": NUM_MOVIES + 1}, ValueError, "k=21 for 20 candidates"),
        ({"k": [[1, 2]] * NUM_USERS}, TypeError, "`k` is the number of candidates.*Name excluded ids: `exclude_ids=`"),
    ],
)
def test_invalid_limits_raise_before_the_index_is_refreshed(model, monkeypatch, arguments, error, message):
    monkeypatch.setattr(type(model), "refresh_index", lambda self: pytest.fail("refreshed"))
    with pytest.raises(error, match=message):
        model.recommend(USERS, **arguments)


SLIPS = {
    "TFRS's call(queries, k)": (lambda m, q: m.retrieval(q, 5), "`index.find(queries, k)`"),
    "index(queries, exclusions)": (
        lambda m, q: m.retrieval(q, np.ones((2, 1), int)),
        "`index(queries, exclude_ids=...)`",
    ),
    "find(queries, exclusions)": (lambda m, q: m.retrieval.find(q, np.ones((2, 1), int)), "Name excluded ids"),
    "find(queries, k, exclusions)": (
        lambda m, q: m.retrieval.find(q, 3, [[1], [2]]),
        "`exclude_ids=`",
    ),
    "ranks(queries, ids, exclusions)": (lambda m, q: m.retrieval.ranks(q, [1, 2], [[1], [2]]), "`exclude_ids=`"),
    "query_with_exclusions(queries, exclusions)": (
        lambda m, q: m.recommend(USERS, np.ones((12, 1), int)),
        "`exclude_ids=`",
    ),
    "query_with_exclusions(queries, exclusions, k)": (
        lambda m, q: m.recommend(USERS, [[1]] * 12, 3),
        "`exclude_ids=`",
    ),
    "recommend(queries, k, exclusions)": (lambda m, q: m.recommend(USERS, 3, [[1]] * 12), "`exclude_ids=`"),
    "evaluate_queries(..., metrics)": (
        lambda m, q: m.evaluate_queries(USERS, [[1]] * 12, [[2]] * 12, [RecallAtK(3)]),
        "`metrics=`",
    ),
    "refresh(candidates, ids, verbose)": (lambda m, q: m.retrieval.refresh(None, None, 0), "`verbose=`"),
    "shard_candidates(retrieval, tower, ids)": (
        lambda m, q: shard_candidates(keras.layers.Layer(), m.candidate_tower, [1, 2]),
        "`candidate_ids=`",
    ),
    "the constructor of the index": (
        lambda m, q: type(m.retrieval)(m.candidate_tower, np.arange(20), 5),
        "with `shard_candidates`",
    ),
    "RefreshCandidates(index, index)": (
        lambda m, q: RefreshCandidates(m.retrieval, m.retrieval),
        "`verbose=`",
    ),
    "EvaluateQueries(..., epochs)": (
        lambda m, q: EvaluateQueries(USERS, [[1]] * 12, None, [RecallAtK(3)], [1]),
        "`epochs=`",
    ),
    "RecallAtK(k, name)": (lambda m, q: RecallAtK(3, "recall"), "`name=`"),
    "NDCGAtK(k, shuffle_ties)": (lambda m, q: NDCGAtK(3, False), "`name=`"),
    "MeanReciprocalRank(k)": (lambda m, q: MeanReciprocalRank(10), "`name=`"),
    "update_state(y_true, y_pred)": (
        lambda m, q: RecallAtK(3).update_state([0, 1], [0.2, 0.7]),
        "`sample_weight=`",
    ),
    "metric(y_true, y_pred)": (lambda m, q: RecallAtK(3)([0, 1], [0.2, 0.7]), "`sample_weight=`"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_arguments_in_the_order_of_other_libraries_raise(model, slip):
    call, fix = SLIPS[slip]
    with pytest.raises(
        TypeError, match=r"Received: .*(arguments by position|arguments without a name|a list or an array)"
    ) as error:
        call(model, np.ones((2, DIMENSION), "float32"))
    assert fix in str(error.value)


def test_documented_calls_by_position_work(model):
    queries = np.ones((2, DIMENSION), "float32")
    model.retrieval(queries)
    model.retrieval.find(queries, 3)
    model.retrieval.ranks(queries, [1, 2])
    model.recommend(USERS, 3)
    model.evaluate_queries(USERS, [[1]] * NUM_USERS, [[2]] * NUM_USERS)
    EvaluateQueries(USERS, [[1]] * NUM_USERS, [[2]] * NUM_USERS, [RecallAtK(3)])
    RefreshCandidates(model.retrieval)
    RecallAtK(5).update_state([0, 1])
