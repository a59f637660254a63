"""Exact top-k of a candidate table, whole or split over devices: pure functions of arrays.

A block of scores is searched in two levels: the maxima of groups of consecutive rows, and then the rows of the best k
groups. Both levels read a block once, while a top-k of the whole block would cost as much as the matrix product that
computes it.
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
from keras_rs_contrib.index.exchange import Exchange, on_shards
from keras_rs_contrib.index.score_blocks import LOWEST, Search, in_blocks, score_block, to_keys, without_padding
from keras_rs_contrib.scores import score_matrix

# Scores in a block from which two levels are faster than one.
MIN_TWO_LEVEL_SIZE = 2**16
# Up to this many ids are compared with each id of a result; more are sorted first.
MAX_COMPARED_IDS = 256


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function compiled, on JAX: run eagerly, each of its steps would write the scores anew."""
    return jax.jit(function, static_argnames=("k", "search")) if keras.backend.backend() == "jax" else function


@_compiled
def top_k(
    query_embeddings: Any,
    table: Any,
    k: int,
    search: Search,
    candidate_ids: Any = None,
    exclude_ids: Any = None,
    excluded: Any = None,
) -> tuple[Any, Any]:
    """Returns the k candidates with the highest scores for each query, best first.

    Equal scores rank by lower row first, and a NaN score ranks as -inf. On a mesh, each device scores queries with its
    own rows. A table that every device holds needs no traffic. If the rows are split, k pairs for each query and shard
    travel, and neither scores nor rows of the table. If one mesh axis splits both, the queries travel too.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float, split over the batch axis or not.
        table: `[num_rows, embedding_dim]` float, laid out as `search.layout` says.
        k: the number of candidates, at most `search.num_candidates`.
        search: how to search.
        candidate_ids: `[search.num_candidates]` int32, or `None` if row numbers are the ids.
        exclude_ids: `[num_queries, m]` int32 ids that are not returned for the query, -1 for none, at the cost of a
            top-(k + m); or `None`.
        excluded: `[num_rows]` bool, True for rows that are never returned, padding included, at a cost that does not
            depend on their number; or `None`.

    Returns:
        Scores `[num_queries, k]` float32 and ids `[num_queries, k]` int32. If fewer than k candidates remain, the rest
        are -inf and -1. A query with NaN has NaN scores and ids -1.
    """
    if keras.backend.backend() != "jax":
        keys = to_keys(score_matrix(query_embeddings, table, search.similarity)[:, : search.num_candidates], ops)
        if excluded is not None:
            keys = ops.where(ops.expand_dims(excluded[: search.num_candidates], 0), -np.inf, keys)
        keys, rows = ops.top_k(keys, search.num_candidates)
        keys, rows = _without_excluded(keys, ops.cast(rows, "int32"), k, search, candidate_ids, exclude_ids)
        return _result(query_embeddings, keys, rows, search.num_candidates, candidate_ids)

    def top_k_of_shard(
        exchange: Exchange, queries: Any, exclude_ids: Any, shard: Any, excluded: Any, candidate_ids: Any
    ) -> tuple[Any, Any]:
        queries, exclude_ids = exchange.all_queries(queries), exchange.all_queries(exclude_ids)
        num_rows = shard.shape[0]
        first_row = exchange.first_row(num_rows)
        # Rows to find in addition to k, because some are dropped afterwards. `excluded` rows are never found.
        num_dropped = 0 if exclude_ids is None else exclude_ids.shape[1]
        num_found = min(k + num_dropped, num_rows)

        def search_block(block: Any) -> tuple[Any, Any]:
            scores = score_block(block, shard, search)
            if excluded is None:
                num_padding_rows = exchange.num_shards * num_rows - search.num_candidates
                scores = without_padding(scores, search.num_candidates - first_row, num_padding_rows)
            return _search(scores, num_found, excluded, search)

        keys, rows = in_blocks(search_block, num_rows, search, queries)
        rows = rows + first_row
        if num_dropped:
            # Each shard keeps up to k rows: all k winners may be on one shard.
            keys, rows = _without_excluded(keys, rows, min(k, num_rows), search, candidate_ids, exclude_ids)
        if exchange.num_shards > 1:
            # In the order of the shards, and so of the rows: equal scores keep their order through the merge.
            keys, rows = exchange.own_queries(keys), exchange.own_queries(rows)
            keys, places = lax.top_k(keys, k)
            rows = jnp.take_along_axis(rows, places, axis=1)
        return keys, rows

    keys, rows = on_shards(
        top_k_of_shard,
        search.layout,
        ("queries", query_embeddings),
        ("queries", exclude_ids),
        ("table", table),
        ("table", excluded),
        ("nothing", candidate_ids),
    )
    return _result(query_embeddings, keys, rows, search.num_candidates, candidate_ids)


def _search(scores: Any, k: int, excluded: Any, search: Search) -> tuple[Any, Any]:
    """Returns the k best rows of a block, and their keys.

    Args:
        scores: `[num_rows, num_queries]` float32.
        k: how many rows.
        excluded: `[num_rows]` bool, or `None`.
        search: names the recall.

    Returns:
        Keys `[num_queries, k]` float32, -inf for an excluded row, and rows `[num_queries, k]` int32.
    """

    def all_keys() -> Any:
        keys = to_keys(scores)
        return keys if excluded is None else jnp.where(excluded[:, None], -jnp.inf, keys)

    if search.recall_target is not None and _platform(search) == "tpu":
        keys, rows = lax.approx_max_k(all_keys().T, k, recall_target=search.recall_target)
        return keys, rows
    num_rows = scores.shape[0]
    group_size = _group_size(num_rows, k) if scores.size >= MIN_TWO_LEVEL_SIZE else 1
    if group_size == 1:
        return _one_level_top_k(all_keys().T, k)
    if excluded is not None:
        keys = all_keys()
        return _two_level_top_k(keys, _reduce_groups(keys, lax.max, -np.inf, group_size), k, group_size, lambda x: x)
    maxima = _reduce_groups(scores, lax.max, -np.inf, group_size)
    # Sums, as XLA's maxima over windows pass over what is no number, and over what came before it.
    sums = _reduce_groups(scores, lax.add, 0.0, group_size)
    # Cleaning all scores would cost as much as finding the maxima: it waits until one of them is no number, and then
    # goes query by query, for its memory is set aside in any case.
    return lax.cond(  # type: ignore[no-any-return]
        jnp.isnan(sums).any(),
        lambda scores, maxima: lax.map(
            lambda column: _one_level_top_k(
                to_keys(lax.dynamic_index_in_dim(scores, column, axis=1, keepdims=False)), k
            ),
            jnp.arange(scores.shape[1]),
        ),
        lambda scores, maxima: _two_level_top_k(scores, maxima, k, group_size, to_keys),
        scores,
        maxima,
    )


def _one_level_top_k(keys: Any, k: int) -> tuple[Any, Any]:
    keys, rows = lax.top_k(keys, k)
    return keys, rows


def _group_size(num_rows: int, k: int) -> int:
    """Returns how many rows make a group, 1 where a search in two levels does not pay.

    The first level searches `num_rows / group_size` maxima and the second `k * group_size` rows: least where they are
    equal, at the square root.
    """
    size = 2 ** round(np.log2(max(1.0, num_rows / k)) / 2)
    return 1 if size < 8 else int(np.clip(size, 16, 128))


def _reduce_groups(scores: Any, operation: Callable[[Any, Any], Any], initial: float, group_size: int) -> Any:
    """Returns the reduction of each whole group of consecutive rows, `[num_groups, num_queries]`."""
    window = (group_size, 1)
    return lax.reduce_window(scores, initial, operation, window, window, "VALID")


def _two_level_top_k(
    scores: Any, maxima: Any, k: int, group_size: int, key_of: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Returns the best k rows, all of which lie in the best k groups, or after the last whole group.

    Exact, also in its order: a row outside the best k groups has at least k rows before it, one in each. Groups of
    consecutive rows keep this true for equal scores, of which the lower row is better.

    Args:
        scores: `[num_rows, num_queries]` float32.
        maxima: `[num_groups, num_queries]`, of the groups' scores.
        k: how many rows, at most `num_groups`.
        group_size: rows in a group.
        key_of: applied to scores before they are ordered.

    Returns:
        Keys `[num_queries, k]` and rows `[num_queries, k]` int32.
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
    """Returns the first k rows that a query may get, in their order, and their keys; -inf beyond the last.

    Args:
        keys: `[num_queries, n]` float32, best first.
        rows: `[num_queries, n]` int32 rows of the whole table.
        k: how many rows.
        search: names the number of candidates.
        candidate_ids: `[num_candidates]` int32, or `None`.
        exclude_ids: `[num_queries, m]` int32, or `None`.
    """
    dropped = ops.greater_equal(rows, search.num_candidates)
    if exclude_ids is not None:
        dropped = ops.logical_or(dropped, contains(exclude_ids, _ids(rows, candidate_ids)))
    keys, places = ops.top_k(ops.where(dropped, -np.inf, keys), k)
    return keys, ops.take_along_axis(rows, ops.cast(places, "int32"), axis=1)


def contains(sets: Any, ids: Any) -> Any:
    """Returns which of the `[num_queries, n]` ids are in their query's set, of `[num_queries, m]`."""
    if sets.shape[1] <= MAX_COMPARED_IDS or keras.backend.backend() != "jax":
        return ops.any(ops.equal(ops.expand_dims(ids, 2), ops.expand_dims(sets, 1)), axis=2)
    ordered = jnp.sort(sets, axis=1)
    places = jax.vmap(jnp.searchsorted)(ordered, ids)
    return jnp.take_along_axis(ordered, jnp.minimum(places, sets.shape[1] - 1), axis=1) == ids


def _ids(rows: Any, candidate_ids: Any) -> Any:
    if candidate_ids is None:
        return rows
    return ops.take(candidate_ids, ops.minimum(rows, candidate_ids.shape[0] - 1), axis=0)


def _result(query_embeddings: Any, keys: Any, rows: Any, num_candidates: int, candidate_ids: Any) -> tuple[Any, Any]:
    """Returns scores and ids of the rows found."""
    has_nan = ops.any(ops.isnan(query_embeddings), axis=1, keepdims=True)
    # An approximate search may find padding rows.
    found = ops.logical_and(ops.greater(keys, -np.inf), ops.less(rows, num_candidates))
    found = ops.logical_and(found, ops.logical_not(has_nan))
    result_scores = ops.where(ops.greater(keys, LOWEST), keys, -np.inf)
    return (
        ops.where(has_nan, np.nan, result_scores),
        ops.where(found, _ids(rows, candidate_ids), np.int32(NO_CANDIDATE)),
    )


def _platform(search: Search) -> str:
    """Returns which kind of device does the search."""
    if search.layout is None:
        return str(jax.default_backend())
    return str(search.layout.mesh.devices.flat[0].platform)
