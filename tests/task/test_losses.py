import jax
import numpy as np
import pytest
import reference

from keras_rs_contrib import scores
from keras_rs_contrib.task import losses


@pytest.mark.parametrize("similarity", scores.SIMILARITIES)
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_scores_match_the_reference(rng, similarity, heads):
    queries = rng.normal(size=(4, 5) if heads is None else (4, heads, 5))
    candidates = rng.normal(size=(6, 5))
    expected = [[reference.best_head_score(q, c, similarity) for c in candidates] for q in queries]
    np.testing.assert_allclose(scores.score_matrix(queries, candidates, similarity), expected, rtol=1e-5, atol=1e-6)
    pairs = scores.pairwise_scores(queries, candidates[:4], similarity)
    np.testing.assert_allclose(pairs, np.diagonal(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_bias_of_a_query_has_no_effect_on_gradients(value):
    def score(query):
        return scores.pairwise_scores(query, np.array([[0.3, 0.4, 2.0]], "float32"), "biased_cosine")[0]

    result, gradient = jax.value_and_grad(score)(np.array([[3.0, 4.0, value]], "float32"))
    assert result == pytest.approx(3.0)
    np.testing.assert_allclose(gradient, np.zeros((1, 3)), atol=1e-6)


def test_cosine_of_a_zero_embedding_is_zero():
    zeros, candidates = np.zeros((1, 3)), np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    np.testing.assert_array_equal(scores.score_matrix(zeros, candidates, "cosine"), [[0.0, 0.0]])
    # The bias of the candidate remains.
    np.testing.assert_array_equal(scores.score_matrix(zeros, candidates, "biased_cosine"), [[1.0, 2.0]])


def test_small_loss_is_accurate():
    """The loss is `log(1 + exp(-12))`. As a difference of float32 numbers near 1000, it would be 0."""
    loss = losses.softmax_cross_entropy(np.array([[1.0, 0.0]], "float32"), np.array([[1000.0, 988.0]], "float32"))
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-12.0))], rtol=1e-2)


def test_row_without_a_positive_has_loss_zero():
    np.testing.assert_array_equal(losses.softmax_cross_entropy(np.zeros((1, 2)), np.array([[3.0, 4.0]])), [0.0])


def test_cross_entropy_and_gradient_match_the_formula(rng):
    logits, labels = rng.normal(size=(3, 4)).astype("float32") * 5, np.eye(3, 4, dtype="float32")
    labels[2] = 0
    values, gradient = losses.softmax_cross_entropy_and_gradient(labels, logits)

    def expected(rows):
        return [label @ (np.log(np.exp(row).sum()) - row) for label, row in zip(labels, rows, strict=True)]

    np.testing.assert_allclose(values, expected(logits), rtol=1e-5)
    np.testing.assert_allclose(gradient, reference.gradient(lambda x: sum(expected(x)), logits), rtol=1e-4, atol=1e-6)


def test_small_loss_with_gradient_is_accurate():
    labels, logits = np.array([[1.0, 0.0]], "float32"), np.array([[1000.0, 988.0]], "float32")
    value, _ = losses.softmax_cross_entropy_and_gradient(labels, logits)
    np.testing.assert_allclose(value, [np.log1p(np.exp(-12.0))], rtol=1e-2)


def test_mean_divides_by_valid_rows_and_not_by_weights():
    values, weights = np.array([1.0, 2.0, np.nan], "float32"), np.array([3.0, 0.0, 1.0], "float32")
    valid = np.array([True, True, False])
    assert float(losses.mean_over_valid_rows(values, weights, valid)) == 1.5
