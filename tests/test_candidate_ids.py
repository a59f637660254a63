import numpy as np
import pytest

from keras_rs_contrib.candidate_ids import check_candidate_ids, check_corpus_ids


@pytest.mark.parametrize("ids", [[3, 1], np.array([3, 1], "int64"), np.array([3, 1], "uint8")])
def test_integers_of_any_width_become_int32(ids):
    result = check_candidate_ids(ids)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, [3, 1])


def test_no_ids_are_fine():
    assert check_candidate_ids([]).dtype == np.int32


@pytest.mark.parametrize("ids", [["a", "b"], [1.0, 2.0], [True, False], [None]])
def test_what_is_no_integer_is_refused(ids):
    with pytest.raises(TypeError, match="must be integers"):
        check_candidate_ids(ids)


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 2**62])
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
        check_corpus_ids(ids, 3)
