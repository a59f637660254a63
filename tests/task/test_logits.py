import numpy as np
import pytest

from keras_rs_contrib.task import logits as batch_logits


def test_labels_are_diagonal_with_extra_negatives():
    np.testing.assert_array_equal(batch_logits.positive_labels(np.zeros((2, 3))), [[1, 0, 0], [0, 1, 0]])


def test_positive_probabilities_are_clipped_as_in_tfrs():
    probabilities = np.array([1e-30, 1e-9, 0.5, 2.0], "float32")
    corrected = batch_logits.subtract_log_probability(np.zeros((1, 4), "float32"), probabilities, 4)
    np.testing.assert_allclose(corrected, [[-np.log(1e-6), -np.log(1e-6), np.log(2), 0.0]], rtol=1e-6)


@pytest.mark.parametrize(("num_candidates", "expected"), [(1, 0.0), (4, np.log(4)), (10**9, np.log(1e6))])
def test_probability_zero_is_that_of_one_of_the_draws(num_candidates, expected):
    corrected = batch_logits.subtract_log_probability(np.zeros((1, 2), "float32"), np.zeros(2), num_candidates)
    np.testing.assert_allclose(corrected, [[expected, expected]], rtol=1e-6)


def test_probabilities_can_differ_between_queries():
    probabilities = np.array([[0.5, 0.25], [0.0, 1.0]])
    corrected = batch_logits.subtract_log_probability(np.zeros((2, 2), "float32"), probabilities, 8)
    np.testing.assert_allclose(corrected, np.log([[2.0, 4.0], [8.0, 1.0]]), rtol=1e-6)


def test_accidental_hits_are_other_candidates_with_the_positive_id():
    labels = batch_logits.positive_labels(np.zeros((3, 4)))
    hits = batch_logits.accidental_hits(labels, np.array([7, 8, 7, 8]))
    expected = [[False, False, True, False], [False, False, False, True], [True, False, False, False]]
    np.testing.assert_array_equal(hits, expected)


def test_masked_logits_are_finite_with_softmax_weight_zero():
    logits = batch_logits.mask_logits(np.array([[1.0, np.nan, np.inf]], "float32"), np.array([True, False, False]))
    np.testing.assert_array_equal(logits, np.array([[1.0, batch_logits.MASKED, batch_logits.MASKED]], "float32"))
    assert np.exp(np.float32(batch_logits.MASKED)) == 0.0


@pytest.mark.parametrize(("num", "kept"), [(1, [5.0]), (2, [5.0, 4.0]), (3, [5.0, 4.0, -9.0]), (99, [5.0, 4.0, -9.0])])
def test_hard_negatives_are_kept_with_the_positive(num, kept):
    logits = np.array([[-20.0, 5.0, -9.0, 4.0]], "float32")
    logits, labels = batch_logits.hardest_negatives(logits, batch_logits.positive_labels(logits), num)
    np.testing.assert_array_equal(logits, [[-20.0, *kept]])
    np.testing.assert_array_equal(labels, [[1.0] + [0.0] * len(kept)])


def test_masked_positive_competes_with_logit_zero():
    logits = np.array([[batch_logits.MASKED, 5.0, -9.0, 4.0]], "float32")
    kept, labels = batch_logits.hardest_negatives(logits, batch_logits.positive_labels(logits), 1)
    np.testing.assert_array_equal(kept, [[5.0, 4.0]])
    np.testing.assert_array_equal(labels, [[0.0, 0.0]])
