"""The most popular candidates, as a baseline, and for queries of which nothing else is known: NumPy functions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from keras_rs_contrib.ids import NO_CANDIDATE, NOT_IN_LIST

# Queries are searched in blocks of about this many bools.
_BLOCK_SIZE = 2**26


@dataclasses.dataclass(frozen=True)
class Popularity:
    """Candidates in the order of their number of rows in the training data, equal numbers by lower row of the index.

    Attributes:
        ids: `[n]` ids, the most popular first, without those that the index never returns.
        counts: `[n]` their numbers of rows.
        num_candidates: the number of candidates of the index.
        rows: `[n]` their rows in the index.
    """

    ids: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]
    num_candidates: int
    rows: np.ndarray[Any, Any]

    @classmethod
    def of_candidates(
        cls,
        index_ids: np.ndarray[Any, Any],
        exclude_ids: list[int],
        ids: np.ndarray[Any, Any],
        counts: np.ndarray[Any, Any],
    ) -> Popularity:
        """Returns the popularity of the candidates of an index.

        Args:
            index_ids: the ids of the index, by row.
            exclude_ids: those that it never returns.
            ids: sorted ids of candidates in the training data, at least one.
            counts: their numbers of rows. Candidates without a number have 0.
        """
        places = np.minimum(np.searchsorted(ids, index_ids), len(ids) - 1)
        own_counts = np.where(ids[places] == index_ids, counts[places], 0)
        order = np.argsort(-own_counts, kind="stable")
        order = order[~np.isin(index_ids[order], exclude_ids)]
        return cls(index_ids[order], own_counts[order], len(index_ids), order)

    def find(
        self, k: int, num_queries: int, exclude_ids: Any = None, include_ids: Any = None, include_mask: Any = None
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Returns the most popular candidates of each query's list.

        Args:
            k: the number of candidates to return for each query.
            num_queries: the number of queries.
            exclude_ids: `[num_queries, m]` ids, as in `recommend`, or `None`.
            include_ids: `[m]` or `[num_queries, m]` ids, or `None`.
            include_mask: `[num_candidates]` or `[num_queries, num_candidates]` bools, or `None`.

        Returns:
            `[num_queries, k]` int32 ids, padded with -1, and float32 counts, padded with -inf.
        """
        ids = np.full((num_queries, k), NO_CANDIDATE, "int32")
        scores = np.full((num_queries, k), -np.inf, "float32")
        num_places = len(self.ids)
        if include_ids is None and include_mask is None:
            num_places = min(num_places, k + (0 if exclude_ids is None else exclude_ids.shape[1]))
        at_once = max(1, _BLOCK_SIZE // max(1, num_places))
        for start in range(0, num_queries, at_once):
            rows = slice(start, min(start + at_once, num_queries))
            limits = (_rows_of(each, rows) for each in (exclude_ids, include_ids, include_mask))
            allowed = self._allowed(rows.stop - rows.start, num_places, *limits)
            # The number of allowed places up to each, so that the best k are those with numbers up to k.
            number = np.cumsum(allowed, axis=1)
            query, place = np.nonzero(allowed & (number <= k))
            column = number[query, place] - 1
            ids[start + query, column] = self.ids[place]
            scores[start + query, column] = self.counts[place]
        return ids, scores

    def ranks(
        self, target_ids: Any, exclude_ids: Any = None, include_ids: Any = None, include_mask: Any = None
    ) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Returns the ranks of candidates in each query's list, as `ShardedBruteForceRetrieval.ranks` does.

        Args:
            target_ids: `[num_queries, n]` ids, -1 for none.
            exclude_ids: as in `find`.
            include_ids: as in `find`.
            include_mask: as in `find`.

        Returns:
            `[num_queries, n]` int32, 0 for the best; -1 for none, and `NOT_IN_LIST` if it is not in the list.
        """
        target_ids = np.asarray(target_ids)
        if include_ids is None and include_mask is None:
            result = self._ranks_among_all(target_ids, exclude_ids)
            return np.where(target_ids == NO_CANDIDATE, NO_CANDIDATE, result).astype("int32")
        result = np.empty(target_ids.shape, "int32")
        at_once = max(1, _BLOCK_SIZE // max(1, len(self.ids)))
        for start in range(0, len(target_ids), at_once):
            rows = slice(start, start + at_once)
            targets = target_ids[rows]
            limits = (_rows_of(each, rows) for each in (exclude_ids, include_ids, include_mask))
            allowed = self._allowed(len(targets), len(self.ids), *limits)
            places, is_known = self._places(targets)
            before = np.cumsum(allowed, axis=1) - allowed
            query = np.arange(len(targets))[:, None]
            is_in_list = is_known & allowed[query, places]
            result[rows] = np.where(is_in_list, before[query, places], NOT_IN_LIST)
        return np.where(target_ids == NO_CANDIDATE, NO_CANDIDATE, result).astype("int32")

    def _ranks_among_all(self, target_ids: np.ndarray[Any, Any], exclude_ids: Any) -> np.ndarray[Any, Any]:
        """Returns the ranks in lists without what is excluded. The cost does not depend on the number of candidates."""
        places, is_in_list = self._places(target_ids)
        if exclude_ids is None:
            return np.where(is_in_list, places, NOT_IN_LIST)
        # Each pair of a query and a place is one number, so that one sorted array has those of all queries.
        starts = np.arange(len(target_ids))[:, None] * np.int64(len(self.ids))
        left_out, is_known = self._places(exclude_ids)
        left_out = np.unique((starts + left_out)[is_known])
        first, end = np.searchsorted(left_out, starts), np.searchsorted(left_out, starts + places)
        is_left_out = np.isin(starts + places, left_out)
        return np.where(is_in_list & ~is_left_out, places - (end - first), NOT_IN_LIST)

    @functools.cached_property
    def _sorter(self) -> np.ndarray[Any, Any]:
        return np.argsort(self.ids)

    def _places(self, ids: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Returns the places of ids, 0 for those that are no candidates, and which are candidates."""
        sorter = self._sorter
        found = sorter[np.minimum(np.searchsorted(self.ids, ids, sorter=sorter), len(sorter) - 1)]
        is_known = self.ids[found] == ids
        return np.where(is_known, found, 0), is_known

    def _allowed(
        self, num_queries: int, num_places: int, exclude_ids: Any, include_ids: Any, include_mask: Any
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Returns which of the first places are in each query's list, `[num_queries, num_places]` bool."""
        query = np.arange(num_queries)[:, None]
        allowed = np.ones((num_queries, num_places), bool)
        if include_ids is not None:
            places, is_known = self._places(np.broadcast_to(include_ids, (num_queries, np.shape(include_ids)[-1])))
            allowed[:] = False
            allowed[np.broadcast_to(query, places.shape)[is_known], places[is_known]] = True
        if include_mask is not None:
            mask = np.broadcast_to(include_mask, (num_queries, self.num_candidates))
            allowed &= mask[:, self.rows[:num_places]]
        if exclude_ids is not None:
            places, is_known = self._places(exclude_ids)
            is_known &= places < num_places
            allowed[np.broadcast_to(query, places.shape)[is_known], places[is_known]] = False
        return allowed


def _rows_of(limit: Any, rows: slice) -> Any:
    """Returns the part of a limit for some queries: flat limits apply to all."""
    return limit if limit is None or np.ndim(limit) == 1 else limit[rows]
