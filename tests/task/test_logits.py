import numpy as np
import pytest

from keras_rs_contrib.task import logits as negatives


def test_labels_are_the_diagonal_also_with_extra_negatives():
    np.testing.assert_array_equal(negatives.positive_labels(np.zeros((2, 3))), [[1, 0, 0], [0, 1, 0]])


def test_probabilities_are_clipped_as_in_tfrs():
    corrected = negatives.subtract_log_probability(np.zeros((1, 4), "float32"), np.array([0.0, 1e-9, 0.5, 2.0]))
    np.testing.assert_allclose(corrected, [[-np.log(1e-6), -np.log(1e-6), np.log(2), 0.0]], rtol=1e-6)


def test_accidental_hits_are_repeats_of_the_own_positive_alone():
    labels = negatives.positive_labels(np.zeros((3, 4)))
    hits = negatives.accidental_hits(labels, np.array([7, 8, 7, 8]))
    expected = [[False, False, True, False], [False, False, False, True], [True, False, False, False]]
    np.testing.assert_array_equal(hits, expected)


def test_masked_logits_have_no_weight_and_are_finite():
    logits = negatives.mask_logits(np.array([[1.0, np.nan, np.inf]], "float32"), np.array([True, False, False]))
    np.testing.assert_array_equal(logits, np.array([[1.0, negatives.MASKED, negatives.MASKED]], "float32"))
    assert np.exp(np.float32(negatives.MASKED)) == 0.0


@pytest.mark.parametrize(("num", "kept"), [(1, [5.0]), (2, [5.0, 4.0]), (3, [5.0, 4.0, -9.0]), (99, [5.0, 4.0, -9.0])])
def test_the_hardest_negatives_stay_beside_the_positive(num, kept):
    logits = np.array([[-20.0, 5.0, -9.0, 4.0]], "float32")
    logits, labels = negatives.hardest_negatives(logits, negatives.positive_labels(logits), num)
    np.testing.assert_array_equal(logits, [[-20.0, *kept]])
    np.testing.assert_array_equal(labels, [[1.0] + [0.0] * len(kept)])


def test_a_masked_positive_competes_at_zero():
    logits = np.array([[negatives.MASKED, 5.0, -9.0, 4.0]], "float32")
    kept, labels = negatives.hardest_negatives(logits, negatives.positive_labels(logits), 1)
    np.testing.assert_array_equal(kept, [[5.0, 4.0]])
    np.testing.assert_array_equal(labels, [[0.0, 0.0]])
