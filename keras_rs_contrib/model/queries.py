"""Search for many queries at once, outside of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rs_contrib import processes
from keras_rs_contrib.arguments import check_type, on_host
from keras_rs_contrib.batch_padding import batch_length
from keras_rs_contrib.columns import rank
from keras_rs_contrib.ids import NO_CANDIDATE, check_candidate_ids
from keras_rs_contrib.index import sizes
from keras_rs_contrib.index.inclusion import check_mask, check_only_one
from keras_rs_contrib.metrics import RankMetric
from keras_rs_contrib.model.inputs import ModelInputs
from keras_rs_contrib.model.training_data import TrainingData

# Queries that are embedded and searched at once.
QUERIES_AT_ONCE = 4096
# Ids, or bools of masks, of the queries that are searched at once: 256 MiB of ids.
MAX_VALUES_AT_ONCE = 2**26


class CheckedQueries(NamedTuple):
    """Queries whose features and ids have been checked.

    Attributes:
        features: the features of the query tower, `[num_queries, ...]` arrays by name.
        limits: which candidates may be found: the arguments `exclude_ids`, `include_ids` and `include_mask` of a
            search, by name. `[num_queries, m]` arrays, flat arrays for all queries, or `None`.
        number: the number of queries.
        query_ids: `[num_queries]` ids of queries, whose lists leave out what they have seen; or `None`.
        training_data: what queries have seen.
    """

    features: dict[str, Any]
    limits: dict[str, np.ndarray[Any, Any] | None]
    number: int
    query_ids: np.ndarray[Any, Any] | None
    training_data: TrainingData

    def limits_of(self, rows: Any, kept_ids: Any = None) -> dict[str, np.ndarray[Any, Any] | None]:
        """Returns which candidates may be found for some queries.

        Args:
            rows: a slice, or the numbers of the queries.
            kept_ids: as in `TrainingData.seen`.
        """
        limits = {
            name: array if array is None or array.ndim == 1 else array[rows] for name, array in self.limits.items()
        }
        if self.query_ids is not None:
            seen, own = self.training_data.seen(self.query_ids[rows], kept_ids), limits["exclude_ids"]
            # The rest is padding, which would make the rows longer than a warm-up expects.
            seen = seen[:, : np.flatnonzero((seen != NO_CANDIDATE).any(axis=0)).max(initial=-1) + 1]
            limits["exclude_ids"] = seen if own is None else np.concatenate([own, seen], axis=1)
        return limits

    def of_all_processes(self, *arrays: np.ndarray[Any, Any]) -> tuple[CheckedQueries, list[Any], slice]:
        """Returns the queries of all processes, rows of ids for them, and which of them are those of this process.

        If all processes have the same data, that is all of them.

        Args:
            *arrays: `[num_queries, n]` int32 ids, padded with -1.

        Raises:
            ValueError: in all processes, if queries that must be the same are not.
        """
        if not processes.have_own_data():
            processes.check_same("queries", (self.features, self.limits, self.query_ids, arrays))
            return self, list(arrays), slice(None)
        found = processes.gather((self.features, self.limits, self.number, self.query_ids, arrays))
        all_features, all_limits, numbers, all_query_ids, all_arrays = zip(*found, strict=True)
        limits = {name: _join_rows([each[name] for each in all_limits], numbers) for name in self.limits}
        features = {name: np.concatenate([each[name] for each in all_features]) for name in self.features}
        query_ids = None if self.query_ids is None else np.concatenate(all_query_ids)
        queries = self._replace(features=features, limits=limits, number=sum(numbers), query_ids=query_ids)
        joined = [_join_rows(list(each), numbers) for each in zip(*all_arrays, strict=True)]
        return queries, joined, processes.own_slice(numbers)

    def search(
        self,
        function: Callable[..., Any],
        verbose: int | str,
        *arrays: np.ndarray[Any, Any],
        kept_ids: np.ndarray[Any, Any] | None = None,
    ) -> list[np.ndarray[Any, Any]]:
        """Returns the results of `function` for all queries, called with some of them at a time.

        Args:
            function: takes features, limits and rows of `arrays`, padded to a power of two, and returns arrays with a
                row for each query.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if there are many queries.
            *arrays: `[num_queries, n]` int32 ids.
            kept_ids: as in `TrainingData.seen`.
        """
        if verbose == "auto":
            verbose = int(self.number > 16 * QUERIES_AT_ONCE)
        progress = keras.utils.Progbar(self.number, verbose=processes.verbosity(verbose), unit_name="query")
        widths = [array.shape[1] for array in self.limits.values() if array is not None and array.ndim == 2]
        if self.query_ids is not None:
            widths.append(self.training_data.max_seen)
        at_once = max(1, min(QUERIES_AT_ONCE, MAX_VALUES_AT_ONCE // max(1, *widths, 1)))
        results, start = [], 0
        for size, padded in sizes.parts(self.number, at_once):
            rows = slice(start, start + size)
            start += size
            features = {name: sizes.pad_rows(values[rows], padded) for name, values in self.features.items()}
            limits = {
                name: limit if limit is None or limit.ndim == 1 else sizes.pad_rows(limit, padded)
                for name, limit in self.limits_of(rows, None if kept_ids is None else kept_ids[rows]).items()
            }
            padded_arrays = (sizes.pad_rows(array[rows], padded, NO_CANDIDATE) for array in arrays)
            found = function(features, limits, *padded_arrays)
            results.append([on_host(each)[:size] for each in found])
            progress.update(start)
        return [np.concatenate(each) for each in zip(*results, strict=True)]


def pairs_of_all_processes(inputs: ModelInputs, features: Any) -> tuple[ModelInputs, Any, Any, slice]:
    """Returns how the pairs of all processes are checked, their features and weights, and which belong to this one.

    If all processes have the same data, or there is only one, that is all of them.

    Args:
        inputs: how the pairs of this process are checked.
        features: dict of values with a row for each pair.
    """
    if processes.num_processes() == 1:
        return inputs, features, None, slice(None)
    with processes.failing_alike():
        features, _, weights = inputs.to_arrays(features)
    if not processes.have_own_data():
        processes.check_same("pairs", (features, weights))
        return inputs.of_rows, features, weights, slice(None)
    found = processes.gather((features, np.ones(batch_length(features), "float32") if weights is None else weights))
    features = {name: np.concatenate([each[name] for each, _ in found]) for name in features}
    all_weights = [each for _, each in found]
    own = processes.own_slice(list(map(len, all_weights)))
    return inputs.of_rows, features, np.concatenate(all_weights), own


def _join_rows(arrays: list[Any], numbers: tuple[int, ...]) -> Any:
    """Returns the ids, or bools, of the queries of all processes, a row for each query; or `None` if none has any.

    Args:
        arrays: for each process, `[num_queries, n]`, `[n]` for all of its queries, or `None`.
        numbers: the number of queries of each process.
    """
    given = [array for array in arrays if array is not None]
    if not given:
        return None
    if all(array is not None and array.ndim == 1 and np.array_equal(array, given[0]) for array in arrays):
        return given[0]
    # Without a mask, all may be found, and without ids to exclude, none is left out.
    of_none = given[0].dtype == bool
    width = max(array.shape[-1] for array in given)
    rows = []
    for array, number in zip(arrays, numbers, strict=True):
        if array is None:
            array = np.full((number, width), of_none or NO_CANDIDATE, given[0].dtype)
        array = np.broadcast_to(array, (number, array.shape[-1]))
        rows.append(sizes.pad_columns(array, width))
    return np.concatenate(rows)


def as_features(values: Any, names: list[str]) -> Any:
    """Returns the features of queries as a dict. If there is only one, they may be its values."""
    return values if isinstance(values, dict) or len(names) > 1 else {names[0]: values}


def with_batch_axis(features: Any, names: Iterable[str], ranks: dict[str, int]) -> Any:
    """Returns features with a batch axis, which those of a single row may lack.

    Args:
        features: arrays or lists by name. If one of them has no batch axis, they are those of one row.
        names: the features that are needed.
        ranks: the number of dimensions of one row of each feature, if known. A feature of an unknown rank has no batch
            axis if it is a single value.
    """
    if not isinstance(features, dict):
        return features
    used = [name for name in dict.fromkeys(names) if name in features]
    lacks_axis = {name: rank(features[name]) <= ranks.get(name, 0) for name in used}
    if not any(lacks_axis.values()):
        return features
    features = dict(features)
    for name, lacks in lacks_axis.items():
        if lacks or (name not in ranks and len(features[name]) != 1):
            features[name] = np.asarray(features[name])[None]
    return features


def check_query_rows(ids: Any, name: str, num_queries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns the ids of each query as `[num_queries, m]` int32, padded with -1.

    Args:
        ids: ints with a row for each query, as an array, a tensor or a data frame; or a list, or a series, of lists or
            sets of different lengths. For a single query, flat ints too.
        name: name of the ids in error messages.
        num_queries: the number of queries.

    Raises:
        TypeError: if they are not integers.
        ValueError: if they do not have a row for each query.
    """
    rows = _to_array(ids, name)
    if rows.ndim == 1 and (num_queries == 1 or not rows.size):
        return np.broadcast_to(rows, (num_queries, rows.size))
    if rows.ndim == 1:
        raise ValueError(
            f"`{name}` needs a row for each query. Received: a flat list of {rows.size} ids for {num_queries} queries. "
            "Pass a list of lists, such as [[1, 2], [3]], or `group_candidate_ids`; "
            f"for the same ids in each row, `np.tile(ids, ({num_queries}, 1))`."
        )
    if rows.ndim != 2 or len(rows) != num_queries:
        raise ValueError(
            f"`{name}` needs a row for each query. Received: "
            f"shape {rows.shape} for {num_queries} queries. Create the rows with `group_candidate_ids`."
        )
    return rows


def check_limits(
    exclude_ids: Any, include_ids: Any, include_mask: Any, num_queries: int, num_candidates: int | None
) -> dict[str, np.ndarray[Any, Any] | None]:
    """Returns which candidates may be found, as in `CheckedQueries`.

    Args:
        exclude_ids: as in `check_query_rows`, or `None`.
        include_ids: the same, or flat ints for all queries.
        include_mask: bools, `[num_candidates]` or `[num_queries, num_candidates]`, or `None`.
        num_queries: the number of queries.
        num_candidates: the number of candidates, or `None` if it is unknown.

    Raises:
        TypeError: if ids are not integers, or a mask is not of bools.
        ValueError: if shapes do not fit, or both `include_ids` and `include_mask` are given.
    """
    check_only_one(include_ids, include_mask)
    if exclude_ids is not None:
        exclude_ids = check_query_rows(exclude_ids, "exclude_ids", num_queries)
    if include_ids is not None:
        include_ids = _to_array(include_ids, "include_ids")
        if include_ids.ndim != 1:
            include_ids = check_query_rows(include_ids, "include_ids", num_queries)
    if include_mask is not None:
        include_mask = np.asarray(include_mask)
        check_mask(include_mask, num_queries, num_candidates)
    return {"exclude_ids": exclude_ids, "include_ids": include_ids, "include_mask": include_mask}


def check_positive_rows(ids: Any, num_queries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns positives as `check_query_rows` does, with -1 in place of duplicates within a row."""
    rows = check_query_rows(ids, "positive_ids", num_queries)
    rows = np.sort(rows, axis=1)
    is_duplicate = np.pad(rows[:, 1:] == rows[:, :-1], ((0, 0), (1, 0)))
    return np.where(is_duplicate, np.int32(NO_CANDIDATE), rows)


def check_has_positives(rows: np.ndarray[Any, Any]) -> None:
    """Raises `ValueError` if no query has a positive, `[num_queries, n]` ids padded with -1."""
    if not (rows != NO_CANDIDATE).any():
        raise ValueError(
            "`positive_ids` needs at least one positive. Received: none. Check the held-out data, and the queries."
        )


def metrics_of_ranks(metrics: Iterable[RankMetric], ranks: np.ndarray[Any, Any]) -> dict[str, float]:
    """Returns the value of each metric, by name, without changing the state of the metrics.

    Args:
        metrics: metrics of ranks.
        ranks: as in `RankMetric.update_state`.
    """
    result = {}
    # Rows and columns of -1 do not count.
    ranks = sizes.pad_columns(ranks, sizes.common_size(ranks.shape[1]))
    missing = sizes.common_size(len(ranks)) - len(ranks)
    ranks = sizes.to_device(np.pad(ranks, ((0, missing), (0, 0)), constant_values=NO_CANDIDATE))
    for metric in metrics:
        check_type("metrics", metric, RankMetric)
        metric = type(metric).from_config(metric.get_config())
        metric.update_state(ranks)
        result[metric.name] = float(metric.result())
    return result


def _to_array(ids: Any, name: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns ids as int32: flat ids flat, and rows of any lengths padded with -1 to the longest."""
    if hasattr(ids, "to_list"):
        # A series of pandas, or a ragged tensor of TensorFlow.
        ids = ids.to_list()
    if hasattr(ids, "shape"):
        array = ops.convert_to_numpy(ids) if ops.is_tensor(ids) else np.asarray(ids)
        if array.dtype != object or array.ndim != 1:
            return check_candidate_ids(array, name)
        ids = array
    if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes)):
        raise TypeError(f"`{name}` must be lists of ids. Received: {ids!r}. Pass a list, such as [42].")
    ids = list(ids)
    if not any(map(_is_row, ids)):
        return check_candidate_ids(ids, name)
    rows = list(_rows(ids, name))
    lengths = np.array([len(row) for row in rows])
    result = np.full((len(rows), lengths.max()), NO_CANDIDATE, np.int32)
    result[np.arange(result.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return result


def _is_row(value: Any) -> bool:
    # A tensor without dimensions is iterable only in name.
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def _rows(rows: list[Any], name: str) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    for number, row in enumerate(rows):
        if not _is_row(row):
            raise TypeError(
                f"`{name}` needs a list of ids for each query. Received: {row!r} for query {number}. "
                "Pass [] for a query without ids."
            )
        ids = check_candidate_ids(row if hasattr(row, "shape") else list(row), name)
        if ids.ndim != 1:
            raise ValueError(
                f"`{name}` needs a flat list of ids for each query. Received: shape {ids.shape} for query {number}. "
                "Flatten it."
            )
        yield ids
