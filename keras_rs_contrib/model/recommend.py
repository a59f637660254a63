"""Recommendations and metrics for many queries at once, outside of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_rs_contrib import columns, processes
from keras_rs_contrib.arguments import explains_keywords, non_negative_int, on_host, positive_int
from keras_rs_contrib.ids import NO_CANDIDATE
from keras_rs_contrib.index.candidate_store import check_k
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.index.sizes import MIN_EXCLUDED, MIN_K, common_size, sizes_up_to, to_device
from keras_rs_contrib.metrics import RankMetric
from keras_rs_contrib.model.access import shared
from keras_rs_contrib.model.feature_names import FeatureNames
from keras_rs_contrib.model.finite_loss import no_embedding
from keras_rs_contrib.model.queries import (
    QUERIES_AT_ONCE,
    CheckedQueries,
    as_features,
    check_has_positives,
    check_limits,
    check_positive_rows,
    metrics_of_ranks,
    pairs_of_all_processes,
    with_batch_axis,
)
from keras_rs_contrib.model.towers import embeddings_of
from keras_rs_contrib.model.trainer import PaddedModel
from keras_rs_contrib.model.training_data import ids_of
from keras_rs_contrib.model.vocabularies import Skipped
from keras_rs_contrib.scores import pairwise_scores
from keras_rs_contrib.task.two_tower_task import DistributedTwoTowerTask
from keras_rs_contrib.vocabulary import UNKNOWN_ROW, Vocabulary


class _IdsAndScores(NamedTuple):
    ids: np.ndarray[Any, Any]
    scores: np.ndarray[Any, np.dtype[np.float32]]


class Recommendations(_IdsAndScores):
    """What `TwoTowerModel.recommend` returns: the pair `(ids, scores)`, which also tells which queries are unknown.

    Attributes:
        ids: `[num_queries, k]` int32 candidate ids, best first, padded with -1 if fewer than k candidates remain. If
            candidate ids have a vocabulary, an object array of names, padded with `None`.
        scores: `[num_queries, k]` float32 scores of `ids`, padded with -inf.
        are_popular: `[num_queries]` bool, True for queries that are not in the vocabulary, or had no row in training.
            They get the candidates with the most positives in the training data, and these numbers as scores.
    """

    are_popular: np.ndarray[Any, np.dtype[np.bool_]]

    def __new__(cls, ids: Any, scores: Any, are_popular: Any = None) -> Recommendations:
        """Creates the pair."""
        result = super().__new__(cls, ids, scores)
        result.are_popular = np.zeros(len(ids), bool) if are_popular is None else are_popular
        return result

    def __repr__(self) -> str:
        return f"Recommendations(ids={self.ids!r}, scores={self.scores!r}, are_popular={self.are_popular!r})"


class RecommendingModel(PaddedModel):
    """A model that embeds queries and searches its index for them.

    Attributes:
        query_tower: embeds queries. Set by the constructor of a subclass.
        query_features: names of the features of the query tower.
        candidate_features: names of the features of the candidate tower.
        task: knows the similarity.
        label: name of the feature with labels, or `None`.
        retrieval: the index, or `None`.
        vocabularies: those of features that hold names, by feature.
    """

    query_tower: keras.layers.Layer
    query_features: str | list[str]
    candidate_features: str | list[str]
    task: DistributedTwoTowerTask
    label: str | None
    vocabularies: dict[str, Vocabulary]
    # Shape, without the batch, and dtype of each feature, by name.
    _seen_features: dict[str, tuple[tuple[int, ...], str]]
    retrieval: ShardedBruteForceRetrieval | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "retrieval" and isinstance(value, ShardedBruteForceRetrieval):
            # Before each use and before saving; what cannot be refreshed is an error of the next use.
            value.is_refreshed_by_model = True
        super().__setattr__(name, value)

    @explains_keywords
    @shared
    def recommend(
        self,
        query_features: Any,
        k: int | None = None,
        *,
        exclude_ids: Any = None,
        include_ids: Any = None,
        include_mask: Any = None,
        exclude_seen: bool | None = None,
        verbose: int | str = "auto",
    ) -> Recommendations:
        """Returns the best candidates for each query.

        Ids may be arrays, tensors, data frames, or lists of lists or sets of different lengths; -1 and ids that no
        candidate has have no effect. With a vocabulary, ids are names.

        Args:
            query_features: dict of `[num_queries, ...]` arrays, or of the features of a single query, such as
                `{"user_id": 42}`. If there is only one query feature, its values are enough: an array, a list, or that
                of a single query, such as `"u42"`.
            k: number of candidates to return for each query. By default, the `k` of the index.
            exclude_ids: ints with a row for each query, the excluded ids; `group_candidate_ids` creates them. By
                default, the values of `exclude_feature`, if the features hold it. Flat ints for a single query.
            include_ids: the only ids that may be returned, such as those of the films in stock: flat ints for all
                queries, or a row for each query. By default, all.
            include_mask: `[num_candidates]` bools for all queries, or `[num_queries, num_candidates]`, True for the
                rows of the index that may be returned; an alternative to `include_ids`.
            exclude_seen: whether to leave out what each query has seen, as `seen` of `fit` says. By default,
                `exclude_seen` of the model.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if there are many queries.

        Returns:
            `Recommendations(ids, scores)`, both `[num_queries, k]`, int32 (or names) and float32.

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

        self._build_alike(query_features)
        with processes.failing_alike():
            own = self._queries(query_features, exclude_ids, include_ids, include_mask, exclude_seen)
        queries, _, own_rows = own.of_all_processes()
        embed = self._embedding_in_order()
        self.refresh_index()
        ids, scores = (found[own_rows] for found in queries.search(find, verbose))
        vocabularies = self.model_inputs.vocabularies
        unknown = self.model_inputs.unknown_queries(own.features)
        if unknown is not None and unknown.any():
            self._fill_with_popular(ids, scores, unknown, own)
        return Recommendations(vocabularies.decode_ids(ids), scores, unknown)

    def _fill_with_popular(self, ids: Any, scores: Any, unknown: Any, queries: CheckedQueries) -> None:
        """Puts the most popular candidates into the rows of unknown queries."""
        popularity = self.model_inputs.training_data.popularity(self._index(), ids_of(self._index()))
        if popularity is None:
            row = int(np.flatnonzero(unknown)[0])
            raise ValueError(
                "A query that the model does not know gets the most popular candidates of the training data. "
                f"Received: an unknown query in row {row}, of a model that was not trained by `fit`. "
                "Leave it out, or train the model."
            )
        ids[unknown], scores[unknown] = popularity.find(
            ids.shape[1], int(unknown.sum()), **queries.limits_of(np.flatnonzero(unknown))
        )

    @explains_keywords
    @shared
    def evaluate_queries(
        self,
        query_features: dict[str, Any],
        positive_ids: Any,
        exclude_ids: Any = None,
        *,
        include_ids: Any = None,
        include_mask: Any = None,
        exclude_seen: bool | None = None,
        by_popularity: bool = False,
        metrics: Iterable[RankMetric] | None = None,
        verbose: int | str = "auto",
    ) -> dict[str, float]:
        """Returns the corpus metrics of queries with several positives, such as the held-out films of each user.

        `evaluate` ranks each pair of a query and a positive separately. Here, all positives of a query are ranked in
        one list, and each query counts once. Lists are those of `recommend`: queries that are not in the vocabulary get
        the most popular candidates.

        Args:
            query_features: dict of `[num_queries, ...]` arrays, or values of the only feature, as in `recommend`.
            positive_ids: ints with a row for each query, its positives, in any form that `recommend` takes;
                `group_candidate_ids` creates them. A query without positives does not count.
            exclude_ids: ints with a row for each query, the excluded ids, such as those that it has seen in training.
                By default, the values of `exclude_feature`, if the features hold it.
            include_ids: the only ids in the lists, as in `recommend`. A positive that is not among them is never found.
            include_mask: an alternative to `include_ids`, as in `recommend`.
            exclude_seen: as in `recommend`. Positives stay in the list, even if they were seen.
            by_popularity: whether to rank by the number of rows in the training data, as a baseline.
            metrics: rank metrics, whose state does not change. By default, `corpus_metrics` of the model.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if there are many queries.

        Returns:
            Dict of the value of each metric, a float, by name.

        Raises:
            TypeError: if ids are not integers, or a mask is not of bools.
            ValueError: if features are missing or invalid, a positive is not a candidate, or shapes do not match.
        """
        index = self._index()
        self._build_alike(query_features)
        with processes.failing_alike():
            positive_ids = self.model_inputs.vocabularies.encode_ids(positive_ids)
            own = self._queries(query_features, exclude_ids, include_ids, include_mask, exclude_seen)
            positive_ids = check_positive_rows(positive_ids, own.number)
            if self.model_inputs.vocabularies.of_candidates is not None and (positive_ids == UNKNOWN_ROW).any():
                row = int(np.argwhere(positive_ids == UNKNOWN_ROW)[0][0])
                raise ValueError(
                    "`positive_ids` must be names of the vocabulary. Received: an unknown name for query "
                    f"{row}. Leave unknown candidates out."
                )
        queries, (positive_ids,), _ = own.of_all_processes(positive_ids)
        check_has_positives(positive_ids)
        # Without vocabularies, all queries are known.
        needs_popularity = by_popularity or bool(self.vocabularies)
        popularity = self.model_inputs.training_data.popularity(index, ids_of(index)) if needs_popularity else None
        if by_popularity and popularity is None:
            raise ValueError(
                "`by_popularity` needs the number of rows of each candidate in the training data. Received: a model "
                "that was not trained by `fit`. Train it first."
            )

        def rank(features: dict[str, Any], limits: dict[str, Any], positive_ids: Any) -> tuple[Any]:
            if by_popularity:
                assert popularity is not None
                return (popularity.ranks(positive_ids, **limits),)
            ranks = index.ranks(embed(features), positive_ids, **limits)
            unknown = self.model_inputs.unknown_queries(features)
            if popularity is None or unknown is None or not unknown.any():
                return (ranks,)
            # Such a query gets the most popular candidates.
            return (np.where(unknown[:, None], popularity.ranks(positive_ids, **limits), ranks),)

        embed = self._embedding_in_order()
        self.refresh_index()
        (ranks,) = queries.search(rank, verbose, positive_ids, kept_ids=positive_ids)
        return metrics_of_ranks(self.corpus_metrics if metrics is None else metrics, ranks)

    @explains_keywords
    @shared
    def warm_up(
        self,
        num_queries: int = 64,
        num_exclude_ids: int = 32,
        *,
        k: int | None = None,
        verbose: int | str = "auto",
    ) -> int:
        """Compiles what `recommend` runs, so that no request of up to the given sizes has to wait for it.

        Requests are padded to sizes that are powers of two, for which few programs are enough. Without a warm-up, the
        first request of each size compiles. So does the first one with `include_ids` or `include_mask`.

        Args:
            num_queries: the largest number of queries of a request.
            num_exclude_ids: the largest number of excluded ids of a query, besides those that it has seen.
            k: the largest `k` of a request. By default, requests have the `k` of the index.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one.

        Returns:
            The number of programs, one for each combination of sizes.

        Raises:
            ValueError: if a number is negative, `k` exceeds the number of candidates, or the model has no index, or has
                not seen a batch yet.

        Example:
        ```python
        model = TwoTowerModel(
            keras.layers.Embedding(100, 16),
            keras.layers.Embedding(50, 16),
            query_features="user_id",
            candidate_features="movie_id",
        )
        model.recommend({"user_id": 42}, k=10)
        model.warm_up(num_queries=4, num_exclude_ids=0)  # 3 programs, for 1, 2 and 4 queries
        ```
        """
        index = self._index()
        most = [positive_int(num_queries, "num_queries"), non_negative_int(num_exclude_ids, "num_exclude_ids")]
        names = self.model_inputs.names.of_query
        unseen = [name for name in names if name not in self._seen_features]
        if unseen:
            raise ValueError(
                "A warm-up needs the shape and dtype of each feature, which the model learns from its first batch. "
                f"Received: a model that has not seen {unseen}. Call it on a batch first, or train it."
            )
        if self._leaves_out_seen(None):
            most[1] += self.model_inputs.training_data.max_seen
        self.refresh_index()
        assert index.num_candidates is not None
        all_k = {index.k}
        if k is not None:
            all_k |= {min(size, index.num_candidates) for size in sizes_up_to(check_k(k, index.num_candidates), MIN_K)}
        sizes, all_excluded = sizes_up_to(most[0]), [0, *sizes_up_to(most[1], MIN_EXCLUDED)]
        num_programs = len(sizes) * len(all_excluded) * len(all_k)
        progress = keras.utils.Progbar(
            num_programs, verbose=processes.verbosity(int(verbose != 0)), unit_name="program"
        )
        shapes = {name: self._seen_features[name] for name in names}
        for size in sizes:
            features = {name: np.zeros((size, *shape), dtype) for name, (shape, dtype) in shapes.items()}
            self.model_inputs.compile_checks(features)
            embeddings = self._embed_queries(_on_device(features))
            for num_excluded in all_excluded:
                excluded = np.full((size, num_excluded), NO_CANDIDATE, "int32") if num_excluded else None
                for each in sorted(all_k):
                    # Several processes must not run two programs at the same time.
                    on_host(index.find(embeddings, each, exclude_ids=excluded)[1])
                    progress.add(1)
        return num_programs

    @shared
    def score(self, features: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Returns the score of each pair of a query and a candidate: for a model with `label`, the predicted label.

        Args:
            features: dict or DataFrame with the features of both towers, a row for each pair; or of a single pair.

        Returns:
            `[num_pairs]` float32: the similarity by which the index ranks. With `label`, divided by the temperature of
            the task, as in the loss. NaN if the query or the candidate is not in the vocabulary.

        Raises:
            ValueError: if features are missing or invalid.
        """
        inputs = self.model_inputs
        names = FeatureNames(inputs.names.query, inputs.names.candidate, inputs.names.candidate_id)
        features = with_batch_axis(columns.as_dict(features), names.needed(False), self._ranks_of_features())
        vocabularies = dataclasses.replace(inputs.vocabularies, unknown_candidates="skip", skipped=Skipped())
        inputs = dataclasses.replace(inputs, names=names, vocabularies=vocabularies)
        inputs, features, weights, own_rows = pairs_of_all_processes(inputs, features)
        batches, parts = inputs.batches(features, sample_weight=weights, batch_size=QUERIES_AT_ONCE), []
        if isinstance(features, dict):
            # Pairs of any number share few programs.
            num_pairs = len(features[names.of_query[0]])
            batches.multiple = common_size(min(num_pairs, QUERIES_AT_ONCE))
        for x, _, sample_weight in batches:
            queries = self._embed_queries(x, False)
            candidates = columns.select(x, self.candidate_features)
            candidates = embeddings_of(self.candidate_tower, candidates, False, "candidate_tower")
            scores = on_host(pairwise_scores(queries, candidates, self.task.similarity))
            if self.label is not None:
                scores = scores / np.float32(self.task.temperature or 1.0)
            # Skipped candidates have weight 0.
            is_known, unknown = sample_weight != 0, inputs.vocabularies.are_unknown(x, names.of_query)
            if unknown is not None:
                is_known &= ~unknown
            parts.append(np.where(is_known, scores, np.float32(np.nan))[: batches.sizes[-1][0]])
        return np.concatenate(parts)[own_rows]

    def _build_alike(self, features: Any) -> None:
        """Builds the query tower in all of several processes."""
        if processes.num_processes() == 1:
            return
        names, ranks = self.model_inputs.names.of_query, self._ranks_of_features()
        self.model_inputs.build_alike(
            lambda: with_batch_axis(as_features(columns.as_dict(features), names), names, ranks), queries_only=True
        )

    def _queries(
        self,
        features: Any,
        exclude_ids: Any,
        include_ids: Any,
        include_mask: Any,
        exclude_seen: bool | None,
    ) -> CheckedQueries:
        names, vocabularies = self.model_inputs.names, self.model_inputs.vocabularies
        features = as_features(columns.as_dict(features), names.of_query)
        axes = [*names.of_query, *([] if names.query_id is None else [names.query_id])]
        features = with_batch_axis(features, axes, self._ranks_of_features())
        if isinstance(features, dict):
            if exclude_ids is None:
                exclude_ids = names.exclude_ids(features)
            # Its rows may differ in length.
            features = {name: values for name, values in features.items() if name != names.exclude}
        features, number = self.model_inputs.queries(features)
        features = {name: self._as_seen(name, values) for name, values in features.items()}
        exclude_ids, include_ids = vocabularies.encode_ids(exclude_ids), vocabularies.encode_ids(include_ids)
        limits = check_limits(exclude_ids, include_ids, include_mask, number, self._index().num_candidates)
        training_data = self.model_inputs.training_data
        leaves_out_seen = self._leaves_out_seen(exclude_seen) and training_data.has_seen
        query_ids = self.model_inputs.query_ids(features) if leaves_out_seen else None
        return CheckedQueries(features, limits, number, query_ids, training_data)

    def _as_seen(self, name: str, values: Any) -> Any:
        """Returns checked values with the shape and dtype that the model has seen, if these hold the same values."""
        if name not in self._seen_features:
            return values
        shape, dtype = self._seen_features[name]
        if {shape, values.shape[1:]} == {(), (1,)}:
            values = values.reshape((len(values), *shape))
        kinds = [each.rstrip("0123456789").removeprefix("u") for each in (dtype, values.dtype.name)]
        holds = kinds == ["int", "int"] or (kinds == ["float", "float"] and np.can_cast(values.dtype, dtype))
        return values.astype(dtype, copy=False) if holds else values

    def _ranks_of_features(self) -> dict[str, int]:
        """Returns the number of dimensions of one row of each feature that the model has seen."""
        # Ids may be `[batch]` or `[batch, 1]`.
        return {name: 0 if shape == (1,) else len(shape) for name, (shape, _) in self._seen_features.items()}

    def _embedding_in_order(self) -> Callable[[dict[str, Any]], Any]:
        """Returns a function that embeds some queries at a time, in order, and raises if an embedding is not finite."""
        num_before = 0

        def embed(features: dict[str, Any]) -> Any:
            nonlocal num_before
            embeddings = self._embed_queries(_on_device(features))
            wrong = np.flatnonzero(~np.isfinite(on_host(embeddings).astype("float32")).all(axis=-1))
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


def _on_device(features: dict[str, Any]) -> dict[str, Any]:
    return {name: to_device(values) for name, values in features.items()}
