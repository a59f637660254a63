"""Exact top-k of a candidate table and ranks within it, whole or split over devices: pure functions of arrays.

Scores are made in blocks of some queries by all rows that a device holds, and a block is searched in two levels: the
maxima of groups of consecutive rows, and then the rows of the best k groups. Both read a block once, where a top-k of
the whole block would cost as much as the matrix product that makes it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from keras import ops

from keras_rs_contrib import losses
from keras_rs_contrib.candidate_ids import NO_CANDIDATE
from keras_rs_contrib.distribution import TableLayout

# Scores in a block: 256 MiB.
BLOCK_SIZE = 2**26
# Queries in a block: enough for a matrix product at full speed, and 64 columns of scores fill whole vectors.
QUERIES_IN_BLOCK = 64
# Of a small corpus, a block has more of them: up to so many scores stay in the cache.
CACHED_SCORES = 2**19
# Rows that the product with a single query takes at once: XLA's 8, and some to spare.
KERNEL_ROWS = 16
# Scores in a block from which on two levels pay.
MIN_TWO_LEVEL_SIZE = 2**16
# Stands for a score of -inf, and for one that is no number, wherever scores are ordered, and -inf for no candidate.
LOWEST = float(np.finfo(np.float32).min)
# Up to so many ids are compared with each id of a result, beyond that they are sorted first.
MAX_COMPARED_IDS = 256


@dataclasses.dataclass(frozen=True)
class Search:
    """How a table is searched; static, so that a function compiles once for each.

    Attributes:
        num_candidates: rows of the table that are candidates, the first ones; the others are padding.
        similarity: `"dot"` or `"cosine"`.
        block_size: how many scores a device makes at once.
        recall_target: the expected share of the exact top-k to find, in (0, 1], on a TPU; `None`, and any other
            device, finds all.
        layout: how the table lies on a mesh, or `None` where it lies on one device.
    """

    num_candidates: int
    similarity: str = "dot"
    block_size: int = BLOCK_SIZE
    recall_target: float | None = None
    layout: TableLayout | None = None


def scores(query_embeddings: Any, table: Any, similarity: str) -> Any:
    """Returns the score of every query with every row of the table.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float.
        table: `[num_rows, embedding_dim]` float.
        similarity: `"dot"` or `"cosine"`.

    Returns:
        `[num_queries, num_rows]` float32.
    """
    queries = losses.to_comparable(query_embeddings, similarity)
    return ops.matmul(queries, ops.transpose(losses.to_comparable(table, similarity)))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function compiled, on JAX: called eagerly, each of its steps would write the scores anew."""
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
    """Returns the k candidates that score highest for each query, best first.

    Equal scores rank by lower row first; a score that is no number ranks as -inf. Of a table on a mesh, each device
    scores its own queries with its own rows. A table that every device holds needs no traffic. Of one whose rows are
    split, k pairs a query and shard travel: neither scores nor rows of the table. Where one mesh axis splits both, the
    queries travel too.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float, split over the batch axis or not.
        table: `[num_rows, embedding_dim]` float, laid out as `search.layout` says.
        k: how many candidates, at most `search.num_candidates`.
        search: how to search.
        candidate_ids: `[search.num_candidates]` int32, or `None`, where row numbers are the ids.
        exclude_ids: `[num_queries, m]` int32 ids that the query is not to get, -1 for none, at the cost of a
            top-(k+m); or `None`.
        excluded: `[num_rows]` bool, True for rows that no query is to get, at a cost that does not depend on their
            number; or `None`.

    Returns:
        Scores `[num_queries, k]` float32 and ids `[num_queries, k]` int32. Where fewer than k candidates remain, the
        rest are -inf and -1. A query that is not a number has NaN and -1 alone.
    """
    if keras.backend.backend() != "jax":
        keys = _keys(scores(query_embeddings, table, search.similarity), ops)
        if excluded is not None:
            keys = ops.where(ops.expand_dims(excluded, 0), -np.inf, keys)
        keys, rows = ops.top_k(keys, search.num_candidates)
        keys, rows = _without_excluded(keys, ops.cast(rows, "int32"), k, search, candidate_ids, exclude_ids)
        return _result(query_embeddings, keys, rows, candidate_ids)

    def top_k_of_shard(
        exchange: Exchange, queries: Any, exclude_ids: Any, shard: Any, excluded: Any, candidate_ids: Any
    ) -> tuple[Any, Any]:
        queries, exclude_ids = exchange.all_queries(queries), exchange.all_queries(exclude_ids)
        num_rows = shard.shape[0]
        # Rows to find before those that do not count are dropped. Rows that are `excluded` do not take a place.
        num_dropped = 0 if exclude_ids is None else exclude_ids.shape[1]
        if excluded is None:
            num_dropped += exchange.num_shards * num_rows - search.num_candidates
        num_found = min(k + num_dropped, num_rows)

        def search_block(block: Any) -> tuple[Any, Any]:
            return _search(_score_block(block, shard, search), num_found, excluded, search)

        keys, rows = _in_blocks(search_block, num_rows, search, queries)
        rows = rows + exchange.first_row(num_rows)
        if num_dropped:
            # Each shard keeps up to k rows: all k winners may lie on one shard.
            keys, rows = _without_excluded(keys, rows, min(k, num_rows), search, candidate_ids, exclude_ids)
        if exchange.num_shards > 1:
            # In the order of the shards, and so in that of the rows: equal scores keep their order through the merge.
            keys, rows = exchange.own_queries(keys), exchange.own_queries(rows)
            keys, places = lax.top_k(keys, k)
            rows = jnp.take_along_axis(rows, places, axis=1)
        return keys, rows

    keys, rows = _on_shards(
        top_k_of_shard,
        search,
        ("queries", query_embeddings),
        ("queries", exclude_ids),
        ("table", table),
        ("table", excluded),
        ("nothing", candidate_ids),
    )
    return _result(query_embeddings, keys, rows, candidate_ids)


@functools.partial(jax.jit, static_argnames=("search",))
def ranks(
    query_embeddings: Any, table: Any, target_rows: Any, search: Search, exclude_rows: Any = None, excluded: Any = None
) -> Any:
    """Returns how many candidates rank before some candidates of each query, in the order of `top_k`.

    No top-k is made, and of a table whose rows are split, two numbers a target travel: its score, and the count.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float.
        table: `[num_rows, embedding_dim]` float, laid out as `search.layout` says.
        target_rows: `[num_queries]` or `[num_queries, n]` int32, the rows of the candidates whose ranks are wanted.
        search: how to search.
        exclude_rows: `[num_queries, m]` int32 rows that do not count for the query; those outside the table are
            ignored. `None` for none.
        excluded: `[num_rows]` bool, True for rows that do not count; or `None`.

    Returns:
        int32, shape of `target_rows`, 0 is best. For a query that is not a number, `search.num_candidates`.
    """

    def ranks_of_shard(
        exchange: Exchange, queries: Any, target_rows: Any, exclude_rows: Any, shard: Any, excluded: Any
    ) -> Any:
        queries, target_rows = exchange.all_queries(queries), exchange.all_queries(target_rows)
        exclude_rows = exchange.all_queries(exclude_rows)
        num_rows = shard.shape[0]
        first_row = exchange.first_row(num_rows)
        rows = lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
        counts = rows < search.num_candidates - first_row
        if excluded is not None:
            counts &= ~excluded[:, None]

        def count_in_block(block: Any, target_rows: Any, exclude_rows: Any) -> Any:
            scores = _score_block(block, shard, search)
            columns = jnp.arange(block.shape[0], dtype=jnp.int32)
            own_rows = target_rows - first_row
            is_own = (own_rows >= 0) & (own_rows < num_rows)
            own_scores = scores[jnp.clip(own_rows, 0, num_rows - 1), columns[:, None]]
            target_keys = exchange.maximum(jnp.where(is_own, _keys(own_scores), -jnp.inf))
            keys = _keys(scores)
            if exclude_rows is not None:
                # Neither above the target's score nor equal to it, however often the row is named.
                keys = keys.at[exclude_rows - first_row, columns[:, None]].set(
                    jnp.nan, mode="drop", wrap_negative_indices=False
                )

            def count(target: tuple[Any, Any]) -> Any:
                key, row = target
                before = (keys > key) | ((keys == key) & (rows < row))
                return jnp.sum(before & counts, axis=0, dtype=jnp.int32)

            if target_rows.shape[1] == 1:
                return count((target_keys[:, 0], own_rows[:, 0]))[:, None]
            return lax.map(count, (target_keys.T, own_rows.T)).T

        return exchange.total(_in_blocks(count_in_block, num_rows, search, queries, target_rows, exclude_rows))

    counts = _on_shards(
        ranks_of_shard,
        search,
        ("queries", query_embeddings),
        ("queries", target_rows.reshape(target_rows.shape[0], -1)),
        ("queries", exclude_rows),
        ("table", table),
        ("table", excluded),
    )
    no_number = jnp.isnan(query_embeddings).any(axis=1, keepdims=True)
    return jnp.where(no_number, search.num_candidates, counts).reshape(target_rows.shape)


def on_mesh(array: Any, layout: TableLayout | None) -> Any:
    """Returns `array` on the devices of the mesh, for it may lie on one that is not of it, or on one alone.

    Args:
        array: array of any shape, concrete or traced, or `None`.
        layout: the mesh, or `None`, where the array stays where it is.
    """
    if array is None or layout is None or isinstance(array, jax.core.Tracer):
        return array
    return jax.device_put(array, NamedSharding(layout.mesh, PartitionSpec()))


def _keys(scores: Any, numpy: Any = jnp) -> Any:
    """Returns scores as they are ordered: above -inf, in which what is no number ranks last, without negative zeros.

    XLA's top-k puts -0.0 below 0.0, and they are equal.
    """
    keys = numpy.where(scores > LOWEST, scores, LOWEST)
    return numpy.where(keys == 0.0, 0.0, keys)


def _score_block(queries: Any, table: Any, search: Search) -> Any:
    """Returns the `[num_rows, num_queries]` float32 scores of some queries.

    Rows come first, so that the reductions over rows that follow run along whole vectors of queries.
    """
    queries = losses.to_comparable(queries, search.similarity)

    def product(rows: Any) -> Any:
        return _product(losses.to_comparable(rows, search.similarity), queries)

    num_rows, dimension = table.shape
    num_converted = max(1, search.block_size // dimension)
    if (table.dtype == jnp.float32 and search.similarity == "dot") or num_rows <= num_converted:
        return product(table)

    # A converted copy of the whole table would be no block. (On a CPU, where XLA slices no bfloat16, it makes one yet.)
    def convert_and_score(i: Any, result: Any) -> Any:
        # The last one overlaps the one before, and writes the same scores.
        start = jnp.minimum(i * num_converted, num_rows - num_converted)
        part = product(lax.dynamic_slice_in_dim(table, start, num_converted))
        return lax.dynamic_update_slice_in_dim(result, part, start, axis=0)

    empty = jnp.zeros((num_rows, queries.shape[0]), jnp.float32)
    return lax.fori_loop(0, -(-num_rows // num_converted), convert_and_score, empty)


def _product(rows: Any, queries: Any) -> Any:
    """Returns the inner product of every row with every query, equal for rows that are equal."""

    def multiply(rows: Any) -> Any:
        # The default precision of an accelerator may be lower than float32.
        return lax.dot_general(rows, queries, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)

    num_rows = rows.shape[0]
    left = num_rows % KERNEL_ROWS
    if queries.shape[0] > 1 or not left:
        return multiply(rows)
    # XLA's product with a single query, on a CPU, rounds the last rows, which do not fill its kernel, otherwise than
    # all others. Among as many as fill it, they are rounded alike.
    if num_rows < KERNEL_ROWS:
        return multiply(jnp.pad(rows, ((0, KERNEL_ROWS - left), (0, 0))))[:num_rows]
    start = num_rows - KERNEL_ROWS
    return lax.dynamic_update_slice_in_dim(multiply(rows), multiply(rows[start:]), start, axis=0)


def _in_blocks(function: Callable[..., Any], num_rows: int, search: Search, *arrays: Any) -> Any:
    """Returns what `function` does for all queries, called with as many of them at once as make a block.

    Args:
        function: takes some rows of each of the arrays, or `None` for one that is `None`; returns arrays with a row for
            each query.
        num_rows: how many scores a query has.
        search: names the size of a block.
        *arrays: `[num_queries, ...]`, or `None`.
    """
    num_queries = arrays[0].shape[0]
    most = max(1, min(max(QUERIES_IN_BLOCK, CACHED_SCORES // num_rows), search.block_size // num_rows))
    num_blocks = max(1, -(-num_queries // most))
    if num_blocks == 1:
        return function(*arrays)
    # Blocks of one size: no query pads more than another.
    size = -(-num_queries // num_blocks)

    def to_blocks(array: Any) -> Any:
        padding = ((0, num_blocks * size - num_queries), *[(0, 0)] * (array.ndim - 1))
        return jnp.pad(array, padding).reshape(num_blocks, size, *array.shape[1:])

    result = lax.map(lambda block: function(*block), jax.tree.map(to_blocks, arrays))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:num_queries], result)


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
        keys = _keys(scores)
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
            lambda column: _one_level_top_k(_keys(lax.dynamic_index_in_dim(scores, column, axis=1, keepdims=False)), k),
            jnp.arange(scores.shape[1]),
        ),
        lambda scores, maxima: _two_level_top_k(scores, maxima, k, group_size, _keys),
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
    scores: Any, maxima: Any, k: int, group_size: int, to_keys: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Returns the best k rows, all of which lie in the best k groups, or after the last whole group.

    Exact, also in its order: a row outside the best k groups has at least k rows before it, one in each. Groups of
    consecutive rows keep this true for equal scores, of which the lower row is better.

    Args:
        scores: `[num_rows, num_queries]` float32.
        maxima: `[num_groups, num_queries]`, of the groups' scores.
        k: how many rows, at most `num_groups`.
        group_size: rows in a group.
        to_keys: applied to scores before they are ordered.

    Returns:
        Keys `[num_queries, k]` and rows `[num_queries, k]` int32.
    """
    num_rows, num_queries = scores.shape
    _, groups = lax.top_k(to_keys(maxima).T, k)
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
    keys, places = lax.top_k(to_keys(members), k)
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


def _result(query_embeddings: Any, keys: Any, rows: Any, candidate_ids: Any) -> tuple[Any, Any]:
    """Returns scores and ids of the rows found."""
    no_number = ops.any(ops.isnan(query_embeddings), axis=1, keepdims=True)
    found = ops.logical_and(ops.greater(keys, -np.inf), ops.logical_not(no_number))
    result_scores = ops.where(ops.greater(keys, LOWEST), keys, -np.inf)
    return (
        ops.where(no_number, np.nan, result_scores),
        ops.where(found, _ids(rows, candidate_ids), np.int32(NO_CANDIDATE)),
    )


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What travels between the devices of a mesh; nothing, where each holds the whole table.

    Attributes:
        layout: how the table lies on the mesh, or `None` where it lies on one device.
    """

    layout: TableLayout | None

    @property
    def row_axis(self) -> str | None:
        """The mesh axis that splits the rows, if any."""
        return None if self.layout is None else self.layout.row_axis

    @property
    def num_shards(self) -> int:
        """Over how many devices the rows are split."""
        return 1 if self.row_axis is None else int(self.layout.mesh.shape[self.row_axis])  # type: ignore[union-attr]

    @property
    def _gathers_queries(self) -> bool:
        return self.row_axis is not None and self.row_axis == self.layout.batch_axis  # type: ignore[union-attr]

    def first_row(self, num_rows: int) -> Any:
        """Returns which row of the table is the first of this device, each of which holds `num_rows`."""
        return 0 if self.row_axis is None else lax.axis_index(self.row_axis).astype(jnp.int32) * num_rows

    def all_queries(self, array: Any) -> Any:
        """Returns the rows of `array` of all queries that are to meet the rows of this device."""
        if array is None or not self._gathers_queries:
            return array
        return lax.all_gather(array, self.row_axis, axis=0, tiled=True)

    def own_queries(self, array: Any) -> Any:
        """Returns what all shards found for this device's queries, side by side in the order of the shards."""
        if self._gathers_queries:
            return lax.all_to_all(array, self.row_axis, split_axis=0, concat_axis=1, tiled=True)
        return lax.all_gather(array, self.row_axis, axis=1, tiled=True)

    def maximum(self, array: Any) -> Any:
        """Returns the largest of the shards' values, element by element."""
        return array if self.row_axis is None else lax.pmax(array, self.row_axis)

    def total(self, array: Any) -> Any:
        """Returns the sum of the shards' values for this device's queries, `[num_queries, ...]`."""
        if self._gathers_queries:
            return lax.psum_scatter(array, self.row_axis, tiled=True)
        return array if self.row_axis is None else lax.psum(array, self.row_axis)


def _on_shards(function: Callable[..., Any], search: Search, *arrays: tuple[str, Any]) -> Any:
    """Returns what `function` does on every device with its part of the arrays.

    Args:
        function: takes an `Exchange` and the parts; returns arrays with a row for each query of the device.
        search: names the layout.
        *arrays: pairs of what splits an array's rows, `"queries"`, `"table"` or `"nothing"`, and the array, or `None`.
    """
    layout = search.layout
    if layout is None:
        return function(Exchange(None), *(array for _, array in arrays))
    axes = {"queries": layout.batch_axis, "table": layout.row_axis, "nothing": None}
    num_queries = arrays[0][1].shape[0]
    # Keras feeds batches that divide; a layer called on its own may see others.
    padding = -num_queries % layout.num_batch_shards

    def padded(array: Any) -> Any:
        return jnp.pad(array, ((0, padding), *[(0, 0)] * (array.ndim - 1)))

    result = jax.shard_map(
        functools.partial(function, Exchange(layout)),
        mesh=layout.mesh,
        in_specs=tuple(PartitionSpec(axes[split]) for split, _ in arrays),
        out_specs=PartitionSpec(layout.batch_axis),
        # After an exchange all shards of the row axis hold the same, which JAX cannot see.
        check_vma=False,
    )(*(jax.tree.map(padded, array) if split == "queries" and padding else array for split, array in arrays))
    return jax.tree.map(lambda array: array[:num_queries], result)


def _platform(search: Search) -> str:
    """Returns which kind of device does the search."""
    if search.layout is None:
        return str(jax.default_backend())
    return str(search.layout.mesh.devices.flat[0].platform)
