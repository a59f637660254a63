"""Scores of query and candidate embeddings and the losses on them: pure functions of arrays."""

from __future__ import annotations

from typing import Any

from keras import ops

SIMILARITIES = ("dot", "cosine")


def check_similarity(similarity: str) -> str:
    """Returns `similarity`, or raises `ValueError` where it is none of `SIMILARITIES`."""
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"`similarity` must be one of {SIMILARITIES}. Received: similarity={similarity!r}. "
            'Use "dot" for the inner product, "cosine" for that of the L2-normalised embeddings.'
        )
    return similarity


def to_comparable(embeddings: Any, similarity: str) -> Any:
    """Returns embeddings in float32, of length 1 under cosine similarity, so that inner products are scores.

    Args:
        embeddings: `[..., embedding_dim]` float embeddings of any precision.
        similarity: `"dot"` or `"cosine"`.

    Returns:
        float32, shape of `embeddings`. An embedding of zeros stays zeros.
    """
    embeddings = ops.cast(embeddings, "float32")
    if similarity == "cosine":
        squared_norm = ops.sum(ops.square(embeddings), axis=-1, keepdims=True)
        embeddings = ops.multiply(embeddings, ops.rsqrt(ops.maximum(squared_norm, 1e-12)))
    return embeddings


def in_batch_scores(query_embeddings: Any, candidate_embeddings: Any, similarity: str) -> Any:
    """Returns the score of every query with every candidate.

    Args:
        query_embeddings: `[num_queries, embedding_dim]`, or `[num_queries, num_heads, embedding_dim]`, where a query's
            score is that of its best head.
        candidate_embeddings: `[num_candidates, embedding_dim]`.
        similarity: `"dot"` or `"cosine"`.

    Returns:
        `[num_queries, num_candidates]` float32.
    """
    queries = to_comparable(query_embeddings, similarity)
    candidates = to_comparable(candidate_embeddings, similarity)
    scores = ops.matmul(queries, ops.transpose(candidates))
    return scores if len(queries.shape) == 2 else ops.max(scores, axis=1)


def pairwise_scores(query_embeddings: Any, candidate_embeddings: Any, similarity: str) -> Any:
    """Returns the score of each query with the candidate of the same row.

    Args:
        query_embeddings: `[batch, embedding_dim]`, or `[batch, num_heads, embedding_dim]`, where the best head scores.
        candidate_embeddings: `[batch, embedding_dim]`.
        similarity: `"dot"` or `"cosine"`.

    Returns:
        `[batch]` float32.
    """
    queries = to_comparable(query_embeddings, similarity)
    candidates = to_comparable(candidate_embeddings, similarity)
    if len(queries.shape) == 2:
        return ops.sum(ops.multiply(queries, candidates), axis=-1)
    return ops.max(ops.sum(ops.multiply(queries, ops.expand_dims(candidates, 1)), axis=-1), axis=1)


def softmax_cross_entropy(labels: Any, logits: Any) -> Any:
    """Returns each row's cross-entropy between one-hot labels and the softmax of the logits.

    Args:
        labels: `[batch, num_candidates]` one-hot float32, or zeros in a row without a positive.
        logits: `[batch, num_candidates]` float32.

    Returns:
        `[batch]` float32, in nats; 0 for a row without a positive.
    """
    # The softmax is shifted by the largest logit: a difference of two large numbers would lose a small loss's digits.
    log_probability = ops.where(ops.greater(labels, 0.0), ops.log_softmax(logits, axis=1), 0.0)
    return ops.negative(ops.sum(log_probability, axis=1))


def mean_over_valid_rows(values: Any, sample_weight: Any = None, valid: Any = None) -> Any:
    """Returns the weighted sum of the values over the number of valid rows.

    The weights are not in the denominator, as with `"sum_over_batch_size"` in `keras.losses`.

    Args:
        values: `[batch]` float32.
        sample_weight: `[batch]` float32, or `None` for 1.
        valid: `[batch]` bool, or `None` for all.

    Returns:
        Scalar float32; 0 where no row is valid.
    """
    if sample_weight is not None:
        values = ops.multiply(values, sample_weight)
    if valid is None:
        count = ops.cast(ops.shape(values)[0], "float32")
    else:
        values = ops.where(valid, values, 0.0)
        count = ops.sum(ops.cast(valid, "float32"))
    return ops.divide(ops.sum(values), ops.maximum(count, 1.0))
