"""What a two-tower model knows of its training data: how often each candidate occurs, and what each query has seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from keras_rs_contrib import processes
from keras_rs_contrib.ids import NO_CANDIDATE
from keras_rs_contrib.index.sizes import common_size
from keras_rs_contrib.model.feature_names import flat
from keras_rs_contrib.model.popularity import Popularity

# Names of the arrays in a file.
ARRAYS = ("popular_ids", "popular_counts", "seen_queries", "seen_starts", "seen_ids", "trained_queries")

Array = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """What is kept of a batch.

    Attributes:
        trained_queries: the queries that are known.
        seen: pairs of a query and a candidate, as numbers.
        candidates: the candidates of positives.
        num_rows: the number of rows.
    """

    trained_queries: Array
    seen: Array
    candidates: Array
    num_rows: int

    @classmethod
    def join(cls, batches: Iterable[Batch]) -> Batch:
        """Returns what is kept of several batches."""
        none = np.empty(0, "int64")
        trained, seen, candidates, num_rows = zip(Batch(none, none, none, 0), *batches, strict=True)
        return cls(np.concatenate(trained), np.concatenate(seen), np.concatenate(candidates), sum(num_rows))


class TrainingData:
    """Counts of candidates, and the candidates that each query has seen, collected while batches are read.

    A pass over the data may begin again, as Keras looks at the first batch before training. The longest pass counts.
    Later trainings add to what is known. If each of several processes has its own data, all learn what each has read.

    Attributes:
        collects: whether batches are collected.
        collects_seen: whether the candidates of each query are collected too.
    """

    _ids: Array
    _counts: Array
    _queries: Array
    _starts: Array
    _seen: Array
    _trained: Array

    def __init__(self) -> None:
        self.collects = False
        self.collects_seen = False
        self.take_arrays({})
        self._counts_before = self._ids, self._counts
        self._longest: list[Batch] = []
        self._current: list[Batch] = []
        self._is_settled = True
        self._popularity: tuple[Any, Any, list[int], Popularity | None] | None = None

    def begin(self, *, seen: bool) -> None:
        """Begins to collect.

        Args:
            seen: whether to collect what each query has seen.
        """
        self.collects, self.collects_seen = True, seen
        self._counts_before = self._ids, self._counts
        self._longest, self._current = [], []

    def add(
        self, number: int, query_ids: Any, candidate_ids: Any, is_present: Any, is_positive: Any, is_unknown: Any
    ) -> None:
        """Adds a batch, if batches are collected.

        Args:
            number: the number of the batch in its pass.
            query_ids: `[batch]` ints, or `None` if the model does not tell queries apart.
            candidate_ids: `[batch]` ints.
            is_present: `[batch]` bool, the rows to add.
            is_positive: `[batch]` bool, the rows whose candidates are counted.
            is_unknown: `[batch]` bool, the rows whose query is not in the vocabulary.
        """
        if not self.collects:
            return
        if number == 0:
            self._longest, self._current = self._longest_pass(), []
        candidates, seen, trained = _as_flat(candidate_ids), np.empty(0, "int64"), np.empty(0, "int64")
        if query_ids is not None:
            is_known = is_present & ~is_unknown
            trained = np.unique(_as_flat(query_ids)[is_known])
            if self.collects_seen:
                seen = _as_pairs(_as_flat(query_ids), candidates)[is_known]
        self._current.append(Batch(trained, seen, candidates[is_present & is_positive], len(candidates)))
        self._is_settled = False

    def settle(self) -> None:
        """Adds what has been collected so far. If each process has its own data, all of them have to call this."""
        if self.collects and processes.have_own_data():
            # Another process may have read more.
            self._is_settled = False
        self._settle()

    def discard(self) -> None:
        """Ends collecting, without what has been collected since `settle`."""
        self.collects, self._is_settled = False, True
        self._longest, self._current = [], []

    def end(self) -> None:
        """Ends collecting."""
        self.settle()
        self.discard()

    def add_seen(self, query_ids: Any, candidate_ids: Any) -> None:
        """Adds what queries have seen.

        Args:
            query_ids: `[num_pairs]` ints.
            candidate_ids: `[num_pairs]` ints, the candidate of each pair.
        """
        self._add_pairs(_as_pairs(_as_flat(query_ids), _as_flat(candidate_ids)))

    def _add_pairs(self, new: Array) -> None:
        queries = np.repeat(self._queries, np.diff(self._starts))
        pairs = np.unique(np.concatenate([_as_pairs(queries, self._seen), new]))
        self._queries, counts = np.unique(pairs >> 32, return_counts=True)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._seen = (pairs & 0xFFFFFFFF).astype("uint32").view("int32")

    @property
    def trained_queries(self) -> Array:
        """The sorted ids of queries that the model was trained on, or an empty array if they are unknown."""
        self._settle()
        return self._trained

    @property
    def has_seen(self) -> bool:
        """Whether it is known what queries have seen, or will be when the batches are read."""
        return self._seen.size > 0 or (self.collects and self.collects_seen)

    @property
    def max_seen(self) -> int:
        """The largest number of candidates that a query has seen."""
        self._settle()
        return int(np.diff(self._starts).max(initial=0))

    def seen(self, query_ids: Any, kept_ids: Any = None) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Returns the candidates that queries have seen.

        Args:
            query_ids: `[num_queries]` ints.
            kept_ids: `[num_queries, n]` ints, candidates that are not returned for a query; or `None`.

        Returns:
            `[num_queries, m]` int32, padded with -1, where m is a power of 2: each m is compiled once.
        """
        self._settle()
        queries = _as_flat(query_ids)
        if not self._queries.size:
            return np.full((len(queries), 1), NO_CANDIDATE, "int32")
        places = np.minimum(np.searchsorted(self._queries, queries), len(self._queries) - 1)
        is_known = self._queries[places] == queries
        lengths = np.where(is_known, self._starts[places + 1] - self._starts[places], 0)
        width = common_size(int(lengths.max(initial=1)))
        columns = np.arange(width)
        is_seen = columns < lengths[:, None]
        result = np.full((len(queries), width), NO_CANDIDATE, "int32")
        result[is_seen] = self._seen[(self._starts[places][:, None] + columns)[is_seen]]
        if kept_ids is not None:
            rows = np.arange(len(queries))[:, None]
            result[np.isin(_as_pairs(rows, result), _as_pairs(rows, np.asarray(kept_ids)))] = NO_CANDIDATE
        return result

    @property
    def counts(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The ids of candidates in the training data, sorted, and the number of rows of each. Both may be empty."""
        self._settle()
        return self._ids, self._counts

    def popularity(self, index: Any, index_ids: np.ndarray[Any, Any] | None) -> Popularity | None:
        """Returns the popularity of the candidates of an index, or `None` if it is unknown.

        Args:
            index: the index, or `None`.
            index_ids: as `ids_of` returns them.
        """
        ids, counts = self.counts
        if not ids.size or index_ids is None:
            return None
        exclude_ids = list(index.exclude_ids)
        if self._popularity is not None:
            known_counts, known_index_ids, known_exclude_ids, popularity = self._popularity
            is_known = known_counts is counts and known_exclude_ids == exclude_ids
            if is_known and np.array_equal(known_index_ids, index_ids):
                return popularity
        popularity = Popularity.of_candidates(index_ids, exclude_ids, ids, counts)
        self._popularity = (counts, index_ids, exclude_ids, popularity if popularity.ids.size else None)
        return self._popularity[-1]

    def to_arrays(self) -> dict[str, Array]:
        """Returns all that is known, for a file. Empty if nothing is."""
        self._settle()
        values = (self._ids, self._counts, self._queries, self._starts, self._seen, self._trained)
        return dict(zip(ARRAYS, values, strict=True)) if self._ids.size or self._seen.size else {}

    def take_arrays(self, arrays: dict[str, Array]) -> None:
        """Takes what `to_arrays` has returned, in place of what was known."""
        nothing = np.empty(0, "int64")
        empty = (nothing, nothing, nothing, np.zeros(1, "int64"), np.empty(0, "int32"), nothing)
        values = [arrays.get(name, default) for name, default in zip(ARRAYS, empty, strict=True)]
        self._ids, self._counts, self._queries, self._starts, self._seen, self._trained = values

    def state(self) -> dict[str, Any]:
        """Returns what is known, for a checkpoint. What is being collected is left out: its batches are read again."""
        if not self.collects:
            return {"arrays": self.to_arrays(), "collects": False}
        values = (*self._counts_before, self._queries, self._starts, self._seen, self._trained)
        return {"arrays": dict(zip(ARRAYS, values, strict=True)), "collects": True}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `state` has returned, in a training that collects, and that reads the same batches again."""
        self.take_arrays(state["arrays"])
        self._counts_before = self._ids, self._counts
        self._is_settled = True
        if not state["collects"]:
            self.discard()

    def _longest_pass(self) -> list[Batch]:
        return max(self._longest, self._current, key=lambda batches: sum(batch.num_rows for batch in batches))

    def _settle(self) -> None:
        if self._is_settled:
            return
        self._is_settled = True
        new = Batch.join(self._longest_pass())
        if processes.have_own_data():
            new = Batch.join(processes.gather(new))
        if not new.num_rows:
            return
        ids, counts = self._counts_before
        self._ids, places = np.unique(np.concatenate([ids, new.candidates]), return_inverse=True)
        # Exact: the sums are far below 2**53.
        weights = np.concatenate([counts, np.ones(len(new.candidates))])
        self._counts = np.bincount(places, weights, len(self._ids)).astype("int64")
        self._trained = np.unique(np.concatenate([self._trained, new.trained_queries]))
        if self.collects_seen:
            self._add_pairs(new.seen)


def ids_of(index: Any) -> np.ndarray[Any, Any] | None:
    """Returns the ids of an index by row, or `None` if it has no candidates. Variables have no values within `fit`."""
    if index is None or index.num_candidates is None:
        return None
    return np.arange(index.num_candidates) if index.candidate_ids is None else np.asarray(index.candidate_ids)


def _as_flat(ids: Any) -> np.ndarray[Any, Any]:
    """Returns `[batch]` or `[batch, 1]` ids as `[batch]` int64."""
    return np.asarray(flat(np.asarray(ids))).astype("int64")


def _as_pairs(query_ids: np.ndarray[Any, Any], candidate_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # Both are int32, so that a pair is one number.
    return (query_ids.astype("int64") << 32) | (candidate_ids.astype("int64") & 0xFFFFFFFF)
