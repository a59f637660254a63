import jax
import numpy as np
import pandas as pd
import pytest
import reference

from keras_rs_contrib.ids import (
    check_candidate_ids,
    check_corpus_ids,
    check_exclude_ids,
    group_candidate_ids,
)


@pytest.mark.parametrize(
    "ids", [[3, 1], np.array([3, 1], "int64"), np.array([3, 1], "uint8"), np.array([3, 1], object)]
)
def test_integers_of_any_width_become_int32(ids):
    result = check_candidate_ids(ids)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, [3, 1])


def test_an_empty_list_of_ids_is_valid():
    assert check_candidate_ids([]).dtype == np.int32


@pytest.mark.parametrize("ids", [["a", "b"], [1.0, 2.0], [True, False], [None], [[1], [2, 3]]])
def test_ids_that_are_not_integers_raise(ids):
    with pytest.raises(TypeError, match=r"must be (an array of )?integers"):
        check_candidate_ids(ids)


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 2**62, 2**70])
def test_ids_outside_int32_raise(number):
    with pytest.raises(ValueError, match=str(number)):
        check_candidate_ids([0, number])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, 2], r"shape \(2,\) for 3"),
        ([[1], [2], [3]], r"\(3, 1\)"),
        ([4, 5, 4], "4 for 2 candidates"),
        ([0, 1, -1], "-1"),
    ],
)
def test_a_corpus_needs_one_valid_id_for_each_candidate(ids, words):
    with pytest.raises(ValueError, match=words):
        check_corpus_ids(ids, 3, [])


def test_row_numbers_are_the_default_ids():
    assert check_corpus_ids(None, 3, [2]) is None
    with pytest.raises(ValueError, match="3 for 3 candidates with ids 0 to 2"):
        check_corpus_ids(None, 3, [3])


@pytest.mark.parametrize(
    "exclude_ids", [[3, 1, 3], (1, 3), {3, 1}, np.array([1, 3]), range(1, 4, 2), {1: 0, 3: 0}.keys(), iter([3, 1])]
)
def test_exclude_ids_may_be_any_collection(exclude_ids):
    assert check_exclude_ids(exclude_ids) == [1, 3]


@pytest.mark.parametrize("exclude_ids", [0, [[1], [2]], "ab"])
def test_exclude_ids_must_be_a_flat_collection(exclude_ids):
    with pytest.raises(TypeError, match="`exclude_ids` must be"):
        check_exclude_ids(exclude_ids)


# Groups of candidate ids.


@pytest.mark.parametrize("num_queries", [1, 7, 40])
@pytest.mark.parametrize("gap", [1, 10**7])
def test_group_candidate_ids_returns_one_row_for_each_query(rng, num_queries, gap):
    """The queries are unsorted, some have no pairs, and some pairs belong to other queries."""
    names = gap * rng.choice(np.arange(-100, 100), 60, replace=False)
    query_ids, candidate_ids = rng.choice(names[:50], 300), rng.integers(0, 30, 300)
    queries = rng.permutation(
        np.concatenate([names[50 : 50 + num_queries // 4], names[: num_queries - num_queries // 4]])
    )
    result = group_candidate_ids(query_ids, candidate_ids, queries)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(
        result, reference.group_candidate_ids(query_ids.tolist(), candidate_ids.tolist(), queries.tolist())
    )


@pytest.mark.parametrize(
    ("query_ids", "candidate_ids", "queries", "expected"),
    [
        ([7, 8, 7], [100, 200, 300], [8, 7], [[200, -1], [100, 300]]),
        # A duplicate pair.
        ([7, 7, 7, 8], [3, 1, 3, 3], [8, 7], [[3, -1], [3, 1]]),
        # Pairs of other queries, with ids below, between and above the requested ones.
        ([1, 9, 5, 4], [10, 90, 50, 40], [6, 4], [[-1], [40]]),
        ([7, 8], [1, 2], [5], [[-1]]),
        ([-(2**31), 2**31 - 1, 0], [1, 2, 3], [2**31 - 1, -(2**31)], [[2], [1]]),
        ([-(2**31), 2**31 - 1], [1, 2], [2**31 - 2, 2**31 - 1], [[-1], [2]]),
        ([], [], [5, 4], [[-1], [-1]]),
        ([7, 8], [1, 2], [], np.zeros((0, 1), int)),
        ([], [], [], np.zeros((0, 1), int)),
        ((7, 8), jax.numpy.array([1, 2]), np.array([8, 7], "uint8"), [[2], [1]]),
        ([-(2**31), 2**31 - 1], [0, 2**31 - 1], [2**31 - 1, -(2**31)], [[2**31 - 1], [0]]),
    ],
)
def test_group_candidate_ids_by_hand(query_ids, candidate_ids, queries, expected):
    result = group_candidate_ids(query_ids, candidate_ids, queries)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("query_ids", "candidate_ids", "queries", "error", "words"),
    [
        ([1], [2], [5, 3, 5], ValueError, "`queries` must be unique. Received: 5 twice"),
        ([1, 2], [3], [1], ValueError, r"shapes \(2,\), \(1,\) and \(1,\)"),
        ([[1, 2]], [[3, 4]], [1], ValueError, r"shapes \(1, 2\), \(1, 2\) and \(1,\)"),
        ([1], [3], [[1]], ValueError, r"and \(1, 1\)"),
        ([1], [3], 1, ValueError, r"and \(\)"),
        ([1.0], [3], [1], TypeError, "`query_ids` must be integers"),
        ([1], [2.5], [1], TypeError, "`candidate_ids` must be integers"),
        (["a"], [3], [1], TypeError, "A name must be of the kind"),
        (["a"], [3], ["a", "b", "a"], ValueError, "`queries` must be unique. Received: 'a' twice"),
        (["a", None], [3, 4], ["a"], ValueError, "must not be missing"),
        ([1, 1, 2], ["x", "x", ""], [1], ValueError, "must not be empty. Received: '' in row 2"),
        (["a"], ["x", "y"], ["a"], ValueError, r"shapes \(1,\), \(2,\) and \(1,\)"),
        (["a"], ["x"], [["a"]], ValueError, r"and \(1, 1\)"),
        ([1], [3], [True], TypeError, "`queries` must be integers"),
    ],
)
def test_invalid_arguments_of_group_candidate_ids_raise(query_ids, candidate_ids, queries, error, words):
    with pytest.raises(error, match=words):
        group_candidate_ids(query_ids, candidate_ids, queries)


@pytest.mark.parametrize(
    ("query_ids", "candidate_ids", "queries", "expected"),
    [
        (["a", "b", "a"], [100, 200, 300], ["b", "a"], [[200, -1], [100, 300]]),
        (["a", "b", "a"], ["x", "y", "z"], ["b", "a", "c"], [["y", None], ["x", "z"], [None, None]]),
        ([1, 2, 1], ["x", "x", "x"], [2, 1], [["x"], ["x"]]),
        (np.array([b"a", b"b"]), pd.Series(["x", "y"]), np.array(["b", "a"], object), [["y"], ["x"]]),
        ([2**40, 1], [3, 4], [1, 2**40], [[4], [3]]),
        ([1, 2], np.array([2**40, 4]), [1, 2], [[2**40], [4]]),
        (["a"], [3], [], np.zeros((0, 1), int)),
        ([2**40], [3], [], np.zeros((0, 1), int)),
        (np.array([], str), np.array([], str), ["a"], [[None]]),
        (np.array([], str), [], ["a"], [[-1]]),
    ],
)
def test_group_candidate_ids_takes_names(query_ids, candidate_ids, queries, expected):
    result = group_candidate_ids(query_ids, candidate_ids, queries)
    assert result.tolist() == np.asarray(expected, object).tolist()
