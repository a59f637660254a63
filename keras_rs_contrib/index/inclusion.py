"""The candidates that a search is limited to, in the form that costs least to search."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import is_known, on_host
from keras_rs_contrib.ids import NO_CANDIDATE, to_int32
from keras_rs_contrib.index.candidate_rows import rows_of_ids
from keras_rs_contrib.index.sizes import common_size, pad_columns

# Up to this share of the rows of a device, one list for all queries is gathered into a table of its own. On two CPU
# cores, with 999,983 x 64 candidates, gathering and searching 1/8 of them takes as long as searching all for one query,
# and a quarter of that for 64.
GATHERED_SHARE = 1 / 8
# The same for a list for each query. Its rows are read for one query alone, while a product with the whole corpus reads
# a row once for 64 queries: at 1/128 of the corpus, both take as long.
GATHERED_SHARE_BY_QUERY = 1 / 128


@dataclasses.dataclass(frozen=True)
class Inclusion:
    """How a search is limited to some candidates. At most one of the attributes is not `None`.

    Attributes:
        listed_ids: `[m]` or `[num_queries, m]` int32, few candidates, whose rows are gathered.
        dropped_ids: `[n]` or `[num_queries, n]` int32, the few candidates that are left out.
        excluded: `[num_rows]` bool, rows of the table that are left out for all queries, padding rows included.
        included: `[num_queries, m]` int32 rows, or `[num_queries, num_rows]` bool, to which each query is limited.
    """

    listed_ids: Any = None
    dropped_ids: Any = None
    excluded: Any = None
    included: Any = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a table that may be included.

    Attributes:
        num_candidates: the rows that are candidates, the first ones.
        num_rows: rows of the table, padding included.
        num_shards: the number of devices over which the rows are split.
        candidate_ids: `[num_candidates]` int32, or `None` if row numbers are the ids.
        id_lookup: as in `rows_of_ids`.
        max_dropped: up to how many candidates may be found with the others and dropped.
    """

    num_candidates: int
    num_rows: int
    num_shards: int
    candidate_ids: Any
    id_lookup: Any
    max_dropped: int

    def max_gathered(self, is_shared: bool) -> int:
        """Returns up to how many rows are gathered: lists for all queries, or for each."""
        share = GATHERED_SHARE if is_shared else GATHERED_SHARE_BY_QUERY
        return int(share * self.num_rows / self.num_shards)

    def ids(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Returns the ids of rows, of any shape, and -1 for negative rows."""
        if self.candidate_ids is None:
            return rows.astype("int32")
        ids = ops.convert_to_numpy(self.candidate_ids)
        return np.where(rows < 0, np.int32(NO_CANDIDATE), ids[rows])


def inclusion(include_ids: Any, include_mask: Any, num_queries: int | None, rows: Rows) -> Inclusion:
    """Returns how a search is limited to some candidates.

    Args:
        include_ids: `[m]` ints, the candidates for all queries, or `[num_queries, m]`, for each query; or `None`.
        include_mask: `[num_candidates]` or `[num_queries, num_candidates]` bool, True for the rows to include; or
            `None`.
        num_queries: the number of queries, or `None` if it is unknown.
        rows: the rows of the table.

    Raises:
        TypeError: if ids are not integers, or a mask is not of bools.
        ValueError: if both are given, a shape does not fit, or an id is outside the range of int32.
    """
    check_only_one(include_ids, include_mask)
    if include_ids is not None:
        include_ids = to_int32(include_ids, "include_ids")
        check_shape("include_ids", include_ids, num_queries)
        return _of_ids(include_ids, rows)
    if include_mask is not None:
        include_mask = include_mask if hasattr(include_mask, "dtype") else np.asarray(include_mask)
        check_mask(include_mask, num_queries, rows.num_candidates)
        return _of_mask(include_mask, rows)
    return Inclusion()


def check_shape(name: str, array: Any, num_queries: int | None) -> None:
    """Raises `ValueError` if an array is neither flat, for all queries, nor has a row for each query."""
    shape = tuple(array.shape)
    if len(shape) == 1 or (len(shape) == 2 and (None in (shape[0], num_queries) or shape[0] == num_queries)):
        return
    raise ValueError(
        f"`{name}` must be flat, for all queries, or have a row for each query. Received: "
        f"shape {shape} for {num_queries} queries. Pass a flat list, or rows filled with {NO_CANDIDATE}."
    )


def check_only_one(include_ids: Any, include_mask: Any) -> None:
    """Raises `ValueError` if both arguments are given, or `TypeError` if the ids are a mask."""
    if include_ids is not None and include_mask is not None:
        raise ValueError(
            "Candidates are included by id or by a mask. Received: `include_ids` and `include_mask`. Drop one of them."
        )
    if str(getattr(include_ids, "dtype", None)) == "bool":
        raise TypeError(
            "`include_ids` must be ids. Received: an array of bools. "
            "Pass a mask of the rows as `include_mask`, which `recommend`, `find` and `ranks` take."
        )


def check_mask(mask: Any, num_queries: int | None, num_candidates: int | None) -> None:
    """Raises `TypeError` if a mask is not of bools, or `ValueError` if its shape does not fit."""
    dtype = str(mask.dtype) if isinstance(mask, np.ndarray) else keras.backend.standardize_dtype(mask.dtype)
    if dtype != "bool":
        raise TypeError(
            "`include_mask` must be of bools, one for each row of the index. Received: "
            f"dtype {dtype}. Pass ids as `include_ids`."
        )
    check_shape("include_mask", mask, num_queries)
    if num_candidates is not None and mask.shape[-1] != num_candidates:
        raise ValueError(
            "`include_mask` needs one bool for each row of the index. Received: "
            f"shape {tuple(mask.shape)} for {num_candidates} candidates. "
            "Compare an array of the corpus, such as `stock > 0`."
        )


def _of_ids(ids: Any, rows: Rows) -> Inclusion:
    if len(ids.shape) == 2 and ids.shape[0] == 1:
        ids = ids[0]
    is_shared = len(ids.shape) == 1
    num_listed = ids.shape[-1]
    if num_listed <= max(1, rows.max_gathered(is_shared)):
        return Inclusion(listed_ids=with_common_length(ids))
    if is_known(ids) and (is_shared or num_listed >= rows.num_candidates - rows.max_dropped):
        # On the host, where it can be counted.
        id_lookup = None if rows.id_lookup is None else ops.convert_to_numpy(rows.id_lookup)
        return _of_mask(_mask_of_ids(ops.convert_to_numpy(ids), id_lookup, rows.num_candidates), rows)
    listed_rows = rows_of_ids(ops.convert_to_tensor(ids), rows.id_lookup, rows.num_candidates)
    if not is_shared:
        return Inclusion(included=listed_rows)
    ones = ops.ones_like(listed_rows)
    counts = ops.scatter(ops.expand_dims(listed_rows, 1), ones, (rows.num_candidates + 1,))
    return Inclusion(excluded=_padded(ops.equal(counts[: rows.num_candidates], 0), rows, True))


def _of_mask(mask: Any, rows: Rows) -> Inclusion:
    if not is_known(mask):
        mask = ops.convert_to_tensor(mask)
        if len(mask.shape) == 1:
            return Inclusion(excluded=_padded(ops.logical_not(mask), rows, True))
        return Inclusion(included=_padded(mask, rows, False))
    mask = ops.convert_to_numpy(mask)
    if mask.ndim == 2 and len(mask) == 1:
        mask = mask[0]
    counts = np.count_nonzero(mask, axis=-1)
    if np.max(counts, initial=0) <= max(1, rows.max_gathered(mask.ndim == 1)):
        return Inclusion(listed_ids=with_common_length(rows.ids(_columns(mask))))
    if rows.num_candidates - np.min(counts) <= rows.max_dropped:
        return Inclusion(dropped_ids=with_common_length(rows.ids(_columns(~mask))))
    if mask.ndim == 1:
        return Inclusion(excluded=np.pad(~mask, (0, rows.num_rows - len(mask)), constant_values=True))
    return Inclusion(included=np.pad(mask, ((0, 0), (0, rows.num_rows - mask.shape[1]))))


def with_common_length(ids: Any) -> Any:
    """Returns known ids padded with -1 to a power of two, so that lists of many lengths share a compiled program."""
    if not is_known(ids):
        return ids if ids.shape[-1] else ops.full((*ids.shape[:-1], 1), NO_CANDIDATE, dtype="int32")
    return pad_columns(on_host(ids), common_size(max(ids.shape[-1], 1)))


def _mask_of_ids(ids: np.ndarray[Any, Any], id_lookup: Any, num_candidates: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Returns the mask of the rows of ids, `[num_candidates]` or `[num_queries, num_candidates]`."""
    if id_lookup is None:
        found = np.where((ids >= 0) & (ids < num_candidates), ids, num_candidates)
    else:
        places = np.minimum(np.searchsorted(id_lookup[0], ids), num_candidates - 1)
        found = np.where(id_lookup[0][places] == ids, id_lookup[1][places], num_candidates)
    # Unknown ids set a column too many.
    mask = np.zeros((*ids.shape[:-1], num_candidates + 1), bool)
    np.put_along_axis(mask, found, True, axis=-1)
    return mask[..., :num_candidates]


def _columns(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, Any]:
    """Returns the columns in which each row of a mask is True, padded with -1."""
    if mask.ndim == 1:
        return np.flatnonzero(mask)
    counts = np.count_nonzero(mask, axis=1)
    result = np.full((len(mask), np.max(counts, initial=0)), -1)
    # On the flat mask, because `np.nonzero` of a matrix takes ten times as long.
    result[np.arange(result.shape[1]) < counts[:, None]] = np.flatnonzero(mask) % max(1, mask.shape[1])
    return result


def _padded(mask: Any, rows: Rows, value: bool) -> Any:
    padding = [(0, 0)] * (len(mask.shape) - 1) + [(0, rows.num_rows - rows.num_candidates)]
    return ops.pad(mask, padding, constant_values=value)
