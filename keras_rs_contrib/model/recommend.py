"""Recommendations and metrics for many queries at once, outside of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_rs_contrib import columns
from keras_rs_contrib.arguments import explains_keywords
from keras_rs_contrib.index.candidate_store import check_k
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.metrics import RankMetric
from keras_rs_contrib.model.callbacks import set_modes
from keras_rs_contrib.model.finite_loss import no_embedding
from keras_rs_contrib.model.queries import (
    CheckedQueries,
    check_limits,
    check_positive_rows,
    metrics_of_ranks,
    with_batch_axis,
)
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "retrieval" and isinstance(value, ShardedBruteForceRetrieval):
            # Before each use and before saving; what cannot be refreshed is an error of the next use.
            value.is_refreshed_by_model = True
        super().__setattr__(name, value)

    @functools.wraps(PaddedModel.fit)
    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:  # type: ignore[override]
        """Trains the model, with callbacks that know the direction of rank metrics."""
        given = inspect.signature(PaddedModel.fit).bind(self, *args, **kwargs).arguments
        set_modes(given.get("callbacks"), self.corpus_metrics)
        return super().fit(*args, **kwargs)

    @explains_keywords
    def recommend(
        self,
        query_features: dict[str, Any],
        k: int | None = None,
        *,
        exclude_ids: Any = None,
        include_ids: Any = None,
        include_mask: Any = None,
        verbose: int | str = "auto",
    ) -> Recommendations:
        """Returns the best candidates for each query.

        Ids may be arrays, tensors, data frames, or lists of lists or sets of different lengths; -1 and ids that no
        candidate has have no effect.

        Args:
            query_features: dict of `[num_queries, ...]` arrays, or of the features of a single query, such as
                `{"user_id": 42}`.
            k: number of candidates to return for each query. By default, the `k` of the index.
            exclude_ids: ints with a row for each query, the excluded ids; `group_candidate_ids` creates them. By
                default, the values of `exclude_feature`, if the features hold it. Flat ints for a single query.
            include_ids: the only ids that may be returned, such as those of the films in stock: flat ints for all
                queries, or a row for each query. By default, all.
            include_mask: `[num_candidates]` bools for all queries, or `[num_queries, num_candidates]`, True for the
                rows of the index that may be returned; an alternative to `include_ids`.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if there are many queries.

        Returns:
            `Recommendations(ids, scores)`, both `[num_queries, k]`, int32 and float32.

        Raises:
            TypeError: if ids are not integers, or a mask is not of bools.
            ValueError: if features are missing or invalid, `k` exceeds the number of candidates, or shapes do not
                match.
        """
        index = self._index()
        k = index.k if k is None else k
        if index.num_candidates is not None:
            k = check_k(k, index.num_candidates)

        def find(features: dict[str, Any], limits: dict[str, Any]) -> tuple[Any, Any]:
            scores, ids = index.find(embed(features), k, **limits)
            return ids, scores

        queries = self._queries(query_features, exclude_ids, include_ids, include_mask)
        embed = self._embedding_in_order()
        self.refresh_index()
        return Recommendations(*queries.search(find, verbose))

    @explains_keywords
    def evaluate_queries(
        self,
        query_features: dict[str, Any],
        positive_ids: Any,
        exclude_ids: Any = None,
        *,
        include_ids: Any = None,
        include_mask: Any = None,
        metrics: Iterable[RankMetric] | None = None,
        verbose: int | str = "auto",
    ) -> dict[str, float]:
        """Returns the corpus metrics of queries with several positives, such as the held-out films of each user.

        `evaluate` ranks each pair of a query and a positive separately. Here, all positives of a query are ranked in
        one list, and each query counts once.

        Args:
            query_features: dict of `[num_queries, ...]` arrays, or of the features of a single query.
            positive_ids: ints with a row for each query, its positives, in any form that `recommend` takes;
                `group_candidate_ids` creates them. A query without positives does not count.
            exclude_ids: ints with a row for each query, the excluded ids, such as those that it has seen in training.
                By default, the values of `exclude_feature`, if the features hold it.
            include_ids: the only ids in the lists, as in `recommend`. A positive that is not among them is never found.
            include_mask: an alternative to `include_ids`, as in `recommend`.
            metrics: rank metrics, whose state does not change. By default, `corpus_metrics` of the model.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if there are many queries.

        Returns:
            Dict of the value of each metric, a float, by name.

        Raises:
            TypeError: if ids are not integers, or a mask is not of bools.
            ValueError: if features are missing or invalid, a positive is not a candidate, or shapes do not match.
        """
        index = self._index()
        queries = self._queries(query_features, exclude_ids, include_ids, include_mask)
        positive_ids = check_positive_rows(positive_ids, queries.number)

        def rank(features: dict[str, Any], limits: dict[str, Any], positive_ids: Any) -> tuple[Any]:
            return (index.ranks(embed(features), positive_ids, **limits),)

        embed = self._embedding_in_order()
        self.refresh_index()
        (ranks,) = queries.search(rank, verbose, positive_ids)
        return metrics_of_ranks(self.corpus_metrics if metrics is None else metrics, ranks)

    def _queries(
        self, features: dict[str, Any], exclude_ids: Any, include_ids: Any, include_mask: Any
    ) -> CheckedQueries:
        names = self.model_inputs.names
        features = with_batch_axis(columns.as_dict(features), names.of_query)
        if isinstance(features, dict):
            if exclude_ids is None:
                exclude_ids = names.exclude_ids(features)
            # Its rows may differ in length.
            features = {name: values for name, values in features.items() if name != names.exclude}
        features, number = self.model_inputs.queries(features)
        limits = check_limits(exclude_ids, include_ids, include_mask, number, self._index().num_candidates)
        return CheckedQueries({name: features[name] for name in names.of_query}, limits, number)

    def _embedding_in_order(self) -> Callable[[dict[str, Any]], Any]:
        """Returns a function that embeds some queries at a time, in order, and raises if an embedding is not finite."""
        num_before = 0

        def embed(features: dict[str, Any]) -> Any:
            nonlocal num_before
            embeddings = self._embed_queries(features)
            wrong = np.flatnonzero(~np.isfinite(np.asarray(embeddings, "float32")).all(axis=-1))
            if wrong.size and self.check_inputs:
                row = {name: values[wrong[0]] for name, values in features.items()}
                raise ValueError(no_embedding("query", f"row {num_before + wrong[0]} of the queries", row))
            num_before += len(embeddings)
            return embeddings

        return embed

    def _embed_queries(self, features: dict[str, Any], training: bool | None = False) -> Any:
        return embeddings_of(self.query_tower, columns.select(features, self.query_features), training, "query_tower")

    def _index(self) -> ShardedBruteForceRetrieval:
        if self.retrieval is None:
            raise ValueError(
                "Retrieval needs an index. Received: a model without one, whose candidate tower is not an embedding. "
                "Pass `retrieval=shard_candidates(BruteForceRetrieval(k=10), candidate_tower, candidates=...)`."
            )
        return self.retrieval
