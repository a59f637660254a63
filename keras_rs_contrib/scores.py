"""Scores of query and candidate embeddings: pure functions of arrays."""

from __future__ import annotations

from typing import Any

from keras import ops

SIMILARITIES = ("dot", "cosine")


def check_similarity(similarity: str) -> str:
    """Returns `similarity`, or raises `ValueError` if it is not one of `SIMILARITIES`."""
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"`similarity` must be one of {SIMILARITIES}. Received: similarity={similarity!r}. "
            'Use "dot" for the inner product, "cosine" for the inner product of L2-normalized embeddings.'
        )
    return similarity


def to_comparable(embeddings: Any, similarity: str) -> Any:
    """Returns float32 embeddings whose inner products are scores.

    Formula: `e` for `"dot"`, `e / ||e||` for `"cosine"`.

    Args:
        embeddings: `[..., embedding_dim]` float embeddings of any precision.
        similarity: `"dot"` or `"cosine"`.

    Returns:
        float32, shape of `embeddings`. A zero embedding stays zero.
    """
    embeddings = ops.cast(embeddings, "float32")
    if similarity == "cosine":
        squared_norm = ops.sum(ops.square(embeddings), axis=-1, keepdims=True)
        embeddings = ops.multiply(embeddings, inverse_norm(squared_norm))
    return embeddings


def inverse_norm(squared_norm: Any) -> Any:
    """Returns the factor that normalizes an embedding, finite for a zero embedding."""
    return ops.rsqrt(ops.maximum(squared_norm, 1e-12))


def score_matrix(query_embeddings: Any, candidate_embeddings: Any, similarity: str) -> Any:
    """Returns the score of every query with every candidate.

    Formula: `scores[i, j] = q[i] · c[j]`; with several heads, `scores[i, j] = max over h of q[i, h] · c[j]`.

    Args:
        query_embeddings: `[num_queries, embedding_dim]`, or `[num_queries, num_heads, embedding_dim]`, where each
            candidate is scored by the query's best head.
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

    Formula: `scores[i] = q[i] · c[i]`; with several heads, `scores[i] = max over h of q[i, h] · c[i]`.

    Args:
        query_embeddings: `[batch, embedding_dim]` or `[batch, num_heads, embedding_dim]`.
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


def own_scores(query_embeddings: Any, candidate_embeddings: Any, similarity: str) -> Any:
    """Returns the score of each query with each candidate of its own row.

    Formula: `scores[i, k] = q[i] · c[i, k]`; with several heads, `scores[i, k] = max over h of q[i, h] · c[i, k]`.

    Args:
        query_embeddings: `[batch, embedding_dim]` or `[batch, num_heads, embedding_dim]`.
        candidate_embeddings: `[batch, n, embedding_dim]`.
        similarity: `"dot"` or `"cosine"`.

    Returns:
        `[batch, n]` float32.
    """
    queries = to_comparable(query_embeddings, similarity)
    candidates = to_comparable(candidate_embeddings, similarity)
    if len(queries.shape) == 2:
        queries = ops.expand_dims(queries, 1)
    return ops.max(ops.matmul(candidates, ops.swapaxes(queries, 1, 2)), axis=2)
