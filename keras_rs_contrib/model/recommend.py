"""Recommendations and metrics for many queries at once, outside of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.metrics import RankMetric
from keras_rs_contrib.model.feature_names import select
from keras_rs_contrib.model.queries import CheckedQueries, check_positive_rows, check_query_rows, metrics_of_ranks
from keras_rs_contrib.model.towers import embeddings_of
from keras_rs_contrib.model.trainer import PaddedModel


class Recommendations(NamedTuple):
    """What `TwoTowerModel.recommend` returns.

    Attributes:
        ids: `[num_queries, k]` int32 candidate ids, best first, padded with -1 if fewer than k candidates remain.
        scores: `[num_queries, k]` float32 scores of `ids`, padded with -inf.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    scores: np.ndarray[Any, np.dtype[np.float32]]


class RecommendingModel(PaddedModel):
    """A model that embeds queries and searches its index for them.

    Attributes:
        query_tower: embeds queries. Set by the constructor of a subclass.
        query_features: names of the features of the query tower.
        retrieval: the index, or `None`.
    """

    query_tower: keras.layers.Layer
    query_features: str | list[str]
    retrieval: ShardedBruteForceRetrieval | None

    def recommend(
        self,
        query_features: dict[str, Any],
        k: int | None = None,
        exclude_ids: Any = None,
        verbose: int | str = "auto",
    ) -> Recommendations:
        """Returns the best candidates for each query.

        Args:
            query_features: dict of `[num_queries, ...]` arrays.
            k: number of candidates to return for each query. By default, the `k` of the index.
            exclude_ids: `[num_queries, m]` ints, excluded ids of each query, padded with -1; `group_candidate_ids`
                creates them. By default, the values of `exclude_feature`, if the features hold it.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if there are many queries.

        Returns:
            `Recommendations(ids, scores)`, both `[num_queries, k]`, int32 and float32.

        Raises:
            TypeError: if `exclude_ids` are not integers.
            ValueError: if features are missing or invalid, `k` exceeds the number of candidates, or shapes do not
                match.
        """
        index = self._index()
        k = index.k if k is None else k

        def find(features: dict[str, Any], exclude_ids: Any) -> tuple[Any, Any]:
            scores, ids = index.find(self._embed_queries(features), k, exclude_ids)
            return ids, scores

        queries = self._queries(query_features, exclude_ids)
        self.refresh_index()
        return Recommendations(*queries.search(find, verbose))

    def evaluate_queries(
        self,
        query_features: dict[str, Any],
        positive_ids: Any,
        exclude_ids: Any = None,
        metrics: Iterable[RankMetric] | None = None,
        verbose: int | str = "auto",
    ) -> dict[str, float]:
        """Returns the corpus metrics of queries with several positives, such as the held-out films of each user.

        `evaluate` ranks each pair of a query and a positive separately. Here, all positives of a query are ranked in
        one list, and each query counts once.

        Args:
            query_features: dict of `[num_queries, ...]` arrays.
            positive_ids: `[num_queries, m]` ints, positives of each query, padded with -1; `group_candidate_ids`
                creates them. A query without positives does not count.
            exclude_ids: `[num_queries, n]` ints, excluded ids of each query, such as those that it has seen in
                training, padded with -1. By default, the values of `exclude_feature`, if the features hold it.
            metrics: rank metrics, whose state does not change. By default, `corpus_metrics` of the model.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if there are many queries.

        Returns:
            Dict of the value of each metric, a float, by name.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if features are missing or invalid, a positive is not a candidate, or shapes do not match.
        """
        index = self._index()
        queries = self._queries(query_features, exclude_ids)
        positive_ids = check_positive_rows(positive_ids, queries.number)

        def rank(features: dict[str, Any], exclude_ids: Any, positive_ids: Any) -> tuple[Any]:
            return (index.ranks(self._embed_queries(features), positive_ids, exclude_ids),)

        self.refresh_index()
        (ranks,) = queries.search(rank, verbose, positive_ids)
        return metrics_of_ranks(self.corpus_metrics if metrics is None else metrics, ranks)

    def _queries(self, features: dict[str, Any], exclude_ids: Any) -> CheckedQueries:
        features, number = self.model_inputs.queries(features)
        if exclude_ids is None:
            exclude_ids = self.model_inputs.names.exclude_ids(features)
        if exclude_ids is not None:
            exclude_ids = check_query_rows(exclude_ids, "exclude_ids", number)
        names = self.model_inputs.names.of_query
        return CheckedQueries({name: features[name] for name in names}, exclude_ids, number)

    def _embed_queries(self, features: dict[str, Any], training: bool | None = False) -> Any:
        return embeddings_of(self.query_tower, select(features, self.query_features), training, "query_tower")

    def _index(self) -> ShardedBruteForceRetrieval:
        if self.retrieval is None:
            raise ValueError(
                "Retrieval needs an index. Received: a model without one, whose candidate tower is not an embedding. "
                "Pass `retrieval=shard_candidates(BruteForceRetrieval(k=10), candidate_tower, candidates=...)`."
            )
        return self.retrieval
