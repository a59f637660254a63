"""The rows of candidates: where their ids are in the corpus, and which rows are never returned."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops


def rows_of_ids(ids: Any, candidate_ids: Any, num_candidates: int) -> Any:
    """Returns the row of each id, and `num_candidates` for an id that no candidate has.

    Args:
        ids: int32, of any shape.
        candidate_ids: `[num_candidates]` int32, or `None` if row numbers are the ids.
        num_candidates: the number of candidates.

    Returns:
        int32, shape of `ids`.
    """
    if candidate_ids is None:
        known = ops.logical_and(ops.greater_equal(ids, 0), ops.less(ids, num_candidates))
        return ops.where(known, ids, num_candidates)
    all_ids = ops.convert_to_tensor(candidate_ids)
    order = ops.argsort(all_ids)
    places = ops.searchsorted(ops.take(all_ids, order, axis=0), ops.reshape(ids, (-1,)))
    rows = ops.reshape(ops.take(order, ops.minimum(places, num_candidates - 1), axis=0), ops.shape(ids))
    known = ops.equal(ops.take(all_ids, rows, axis=0), ids)
    return ops.where(known, ops.cast(rows, "int32"), num_candidates)


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
