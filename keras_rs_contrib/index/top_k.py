"""Exact top-k of a candidate table, on one device or split over several: pure functions of arrays.

The search of a block of scores has two levels: the maxima of groups of consecutive rows, then the rows of the k best
groups. Together, both levels read the block about once. A top-k of the whole block would cost as much as the matrix
product that computes the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp
from keras import ops

from keras_rs_contrib.ids import NO_CANDIDATE
from keras_rs_contrib.index.candidate_rows import (
    excluded_in_block,
    ids_of_rows,
    included_columns,
    rows_in_shard,
    split_of,
)
from keras_rs_contrib.index.exchange import Exchange, on_shards
from keras_rs_contrib.index.score_blocks import (
    LOWEST,
    Search,
    compiled,
    in_blocks,
    platform_of,
    score_block,
    to_keys,
    without_padding,
)
from keras_rs_contrib.scores import score_matrix

# The smallest number of scores in a block for which two levels are faster than one.
MIN_TWO_LEVEL_SIZE = 2**16
# Up to this many excluded ids are compared with each result. Longer lists are sorted and searched.
MAX_COMPARED_IDS = 256


@compiled
def top_k(
    query_embeddings: Any,
    table: Any,
    k: int,
    search: Search,
    candidate_ids: Any = None,
    exclude_ids: Any = None,
    excluded: Any = None,
    included: Any = None,
) -> tuple[Any, Any]:
    """Returns the k candidates with the highest scores for each query, best first.

    Equal scores rank by row, lower rows first. NaN scores rank as -inf. On a mesh, each device scores queries with its
    own rows. If each device holds the whole table, devices exchange nothing. If the rows are split, they exchange k
    pairs of a score and a row for each query and shard, but not the score matrix or the table. If the same mesh axis
    splits queries and rows, they exchange the queries too.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float, optionally split over the batch axis.
        table: `[num_rows, embedding_dim]` float, with the layout `search.layout`.
        k: the number of candidates, at most `search.num_candidates`.
        search: settings of the search.
        candidate_ids: `[search.num_candidates]` int32, or `None` if the row numbers are the ids.
        exclude_ids: `[num_queries, m]` int32 ids to exclude for each query, -1 for none; or `None`. The cost is that of
            a top-(k + m).
        excluded: `[num_rows]` bool, True for rows to exclude for all queries, including padding rows; or `None`. The
            cost does not depend on their number.
        included: the only rows that are searched for each query, `[num_queries, m]` int32, where other numbers than
            those of candidates stand for none, or `[num_queries, num_rows]` bool; or `None` for all.

    Returns:
        Scores `[num_queries, k]` float32 and ids `[num_queries, k]` int32. If fewer than k candidates remain, the other
        scores are -inf and their ids -1. A query with NaN has NaN scores and ids -1.
    """
    if keras.backend.backend() != "jax":
        keys = to_keys(score_matrix(query_embeddings, table, search.similarity)[:, : search.num_candidates], ops)
        if excluded is not None:
            keys = ops.where(ops.expand_dims(excluded[: search.num_candidates], 0), -np.inf, keys)
        if included is not None:
            keys = ops.where(included_columns(included, search.num_candidates), keys, -np.inf)
        num_dropped = 0 if exclude_ids is None else exclude_ids.shape[1]
        num_found = search.num_candidates if num_dropped is None else min(k + num_dropped, search.num_candidates)
        keys, rows = ops.top_k(keys, num_found)
        keys, rows = _without_excluded(keys, ops.cast(rows, "int32"), k, search, candidate_ids, exclude_ids)
        return results_of_rows(query_embeddings, keys, rows, search.num_candidates, candidate_ids)

    def top_k_of_shard(
        exchange: Exchange,
        queries: Any,
        exclude_ids: Any,
        included: Any,
        shard: Any,
        excluded: Any,
        candidate_ids: Any,
    ) -> tuple[Any, Any]:
        queries, exclude_ids = exchange.all_queries(queries), exchange.all_queries(exclude_ids)
        num_rows = shard.shape[0]
        first_row = exchange.first_row(num_rows)
        # The search finds extra rows, because `exclude_ids` are removed afterwards. It never finds `excluded` rows.
        num_dropped = 0 if exclude_ids is None else exclude_ids.shape[1]
        num_found = min(k + num_dropped, num_rows)

        included = rows_in_shard(exchange, included, first_row, num_rows, search.num_candidates)

        def search_block(block: Any, included: Any) -> tuple[Any, Any]:
            scores = score_block(block, shard, search)
            if excluded is None and included is None:
                num_padding_rows = exchange.num_shards * num_rows - search.num_candidates
                scores = without_padding(scores, search.num_candidates - first_row, num_padding_rows)
            return _search(scores, num_found, excluded_in_block(excluded, included, num_rows), search)

        keys, rows = in_blocks(search_block, num_rows, search, queries, included)
        rows = rows + first_row
        if num_dropped:
            # Each shard keeps up to k rows: all k winners may be on one shard.
            keys, rows = _without_excluded(keys, rows, min(k, num_rows), search, candidate_ids, exclude_ids)
        if exchange.num_shards > 1:
            # The shards are in the order of their rows, so equal scores keep their order in the merge.
            keys, rows = exchange.own_queries(keys), exchange.own_queries(rows)
            keys, places = lax.top_k(keys, k)
            rows = jnp.take_along_axis(rows, places, axis=1)
        return keys, rows

    keys, rows = on_shards(
        top_k_of_shard,
        search.layout,
        ("queries", query_embeddings),
        ("queries", exclude_ids),
        (split_of(included), included),
        ("table", table),
        ("table", excluded),
        ("nothing", candidate_ids),
    )
    return results_of_rows(query_embeddings, keys, rows, search.num_candidates, candidate_ids)


def _search(scores: Any, k: int, excluded: Any, search: Search) -> tuple[Any, Any]:
    """Returns the k best rows of a block and their sort keys.

    Args:
        scores: `[num_rows, num_queries]` float32.
        k: the number of rows.
        excluded: `[num_rows, 1]` or `[num_rows, num_queries]` bool, or `None`.
        search: settings of the search.

    Returns:
        Keys `[num_queries, k]` float32, -inf for excluded rows, and rows `[num_queries, k]` int32.
    """

    def all_keys() -> Any:
        keys = to_keys(scores)
        return keys if excluded is None else jnp.where(excluded, -jnp.inf, keys)

    if search.recall_target is not None and platform_of(search) == "tpu":
        keys, rows = lax.approx_max_k(all_keys().T, k, recall_target=search.recall_target)
        return keys, rows
    num_rows = scores.shape[0]
    size = group_size(num_rows, k) if scores.size >= MIN_TWO_LEVEL_SIZE else 1
    if size == 1:
        return _one_level_top_k(all_keys().T, k)
    if excluded is not None:
        keys = all_keys()
        return _two_level_top_k(keys, _reduce_groups(keys, lax.max, -np.inf, size), k, size, lambda x: x)
    maxima = _reduce_groups(scores, lax.max, -np.inf, size)
    # XLA's maximum over a window ignores a NaN and the values before it. The sums detect NaN instead.
    sums = _reduce_groups(scores, lax.add, 0.0, size)
    # Replacing NaN in all scores would cost as much as the maxima, so it runs only if a sum is NaN. It runs query by
    # query, because XLA allocates the memory of this branch in any case.
    return lax.cond(  # type: ignore[no-any-return]
        jnp.isnan(sums).any(),
        lambda scores, maxima: lax.map(
            lambda column: _one_level_top_k(
                to_keys(lax.dynamic_index_in_dim(scores, column, axis=1, keepdims=False)), k
            ),
            jnp.arange(scores.shape[1]),
        ),
        lambda scores, maxima: _two_level_top_k(scores, maxima, k, size, to_keys),
        scores,
        maxima,
    )


def _one_level_top_k(keys: Any, k: int) -> tuple[Any, Any]:
    keys, rows = lax.top_k(keys, k)
    return keys, rows


def group_size(num_rows: int, k: int) -> int:
    """Returns the number of rows in a group, or 1 if a search in two levels is not faster.

    Formula: `group_size = sqrt(num_rows / k)`, rounded to a power of 2 and clipped to [16, 128]. The first level
    searches `num_rows / group_size` maxima, the second `k * group_size` rows. The total is smallest if both are equal.
    """
    size = 2 ** round(np.log2(max(1.0, num_rows / k)) / 2)
    return 1 if size < 8 else int(np.clip(size, 16, 128))


def _reduce_groups(scores: Any, operation: Callable[[Any, Any], Any], initial: float, group_size: int) -> Any:
    """Returns the reduction of each full group of consecutive rows, `[num_groups, num_queries]`."""
    window = (group_size, 1)
    return lax.reduce_window(scores, initial, operation, window, window, "VALID")


def _two_level_top_k(
    scores: Any, maxima: Any, k: int, group_size: int, key_of: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Returns the k best rows. They are all in the k best groups, or after the last full group.

    The rows and their order are exact: each row outside the k best groups has at least one better row in each of these
    groups. This includes equal scores, because groups have consecutive rows and the lower row ranks first.

    Args:
        scores: `[num_rows, num_queries]` float32.
        maxima: `[num_groups, num_queries]` float32, the maximum of each group.
        k: the number of rows, at most `num_groups`.
        group_size: the number of rows in a group.
        key_of: function from scores to sort keys.

    Returns:
        Keys `[num_queries, k]` float32 and rows `[num_queries, k]` int32.
    """
    num_rows, num_queries = scores.shape
    _, groups = lax.top_k(key_of(maxima).T, k)
    groups = jnp.sort(groups, axis=1)
    columns = lax.broadcasted_iota(jnp.int32, groups.shape, 0)
    slices = lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(1,), start_index_map=(0, 1))
    starts = jnp.stack([groups * group_size, columns], axis=-1)
    members = lax.gather(scores, starts, slices, (group_size, 1), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    rows = groups[:, :, None] * group_size + jnp.arange(group_size, dtype=jnp.int32)
    members, rows = members.reshape(num_queries, -1), rows.reshape(num_queries, -1)
    first_left = maxima.shape[0] * group_size
    if first_left < num_rows:
        left = jnp.arange(first_left, num_rows, dtype=jnp.int32)
        members = jnp.concatenate([members, scores[first_left:].T], axis=1)
        rows = jnp.concatenate([rows, jnp.broadcast_to(left, (num_queries, left.size))], axis=1)
    keys, places = lax.top_k(key_of(members), k)
    return keys, jnp.take_along_axis(rows, places, axis=1)


def _without_excluded(
    keys: Any, rows: Any, k: int, search: Search, candidate_ids: Any, exclude_ids: Any
) -> tuple[Any, Any]:
    """Returns the k best rows without excluded rows and padding rows, and their sort keys.

    Args:
        keys: `[num_queries, n]` float32, best first.
        rows: `[num_queries, n]` int32 rows of the whole table.
        k: the number of rows.
        search: settings of the search.
        candidate_ids: `[num_candidates]` int32, or `None`.
        exclude_ids: `[num_queries, m]` int32, or `None`.

    Returns:
        Keys `[num_queries, k]` float32, -inf if fewer than k rows remain, and rows `[num_queries, k]` int32.
    """
    dropped = ops.greater_equal(rows, search.num_candidates)
    if exclude_ids is not None:
        dropped = ops.logical_or(dropped, contains(exclude_ids, ids_of_rows(rows, candidate_ids)))
    keys, places = ops.top_k(ops.where(dropped, -np.inf, keys), k)
    return keys, ops.take_along_axis(rows, ops.cast(places, "int32"), axis=1)


def contains(sets: Any, ids: Any) -> Any:
    """Returns whether each id is in the set of its query.

    Args:
        sets: `[num_queries, m]` int32 ids.
        ids: `[num_queries, n]` int32 ids.

    Returns:
        `[num_queries, n]` bool.
    """
    if sets.shape[1] <= MAX_COMPARED_IDS or keras.backend.backend() != "jax":
        return ops.any(ops.equal(ops.expand_dims(ids, 2), ops.expand_dims(sets, 1)), axis=2)
    ordered = jnp.sort(sets, axis=1)
    places = jax.vmap(jnp.searchsorted)(ordered, ids)
    return jnp.take_along_axis(ordered, jnp.minimum(places, sets.shape[1] - 1), axis=1) == ids


def results_of_rows(
    query_embeddings: Any, keys: Any, rows: Any, num_candidates: int, candidate_ids: Any
) -> tuple[Any, Any]:
    """Returns the scores and ids of the rows that the search has found."""
    has_nan = ops.any(ops.isnan(query_embeddings), axis=1, keepdims=True)
    # An approximate search may return padding rows.
    found = ops.logical_and(ops.greater(keys, -np.inf), ops.less(rows, num_candidates))
    found = ops.logical_and(found, ops.logical_not(has_nan))
    result_scores = ops.where(ops.greater(keys, LOWEST), keys, -np.inf)
    return (
        ops.where(has_nan, np.nan, result_scores),
        ops.where(found, ids_of_rows(rows, candidate_ids), np.int32(NO_CANDIDATE)),
    )
