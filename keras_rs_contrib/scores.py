"""Scores of query and candidate embeddings: pure functions of arrays."""

from __future__ import annotations

from typing import Any

from keras import ops

SIMILARITIES = ("dot", "cosine", "biased_cosine")


def check_similarity(similarity: str) -> str:
    """Returns `similarity`, or raises `ValueError` if it is not one of `SIMILARITIES`."""
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"`similarity` must be one of {SIMILARITIES}. Received: similarity={similarity!r}. "
            'Use "dot" for the inner product, "cosine" for the inner product of L2-normalized embeddings, '
            '"biased_cosine" for the cosine plus a bias, the last element of a candidate embedding.'
        )
    return similarity


def comparable_queries(embeddings: Any, similarity: str) -> Any:
    """Returns float32 queries whose inner products with comparable candidates are scores.

    Formula: `q` for `"dot"`, `q / ||q||` for `"cosine"`, `[q' / ||q'||, 1]` for `"biased_cosine"`, where `q'` is `q`
    without its last element.

    Args:
        embeddings: `[..., embedding_dim]` float embeddings of any precision.
        similarity: one of `SIMILARITIES`.

    Returns:
        float32, shape of `embeddings`. A zero embedding stays zero, but for the 1 of `"biased_cosine"`.
    """
    embeddings = ops.cast(embeddings, "float32")
    if similarity == "dot":
        return embeddings
    result = _normalized(embeddings, similarity)
    return ops.where(is_bias(embeddings.shape[-1]), 1.0, result) if similarity == "biased_cosine" else result


def comparable_candidates(embeddings: Any, similarity: str) -> Any:
    """Returns float32 candidates whose inner products with comparable queries are scores.

    Formula: `c` for `"dot"`, `c / ||c||` for `"cosine"`, `[c' / ||c'||, b]` for `"biased_cosine"`, where `c = [c', b]`.

    Args:
        embeddings: `[..., embedding_dim]` float embeddings of any precision.
        similarity: one of `SIMILARITIES`.

    Returns:
        float32, shape of `embeddings`. A zero embedding stays zero.
    """
    embeddings = ops.cast(embeddings, "float32")
    if similarity == "dot":
        return embeddings
    result = _normalized(embeddings, similarity)
    return ops.where(is_bias(embeddings.shape[-1]), embeddings, result) if similarity == "biased_cosine" else result


def is_bias(embedding_dim: int) -> Any:
    """Returns which elements of an embedding are its bias under `"biased_cosine"`: the last one."""
    return ops.equal(ops.arange(embedding_dim), embedding_dim - 1)


def _normalized(embeddings: Any, similarity: str) -> Any:
    """Returns normalized embeddings, with 0 in place of the bias."""
    if similarity == "biased_cosine":
        # Masked first: masking the result instead would let the bias into the gradient.
        embeddings = ops.where(is_bias(embeddings.shape[-1]), 0.0, embeddings)
    squared_norm = ops.sum(ops.square(embeddings), axis=-1, keepdims=True)
    return ops.multiply(embeddings, inverse_norm(squared_norm))


def inverse_norm(squared_norms: Any) -> Any:
    """Returns the factors that normalize embeddings, finite for a zero embedding."""
    return ops.rsqrt(ops.maximum(squared_norms, 1e-12))


def score_matrix(query_embeddings: Any, candidate_embeddings: Any, similarity: str) -> Any:
    """Returns the score of every query with every candidate.

    Formula: `scores[i, j] = q[i] · c[j]`; with several heads, `scores[i, j] = max over h of q[i, h] · c[j]`.

    Args:
        query_embeddings: `[num_queries, embedding_dim]`, or `[num_queries, num_heads, embedding_dim]`, where each
            candidate is scored by the query's best head.
        candidate_embeddings: `[num_candidates, embedding_dim]`.
        similarity: one of `SIMILARITIES`.

    Returns:
        `[num_queries, num_candidates]` float32.
    """
    queries = comparable_queries(query_embeddings, similarity)
    candidates = comparable_candidates(candidate_embeddings, similarity)
    scores = ops.matmul(queries, ops.transpose(candidates))
    return scores if len(queries.shape) == 2 else ops.max(scores, axis=1)


def pairwise_scores(query_embeddings: Any, candidate_embeddings: Any, similarity: str) -> Any:
    """Returns the score of each query with the candidate of the same row.

    Formula: `scores[i] = q[i] · c[i]`; with several heads, `scores[i] = max over h of q[i, h] · c[i]`.

    Args:
        query_embeddings: `[batch, embedding_dim]` or `[batch, num_heads, embedding_dim]`.
        candidate_embeddings: `[batch, embedding_dim]`.
        similarity: one of `SIMILARITIES`.

    Returns:
        `[batch]` float32.
    """
    queries = comparable_queries(query_embeddings, similarity)
    candidates = comparable_candidates(candidate_embeddings, similarity)
    if len(queries.shape) == 2:
        return ops.sum(ops.multiply(queries, candidates), axis=-1)
    return ops.max(ops.sum(ops.multiply(queries, ops.expand_dims(candidates, 1)), axis=-1), axis=1)


def own_scores(query_embeddings: Any, candidate_embeddings: Any, similarity: str) -> Any:
    """Returns the score of each query with each candidate of its own row.

    Formula: `scores[i, k] = q[i] · c[i, k]`; with several heads, `scores[i, k] = max over h of q[i, h] · c[i, k]`.

    Args:
        query_embeddings: `[batch, embedding_dim]` or `[batch, num_heads, embedding_dim]`.
        candidate_embeddings: `[batch, n, embedding_dim]`.
        similarity: one of `SIMILARITIES`.

    Returns:
        `[batch, n]` float32.
    """
    queries = comparable_queries(query_embeddings, similarity)
    candidates = comparable_candidates(candidate_embeddings, similarity)
    if len(queries.shape) == 2:
        queries = ops.expand_dims(queries, 1)
    return ops.max(ops.matmul(candidates, ops.swapaxes(queries, 1, 2)), axis=2)
