"""Exact ranks within a candidate table, whole or split over devices: pure functions of arrays."""

from __future__ import annotations

from typing import Any

import keras
from jax import lax
from jax import numpy as jnp
from keras import ops

from keras_rs_contrib.ids import NOT_IN_LIST
from keras_rs_contrib.index.candidate_rows import excluded_in_block, included_columns, rows_in_shard, split_of
from keras_rs_contrib.index.exchange import Exchange, on_shards
from keras_rs_contrib.index.rank_counts import MIN_THRESHOLDS, counts_in_passes, counts_in_tiles
from keras_rs_contrib.index.score_blocks import Search, compiled, in_blocks, platform_of, score_block, to_keys
from keras_rs_contrib.scores import score_matrix


@compiled
def ranks(
    query_embeddings: Any,
    table: Any,
    target_rows: Any,
    search: Search,
    exclude_rows: Any = None,
    excluded: Any = None,
    included: Any = None,
) -> Any:
    """Returns how many candidates rank before the target candidates of each query, in the order of `top_k`.

    Formula: `rank = count(score[j] > score[target]) + count(score[j] = score[target] and j < target)`.

    No top-k is computed. If the rows are split, two numbers for each target travel: its score, and the count.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float.
        table: `[num_rows, embedding_dim]` float, laid out as `search.layout` says.
        target_rows: `[num_queries]` or `[num_queries, n]` int32, the rows of the target candidates.
        search: how to search.
        exclude_rows: `[num_queries, m]` int32 rows that do not count for the query; those outside the table are
            ignored. `None` for none.
        excluded: `[num_rows]` bool, True for rows that do not count; or `None`.
        included: the only rows that count for each query, as in `top_k`; or `None` for all.

    Returns:
        int32, shape of `target_rows`, 0 is best. `NOT_IN_LIST` for a query with NaN, and for target rows that are no
        candidates, or left out by `excluded` or `included`.
    """
    if keras.backend.backend() != "jax":
        return _ranks_in_matrix(query_embeddings, table, target_rows, search, exclude_rows, excluded, included)

    def ranks_of_shard(
        exchange: Exchange,
        queries: Any,
        target_rows: Any,
        exclude_rows: Any,
        included: Any,
        shard: Any,
        excluded: Any,
    ) -> Any:
        queries, target_rows = exchange.all_queries(queries), exchange.all_queries(target_rows)
        exclude_rows = exchange.all_queries(exclude_rows)
        num_rows = shard.shape[0]
        first_row = exchange.first_row(num_rows)
        is_candidate = lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0) < search.num_candidates - first_row
        included = rows_in_shard(exchange, included, first_row, num_rows, search.num_candidates)

        def count_in_block(block: Any, target_rows: Any, exclude_rows: Any, included: Any) -> Any:
            left_out = excluded_in_block(excluded, included, num_rows)
            counts = is_candidate if left_out is None else is_candidate & ~left_out
            scores = score_block(block, shard, search)
            columns = jnp.arange(block.shape[0], dtype=jnp.int32)
            own_rows = target_rows - first_row
            is_own = (own_rows >= 0) & (own_rows < num_rows)
            own_rows_or_any = jnp.clip(own_rows, 0, num_rows - 1)
            own_scores = scores[own_rows_or_any, columns[:, None]]
            is_own &= jnp.broadcast_to(counts, scores.shape)[own_rows_or_any, columns[:, None]]
            target_keys = exchange.maximum(jnp.where(is_own, to_keys(own_scores), -jnp.inf))
            # The shards add up their counts, so only one of them counts a target that is left out.
            rank_of_none = jnp.where(first_row == 0, NOT_IN_LIST, 0)
            keys = to_keys(scores)
            if exclude_rows is not None:
                # NaN is neither above the target's score nor equal to it, however often the row is named.
                keys = keys.at[exclude_rows - first_row, columns[:, None]].set(
                    jnp.nan, mode="drop", wrap_negative_indices=False
                )

            in_tiles = target_rows.shape[1] >= MIN_THRESHOLDS and platform_of(search) == "cpu"
            count = counts_in_tiles if in_tiles else counts_in_passes
            result = count(keys, counts, target_keys.T, own_rows.T).T
            return jnp.where(target_keys == -jnp.inf, rank_of_none, result)

        return exchange.total(in_blocks(count_in_block, num_rows, search, queries, target_rows, exclude_rows, included))

    counts = on_shards(
        ranks_of_shard,
        search.layout,
        ("queries", query_embeddings),
        ("queries", target_rows.reshape(target_rows.shape[0], -1)),
        ("queries", exclude_rows),
        (split_of(included), included),
        ("table", table),
        ("table", excluded),
    )
    has_nan = jnp.isnan(query_embeddings).any(axis=1, keepdims=True)
    return jnp.where(has_nan, NOT_IN_LIST, counts).reshape(target_rows.shape)


def _ranks_in_matrix(
    query_embeddings: Any,
    table: Any,
    target_rows: Any,
    search: Search,
    exclude_rows: Any,
    excluded: Any,
    included: Any,
) -> Any:
    """Returns what `ranks` does on any backend, from the whole score matrix."""
    num_candidates = search.num_candidates
    keys = to_keys(score_matrix(query_embeddings, table, search.similarity)[:, :num_candidates], ops)
    counts = ops.ones_like(keys, dtype="bool")
    if excluded is not None:
        counts = ops.logical_and(counts, ops.logical_not(ops.expand_dims(excluded[:num_candidates], 0)))
    if included is not None:
        counts = ops.logical_and(counts, included_columns(included, num_candidates))
    # A target may be excluded, and is ranked among the others nevertheless.
    among = counts
    if exclude_rows is not None:
        among = ops.logical_and(counts, ops.logical_not(included_columns(exclude_rows, num_candidates)))
    targets = target_rows if len(target_rows.shape) == 2 else ops.expand_dims(target_rows, 1)
    is_own = ops.logical_and(ops.greater_equal(targets, 0), ops.less(targets, num_candidates))
    places = ops.clip(targets, 0, num_candidates - 1)
    is_own = ops.logical_and(is_own, ops.take_along_axis(counts, places, axis=1))
    target_keys = ops.take_along_axis(keys, places, axis=1)
    rows = ops.expand_dims(ops.arange(num_candidates, dtype="int32"), 0)

    def count(target: tuple[Any, Any]) -> Any:
        key, row = (ops.expand_dims(each, 1) for each in target)
        before = ops.logical_or(ops.greater(keys, key), ops.logical_and(ops.equal(keys, key), ops.less(rows, row)))
        return ops.sum(ops.cast(ops.logical_and(before, among), "int32"), axis=1)

    columns = (ops.transpose(target_keys), ops.transpose(places))
    result = (
        ops.transpose(ops.map(count, columns)) if targets.shape[1] != 1 else count((target_keys[:, 0], places[:, 0]))
    )
    result = ops.reshape(result, ops.shape(targets))
    has_nan = ops.any(ops.isnan(query_embeddings), axis=1, keepdims=True)
    in_list = ops.logical_and(is_own, ops.logical_not(has_nan))
    return ops.reshape(ops.where(in_list, result, NOT_IN_LIST), ops.shape(target_rows))
