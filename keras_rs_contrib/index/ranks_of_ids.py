"""Exact ranks of candidates that are named by their ids: pure functions of arrays."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_rs_contrib.ids import NO_CANDIDATE, NOT_IN_LIST
from keras_rs_contrib.index.candidate_rows import rows_of_ids
from keras_rs_contrib.index.listed_candidates import ranks_of_listed
from keras_rs_contrib.index.ranks import ranks
from keras_rs_contrib.index.score_blocks import Search, compiled
from keras_rs_contrib.index.top_k import contains


@compiled
def ranks_of_ids(
    query_embeddings: Any,
    table: Any,
    candidate_ids: Any,
    search: Search,
    id_lookup: Any = None,
    exclude_ids: Any = None,
    excluded: Any = None,
    included: Any = None,
    listed_ids: Any = None,
    own_exclude_ids: Any = None,
) -> tuple[Any, Any]:
    """Returns the ranks of candidates in the list of each query, and which ids are unknown.

    Args:
        query_embeddings: as in `ranks`, like all arguments that are not described here.
        table: the table.
        candidate_ids: `[num_queries, n]` int32, -1 for none.
        search: settings of the search.
        id_lookup: as in `rows_of_ids`.
        exclude_ids: `[num_queries, m]` int32, candidates that are not in the list of the query; or `None`.
        excluded: rows that do not count.
        included: the only rows that count for each query.
        listed_ids: as `include_ids` of `ranks_of_listed`; or `None` for all candidates.
        own_exclude_ids: as in `ranks_of_listed`, with `listed_ids`.

    Returns:
        `[num_queries, n]` int32 ranks, 0 is best, -1 for none, and `NOT_IN_LIST` for candidates that are not in the
        list; and `[num_queries, n]` bool, whether no candidate has the id.
    """
    num_candidates = search.num_candidates
    rows = rows_of_ids(candidate_ids, id_lookup, num_candidates)
    is_none = ops.equal(candidate_ids, NO_CANDIDATE)
    exclude_rows = None if exclude_ids is None else rows_of_ids(exclude_ids, id_lookup, num_candidates)
    if listed_ids is not None:
        result = ranks_of_listed(
            query_embeddings, table, rows, listed_ids, search, id_lookup, exclude_rows, own_exclude_ids
        )
    else:
        result = ranks(query_embeddings, table, rows, search, exclude_rows, excluded, included)
    if exclude_ids is not None:
        result = ops.where(contains(exclude_ids, candidate_ids), NOT_IN_LIST, result)
    is_unknown = ops.logical_and(ops.equal(rows, num_candidates), ops.logical_not(is_none))
    return ops.where(is_none, NO_CANDIDATE, result), is_unknown
