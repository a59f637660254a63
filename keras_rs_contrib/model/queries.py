"""Search for many queries at once, outside of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_rs_contrib.arguments import check_type
from keras_rs_contrib.ids import NO_CANDIDATE, check_candidate_ids
from keras_rs_contrib.metrics import RankMetric

# Queries that are embedded and searched at once.
QUERIES_AT_ONCE = 4096


class CheckedQueries(NamedTuple):
    """Queries whose features and ids have been checked.

    Attributes:
        features: the features of the query tower, `[num_queries, ...]` arrays by name.
        exclude_ids: `[num_queries, m]` int32, candidates that are not returned for a query, or `None`.
        number: the number of queries.
    """

    features: dict[str, Any]
    exclude_ids: np.ndarray[Any, np.dtype[np.int32]] | None
    number: int

    def search(
        self, function: Callable[..., Any], verbose: int | str, *arrays: np.ndarray[Any, Any]
    ) -> list[np.ndarray[Any, Any]]:
        """Returns the results of `function` for all queries, called with some of them at a time.

        Args:
            function: takes features, excluded ids and rows of `arrays`, and returns arrays with a row for each query.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if there are many queries.
            *arrays: `[num_queries, ...]`.
        """
        if verbose == "auto":
            verbose = int(self.number > 16 * QUERIES_AT_ONCE)
        progress = keras.utils.Progbar(self.number, verbose=verbose, unit_name="query")
        parts = []
        # At least once, for the shapes of the result.
        for start in range(0, max(self.number, 1), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            features = {name: values[rows] for name, values in self.features.items()}
            exclude_ids = None if self.exclude_ids is None else self.exclude_ids[rows]
            results = function(features, exclude_ids, *(array[rows] for array in arrays))
            parts.append([np.asarray(result) for result in results])
            progress.update(min(start + QUERIES_AT_ONCE, self.number))
        return [np.concatenate(results) for results in zip(*parts, strict=True)]


def check_query_rows(ids: Any, name: str, num_queries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns ids as `[num_queries, m]` int32.

    Raises:
        TypeError: if they are not integers.
        ValueError: if they do not have a row for each query.
    """
    rows = check_candidate_ids(ids, name)
    if rows.ndim != 2 or len(rows) != num_queries:
        raise ValueError(
            f"`{name}` needs a row for each query. Received: "
            f"shape {rows.shape} for {num_queries} queries. Create the rows with `group_candidate_ids`."
        )
    return rows


def check_positive_rows(ids: Any, num_queries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns positives as `check_query_rows` does, with -1 in place of duplicates within a row."""
    rows = check_query_rows(ids, "positive_ids", num_queries)
    if not (rows != NO_CANDIDATE).any():
        raise ValueError(
            "`positive_ids` needs at least one positive. Received: none. Check the held-out data, and the queries."
        )
    rows = np.sort(rows, axis=1)
    is_duplicate = np.pad(rows[:, 1:] == rows[:, :-1], ((0, 0), (1, 0)))
    return np.where(is_duplicate, np.int32(NO_CANDIDATE), rows)


def metrics_of_ranks(metrics: Iterable[RankMetric], ranks: np.ndarray[Any, Any]) -> dict[str, float]:
    """Returns the value of each metric, by name, without changing the state of the metrics.

    Args:
        metrics: metrics of ranks.
        ranks: as in `RankMetric.update_state`.
    """
    result = {}
    for metric in metrics:
        check_type("metrics", metric, RankMetric)
        metric = type(metric).from_config(metric.get_config())
        metric.update_state(ranks)
        result[metric.name] = float(metric.result())
    return result
