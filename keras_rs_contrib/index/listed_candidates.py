"""Search among few listed candidates, whose rows are gathered: pure functions of arrays.

The cost follows the length of the list and not the size of the corpus. A list for all queries becomes a small table of
its own, which is searched like the whole one. Lists for each query are read row by row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp
from keras import ops

from keras_rs_contrib.ids import NOT_IN_LIST
from keras_rs_contrib.index.candidate_rows import ids_of_rows, rows_of_ids
from keras_rs_contrib.index.exchange import Exchange, gather_rows, on_shards
from keras_rs_contrib.index.ranks import ranks
from keras_rs_contrib.index.score_blocks import Search, compiled, in_blocks, to_keys
from keras_rs_contrib.index.top_k import contains, results_of_rows, top_k
from keras_rs_contrib.scores import comparable_candidates, comparable_queries


@compiled
def top_k_of_listed(
    query_embeddings: Any,
    table: Any,
    include_ids: Any,
    k: int,
    search: Search,
    candidate_ids: Any = None,
    id_lookup: Any = None,
    exclude_ids: Any = None,
    own_exclude_ids: Any = None,
) -> tuple[Any, Any]:
    """Returns the k listed candidates with the highest scores for each query, in the order of `top_k`.

    Args:
        query_embeddings: as in `top_k`, like all arguments that are not described here.
        table: the table.
        include_ids: `[m]` int32, the candidates to search for all queries, or `[num_queries, m]`, for each query.
            Duplicates, and ids that no candidate has, have no effect.
        k: the number of candidates, which may exceed m.
        search: settings of the search.
        candidate_ids: the ids.
        id_lookup: as in `rows_of_ids`.
        exclude_ids: ids to exclude for each query.
        own_exclude_ids: `[n]` int32 ids to exclude for all queries, sorted; or `None`.

    Returns:
        As in `top_k`.
    """
    rows, is_listed = _listed_rows(include_ids, id_lookup, own_exclude_ids, search.num_candidates)
    num_found = min(k, rows.shape[-1])
    if len(rows.shape) == 1:
        scores, ids = top_k(
            query_embeddings,
            _gather_listed(table, rows, search),
            num_found,
            _search_of_listed(search, rows.shape[0]),
            ids_of_rows(rows, candidate_ids),
            exclude_ids,
            ops.logical_not(is_listed),
        )
    elif keras.backend.backend() != "jax":
        included = ops.where(is_listed, rows, search.num_candidates)
        return top_k(query_embeddings, table, k, search, candidate_ids, exclude_ids, None, included)  # type: ignore[no-any-return]
    else:
        scores, ids = _top_k_of_lists(
            query_embeddings, table, rows, is_listed, num_found, search, candidate_ids, exclude_ids
        )
    return _padded_to(k, scores, ids)


@compiled
def ranks_of_listed(
    query_embeddings: Any,
    table: Any,
    target_rows: Any,
    include_ids: Any,
    search: Search,
    id_lookup: Any = None,
    exclude_rows: Any = None,
    own_exclude_ids: Any = None,
) -> Any:
    """Returns how many listed candidates rank before the target candidates of each query, in the order of `top_k`.

    Args:
        query_embeddings: as in `ranks`, like all arguments that are not described here.
        table: the table.
        target_rows: `[num_queries, n]` int32, the rows of the target candidates.
        include_ids: as in `top_k_of_listed`.
        search: settings of the search.
        id_lookup: as in `rows_of_ids`.
        exclude_rows: rows that do not count for the query.
        own_exclude_ids: as in `top_k_of_listed`.

    Returns:
        `[num_queries, n]` int32, 0 is best. `NOT_IN_LIST` for targets that are not listed, and queries with NaN.
    """
    rows, is_listed = _listed_rows(include_ids, id_lookup, own_exclude_ids, search.num_candidates)
    if keras.backend.backend() != "jax":
        included = ops.where(is_listed, rows, search.num_candidates)
        if len(rows.shape) == 1:
            included = ops.broadcast_to(included, (ops.shape(target_rows)[0], rows.shape[0]))
        return ranks(query_embeddings, table, target_rows, search, exclude_rows, None, included)
    places, is_known = _places(rows, is_listed, target_rows)
    if rows.ndim == 1:
        exclude_places = None
        if exclude_rows is not None:
            exclude_places, is_excluded = _places(rows, is_listed, exclude_rows)
            exclude_places = jnp.where(is_excluded, exclude_places, rows.shape[0])
        few, among = _gather_listed(table, rows, search), _search_of_listed(search, rows.shape[0])
        counts = ranks(query_embeddings, few, places, among, exclude_places, ~is_listed)
    else:
        counts = _ranks_of_lists(query_embeddings, table, places, rows, is_listed, search, exclude_rows)
        is_known &= ~jnp.isnan(query_embeddings).any(axis=1, keepdims=True)
    return jnp.where(is_known, counts, NOT_IN_LIST)


def _listed_rows(include_ids: Any, id_lookup: Any, own_exclude_ids: Any, num_candidates: int) -> tuple[Any, Any]:
    """Returns the rows of a list in ascending order, and which of them are searched, both of shape `[..., m]`.

    The others stand for no candidate: unknown ids, excluded candidates and duplicates.
    """
    rows = rows_of_ids(include_ids, id_lookup, num_candidates)
    if own_exclude_ids is not None:
        places = ops.cast(ops.searchsorted(own_exclude_ids, ops.reshape(include_ids, (-1,))), "int32")
        places = ops.reshape(ops.minimum(places, own_exclude_ids.shape[0] - 1), ops.shape(include_ids))
        rows = ops.where(ops.equal(ops.take(own_exclude_ids, places, axis=0), include_ids), num_candidates, rows)
    # Lower rows first, so that equal scores keep their order.
    rows = ops.sort(rows, axis=-1)
    padding = [(0, 0)] * (len(rows.shape) - 1) + [(1, 0)]
    is_first = ops.pad(ops.not_equal(rows[..., 1:], rows[..., :-1]), padding, constant_values=True)
    return rows, ops.logical_and(is_first, ops.less(rows, num_candidates))


def _gather_listed(table: Any, rows: Any, search: Search) -> Any:
    return gather_rows(table, ops.minimum(rows, search.num_candidates - 1), search.layout)


def _search_of_listed(search: Search, num_listed: int) -> Search:
    """Returns how the table of a list is searched: every device holds it, and it is too short to approximate."""
    layout = None if search.layout is None else dataclasses.replace(search.layout, row_axis=None)
    return dataclasses.replace(search, num_candidates=num_listed, recall_target=None, layout=layout)


def _padded_to(k: int, scores: Any, ids: Any) -> tuple[Any, Any]:
    """Returns `[num_queries, k]` scores and ids, with missing results at the end."""
    missing = ((0, 0), (0, k - scores.shape[1]))
    if not missing[1][1]:
        return scores, ids
    # The scores of a query with NaN are all NaN.
    last = ops.where(ops.isnan(scores[:, :1]), np.nan, -np.inf)
    added = ops.broadcast_to(ops.cast(last, scores.dtype), (ops.shape(scores)[0], missing[1][1]))
    return ops.concatenate([scores, added], axis=1), ops.pad(ids, missing, constant_values=-1)


def _keys_of_lists(exchange: Exchange, queries: Any, rows: Any, shard: Any, search: Search) -> Any:
    """Returns the sort keys of the listed rows of each query of the device, `[num_queries, m]`."""
    num_rows, dimension = shard.shape
    own_rows = exchange.all_queries(rows) - exchange.first_row(num_rows)

    def keys_in_block(queries: Any, rows: Any) -> Any:
        candidates = comparable_candidates(jnp.take(shard, rows, axis=0, mode="clip"), search.similarity)
        queries = comparable_queries(queries, search.similarity)
        # A sum gives equal rows equal scores, which a product with a single query does not on a CPU. It is as fast:
        # the time goes into reading the rows.
        keys = to_keys(jnp.sum(candidates * queries[:, None], axis=-1))
        return jnp.where((rows >= 0) & (rows < num_rows), keys, 0.0)

    # On each device a key is that of its own row, or 0.
    return exchange.total(
        in_blocks(keys_in_block, max(1, rows.shape[1]) * dimension, search, exchange.all_queries(queries), own_rows)
    )


def _top_k_of_lists(
    query_embeddings: Any,
    table: Any,
    rows: Any,
    is_listed: Any,
    k: int,
    search: Search,
    candidate_ids: Any,
    exclude_ids: Any,
) -> tuple[Any, Any]:
    def top_k_of_shard(
        exchange: Exchange, queries: Any, rows: Any, is_listed: Any, exclude_ids: Any, shard: Any, candidate_ids: Any
    ) -> tuple[Any, Any]:
        keys = _keys_of_lists(exchange, queries, rows, shard, search)
        if exclude_ids is not None:
            is_listed &= ~contains(exclude_ids, ids_of_rows(rows, candidate_ids))
        keys, places = lax.top_k(jnp.where(is_listed, keys, -jnp.inf), k)
        return keys, jnp.take_along_axis(rows, places, axis=1)

    keys, rows = on_shards(
        top_k_of_shard,
        search.layout,
        ("queries", query_embeddings),
        ("queries", rows),
        ("queries", is_listed),
        ("queries", exclude_ids),
        ("table", table),
        ("nothing", candidate_ids),
    )
    return results_of_rows(query_embeddings, keys, rows, search.num_candidates, candidate_ids)


def _places(rows: Any, is_listed: Any, wanted_rows: Any) -> tuple[Any, Any]:
    """Returns where wanted rows are in their list, and whether they are listed, both `[num_queries, n]`.

    Args:
        rows: `[m]` or `[num_queries, m]` int32, ascending.
        is_listed: shape of `rows`, whether a row counts.
        wanted_rows: `[num_queries, n]` int32.
    """
    if rows.ndim == 1:
        places = jnp.minimum(jnp.searchsorted(rows, wanted_rows), rows.shape[0] - 1)
        return places, (rows[places] == wanted_rows) & is_listed[places]
    places = jnp.minimum(jax.vmap(jnp.searchsorted)(rows, wanted_rows), rows.shape[1] - 1)
    found = jnp.take_along_axis(rows, places, axis=1) == wanted_rows
    return places, found & jnp.take_along_axis(is_listed, places, axis=1)


def _ranks_of_lists(
    query_embeddings: Any, table: Any, places: Any, rows: Any, is_listed: Any, search: Search, exclude_rows: Any
) -> Any:
    def ranks_of_shard(
        exchange: Exchange, queries: Any, places: Any, rows: Any, is_listed: Any, exclude_rows: Any, shard: Any
    ) -> Any:
        keys = _keys_of_lists(exchange, queries, rows, shard, search)
        if exclude_rows is not None:
            is_listed &= ~contains(exclude_rows, rows)

        def count(place: Any) -> Any:
            key = jnp.take_along_axis(keys, place[:, None], axis=1)
            is_lower = jnp.arange(keys.shape[1]) < place[:, None]
            before = (keys > key) | ((keys == key) & is_lower)
            return jnp.sum(before & is_listed, axis=1, dtype=jnp.int32)

        return lax.map(count, places.T).T

    return on_shards(
        ranks_of_shard,
        search.layout,
        ("queries", query_embeddings),
        ("queries", places),
        ("queries", rows),
        ("queries", is_listed),
        ("queries", exclude_rows),
        ("table", table),
    )
