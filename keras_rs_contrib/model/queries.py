"""The search for many queries at once, outside of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_rs_contrib.arguments import check_type
from keras_rs_contrib.candidate_ids import NO_CANDIDATE, check_candidate_ids
from keras_rs_contrib.metrics import RankMetric

# Queries that are embedded and searched for at once.
QUERIES_AT_ONCE = 4096


class Queries(NamedTuple):
    """Queries whose features and ids have been checked.

    Attributes:
        features: what the query tower takes, `[num_queries, ...]` arrays.
        exclude_ids: `[num_queries, m]` int32, candidates that a query is not to get, or `None`.
        number: how many queries there are.
    """

    features: Any
    exclude_ids: np.ndarray[Any, np.dtype[np.int32]] | None
    number: int

    def search(
        self, query_tower: keras.layers.Layer, function: Callable[..., Any], verbose: int | str, *arrays: Any
    ) -> list[np.ndarray[Any, Any]]:
        """Returns what `function` does for the embeddings of the queries, some of them at a time.

        Args:
            query_tower: embeds the features.
            function: takes embeddings, ids to exclude and rows of `arrays`, and returns arrays with a row for each.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one where there are many queries.
            *arrays: `[num_queries, ...]`.
        """
        if verbose == "auto":
            verbose = int(self.number > 16 * QUERIES_AT_ONCE)
        progress = keras.utils.Progbar(self.number, verbose=verbose, unit_name="query")
        parts = []
        # At least once, for the shapes of the result.
        for start in range(0, max(self.number, 1), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            part = keras.tree.map_structure(lambda array, rows=rows: np.asarray(array)[rows], self.features)
            queries = query_tower(part, training=False)
            excluded = None if self.exclude_ids is None else self.exclude_ids[rows]
            results = function(queries, excluded, *(array[rows] for array in arrays))
            parts.append([np.asarray(result) for result in results])
            progress.update(min(start + QUERIES_AT_ONCE, self.number))
        return [np.concatenate(results) for results in zip(*parts, strict=True)]


def rows_of_ids(ids: Any, name: str, num_queries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns ids as int32, or raises where they are none or do not have a row for each query."""
    rows = check_candidate_ids(ids, name)
    if rows.ndim != 2 or len(rows) != num_queries:
        raise ValueError(
            f"`{name}` needs a row for each query. Received: "
            f"shape {rows.shape} for {num_queries} queries. Make the rows with `group_candidate_ids`."
        )
    return rows


def rows_of_positives(ids: Any, num_queries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns positives as `rows_of_ids` does, with -1 in place of all but one of those equal within a row."""
    rows = rows_of_ids(ids, "positive_ids", num_queries)
    if not (rows != NO_CANDIDATE).any():
        raise ValueError(
            "`positive_ids` needs at least one positive. Received: none. Check what is held out, and the queries."
        )
    rows = np.sort(rows, axis=1)
    again = np.pad(rows[:, 1:] == rows[:, :-1], ((0, 0), (1, 0)))
    return np.where(again, np.int32(NO_CANDIDATE), rows)


def metrics_of_ranks(metrics: Iterable[RankMetric], ranks: np.ndarray[Any, Any]) -> dict[str, float]:
    """Returns the value of each metric, by name, whose own state is left alone.

    Args:
        metrics: metrics of ranks.
        ranks: as of `RankMetric.update_state`.
    """
    result = {}
    for metric in metrics:
        check_type("metrics", metric, RankMetric)
        metric = type(metric).from_config(metric.get_config())
        metric.update_state(ranks)
        result[metric.name] = float(metric.result())
    return result
