import numpy as np
import pytest

from keras_rs_contrib.candidate_ids import check_candidate_ids, check_corpus_ids, check_exclude_ids


@pytest.mark.parametrize(
    "ids", [[3, 1], np.array([3, 1], "int64"), np.array([3, 1], "uint8"), np.array([3, 1], object)]
)
def test_integers_of_any_width_become_int32(ids):
    result = check_candidate_ids(ids)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, [3, 1])


def test_no_ids_are_fine():
    assert check_candidate_ids([]).dtype == np.int32


@pytest.mark.parametrize("ids", [["a", "b"], [1.0, 2.0], [True, False], [None], [[1], [2, 3]]])
def test_what_is_no_integer_is_refused(ids):
    with pytest.raises(TypeError, match=r"must be (an array of )?integers"):
        check_candidate_ids(ids)


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 2**62, 2**70])
def test_what_int32_cannot_hold_is_refused(number):
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
def test_ids_of_a_corpus_are_one_for_each_candidate(ids, words):
    with pytest.raises(ValueError, match=words):
        check_corpus_ids(ids, 3, [])


def test_row_numbers_are_the_ids_where_none_are_given():
    assert check_corpus_ids(None, 3, [2]) is None
    with pytest.raises(ValueError, match="3 for 3 candidates with ids 0 to 2"):
        check_corpus_ids(None, 3, [3])


@pytest.mark.parametrize(
    "exclude_ids", [[3, 1, 3], (1, 3), {3, 1}, np.array([1, 3]), range(1, 4, 2), {1: 0, 3: 0}.keys(), iter([3, 1])]
)
def test_ids_to_leave_out_come_in_any_collection(exclude_ids):
    assert check_exclude_ids(exclude_ids) == [1, 3]


@pytest.mark.parametrize("exclude_ids", [0, [[1], [2]], "ab"])
def test_ids_to_leave_out_are_a_flat_collection(exclude_ids):
    with pytest.raises(TypeError, match="`exclude_ids` must be"):
        check_exclude_ids(exclude_ids)
