"""The rows of candidates: where their ids are in the corpus, and which rows a search leaves out."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from jax import numpy as jnp
from keras import ops

from keras_rs_contrib.arguments import known_values
from keras_rs_contrib.ids import NO_CANDIDATE
from keras_rs_contrib.index.exchange import Exchange


def rows_of_ids(ids: Any, id_lookup: Any, num_candidates: int) -> Any:
    """Returns the row of each id, and `num_candidates` for an id that no candidate has.

    Args:
        ids: int32, of any shape.
        id_lookup: `[2, num_candidates]` int32, the ids in ascending order and their rows, or `None` if row numbers are
            the ids.
        num_candidates: the number of candidates.

    Returns:
        int32, shape of `ids`.
    """
    if id_lookup is None:
        known = ops.logical_and(ops.greater_equal(ids, 0), ops.less(ids, num_candidates))
        return ops.where(known, ids, num_candidates)
    id_lookup = ops.convert_to_tensor(id_lookup)
    places = ops.cast(ops.searchsorted(id_lookup[0], ops.reshape(ids, (-1,))), "int32")
    places = ops.reshape(ops.minimum(places, num_candidates - 1), ops.shape(ids))
    known = ops.equal(ops.take(id_lookup[0], places, axis=0), ids)
    return ops.where(known, ops.take(id_lookup[1], places, axis=0), num_candidates)


def check_known(candidate_ids: Any, is_unknown: Any, num_candidates: int) -> None:
    """Raises `ValueError` if no candidate has one of the ids, unless they are traced.

    Args:
        candidate_ids: `[num_queries, n]` int32.
        is_unknown: `[num_queries, n]` bool.
        num_candidates: the number of candidates.
    """
    unknown = known_values(is_unknown)
    if unknown is not None and unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise ValueError(
            "`candidate_ids` must be ids of candidates. Received: "
            f"{int(ops.convert_to_numpy(candidate_ids)[row, column])} in row {row}, which is none of the "
            f"{num_candidates}. Pass {NO_CANDIDATE} for none."
        )


def side_by_side(num_queries: Any, *ids: Any) -> Any:
    """Returns `[num_queries, n]` int32, or `None`: the ids of lists for all queries, or for each, or `None`."""
    given = [each for each in ids if each is not None and each.shape[-1]]
    # On the host, nothing is compiled.
    on_host = all(isinstance(each, np.ndarray) for each in given)
    numpy = np if on_host else ops
    rows = []
    for each in given:
        each = each.astype("int32") if on_host else ops.convert_to_tensor(each, dtype="int32")
        rows.append(each if len(each.shape) == 2 else numpy.broadcast_to(each, (num_queries, each.shape[0])))
    return numpy.concatenate(rows, axis=1) if len(rows) > 1 else rows[0] if rows else None


def ids_of_rows(rows: Any, candidate_ids: Any) -> Any:
    """Returns the ids of rows, of any shape.

    Args:
        rows: int32. The result for rows outside the corpus is an id of a candidate, or no id.
        candidate_ids: `[num_candidates]` int32, or `None` if row numbers are the ids.
    """
    if candidate_ids is None:
        return rows
    return ops.take(candidate_ids, ops.minimum(rows, candidate_ids.shape[0] - 1), axis=0)


def excluded_rows(exclude_ids: list[int], candidate_ids: Any, num_candidates: int, num_rows: int) -> Any:
    """Returns which rows of a table are never returned: excluded candidates, and padding.

    Args:
        exclude_ids: ids of candidates, sorted.
        candidate_ids: `[num_candidates]` int32, or `None` if row numbers are the ids.
        num_candidates: the number of candidates, which are the first rows.
        num_rows: rows of the table, padding included.

    Returns:
        `[num_rows]` bool.
    """
    if candidate_ids is None:
        excluded = np.zeros(num_candidates, bool)
        excluded[[i for i in exclude_ids if 0 <= i < num_candidates]] = True
    else:
        own = ops.convert_to_tensor(exclude_ids, dtype="int32")
        places = ops.searchsorted(own, ops.convert_to_tensor(candidate_ids))
        places = ops.minimum(places, len(exclude_ids) - 1)
        excluded = ops.equal(ops.take(own, places, axis=0), candidate_ids)
    return ops.pad(excluded, (0, num_rows - num_candidates), constant_values=True)


# The rows that a search is limited to for each query are `[num_queries, m]` int32 rows, or a `[num_queries, num_rows]`
# bool mask.


def is_mask(included: Any) -> bool:
    """Returns whether the rows that a search is limited to are a mask."""
    return bool(keras.backend.standardize_dtype(included.dtype) == "bool")


def split_of(included: Any) -> str:
    """Returns how `on_shards` splits the rows that a search is limited to, which may be `None`."""
    return "pairs" if included is not None and is_mask(included) else "queries"


def rows_in_shard(exchange: Exchange, included: Any, first_row: Any, num_rows: int, num_candidates: int) -> Any:
    """Returns the rows that a search is limited to, for all queries that a device scores, counted within its shard.

    Args:
        exchange: what travels between the devices.
        included: the device's part of the rows, or of the mask, or `None`.
        first_row: the row of the table at which the shard begins.
        num_rows: rows of the shard.
        num_candidates: the number of candidates; other rows stand for none.

    Returns:
        Rows outside the shard are `num_rows`. A mask, and `None`, do not change.
    """
    if included is None or is_mask(included):
        return included
    rows = exchange.all_queries(included)
    own_rows = rows - first_row
    is_own = (rows < num_candidates) & (own_rows >= 0) & (own_rows < num_rows)
    return jnp.where(is_own, own_rows, num_rows)


def excluded_in_block(excluded: Any, included: Any, num_rows: int) -> Any:
    """Returns which rows of a shard a search leaves out for each query of a block.

    Args:
        excluded: `[num_rows]` bool, rows to leave out for all queries, or `None`.
        included: rows or mask from `rows_in_shard`, of the queries of the block, or `None`.
        num_rows: rows of the shard.

    Returns:
        `[num_rows, 1]` or `[num_rows, num_queries]` bool, or `None`.
    """
    excluded = None if excluded is None else excluded[:, None]
    if included is None:
        return excluded
    if is_mask(included):
        left_out = ~included.T
    else:
        num_queries = included.shape[0]
        columns = jnp.arange(num_queries, dtype=jnp.int32)[:, None]
        left_out = jnp.ones((num_rows, num_queries), bool).at[included, columns].set(False, mode="drop")
    return left_out if excluded is None else left_out | excluded


def included_columns(included: Any, num_candidates: int) -> Any:
    """Returns the mask of the rows that a search is limited to, on any backend.

    Args:
        included: `[num_queries, m]` int32 rows, or a `[num_queries, num_rows]` bool mask.
        num_candidates: the number of candidates.

    Returns:
        `[num_queries, num_candidates]` bool.
    """
    if is_mask(included):
        return included[:, :num_candidates]
    num_queries, num_columns = ops.shape(included)[0], num_candidates + 1
    known = ops.logical_and(ops.greater_equal(included, 0), ops.less(included, num_candidates))
    starts = ops.expand_dims(ops.arange(num_queries, dtype="int32") * num_columns, 1)
    places = ops.reshape(starts + ops.where(known, included, num_candidates), (-1, 1))
    counts = ops.scatter(places, ops.ones_like(places[:, 0]), (num_queries * num_columns,))
    return ops.reshape(counts, (num_queries, num_columns))[:, :num_candidates] > 0
