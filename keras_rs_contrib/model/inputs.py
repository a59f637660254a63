"""Batches as a two-tower model takes them: checked, without what JAX cannot hold, and padded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_rs_contrib import batches, columns, processes, shared_batches
from keras_rs_contrib.batch_padding import batch_length
from keras_rs_contrib.ids import NO_CANDIDATE
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.model import feature_checks
from keras_rs_contrib.model.feature_checks import AllowedIds
from keras_rs_contrib.model.feature_names import LEFT_OUT, POPULAR_RANKS, FeatureNames, flat, is_missing
from keras_rs_contrib.model.lookups import TowerLookups
from keras_rs_contrib.model.training_data import TrainingData, ids_of
from keras_rs_contrib.model.vocabularies import Vocabularies
from keras_rs_contrib.negatives.sampling import StreamingSamplingProbability
from keras_rs_contrib.vocabulary import UNKNOWN_ROW


@dataclasses.dataclass(frozen=True)
class Purpose:
    """What batches are for.

    Attributes:
        queries_only: whether candidates are not needed.
        collects: whether the model learns from them what queries have seen, and how often candidates occur.
        leaves_out_seen: whether candidates that a query has seen are left out of its list.
        ranks: whether candidates are ranked in the lists of their queries.
        index_ids: with `ranks`, the ids of the index, which cannot be read within `fit`.
    """

    queries_only: bool = False
    collects: bool = False
    leaves_out_seen: bool = False
    ranks: bool = False
    index_ids: np.ndarray[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What a model knows about its batches, and the way from any data to them.

    Attributes:
        names: the names of the features.
        lookups: what the towers look up.
        retrieval: the index, whose ids a batch may have, or `None`.
        sampling_probability: the layer whose ids a batch may have, or `None`.
        num_drawn_from: the number of candidates from which negatives are drawn, or 0.
        check: whether to look for bad values.
        vocabularies: the vocabularies of features that hold names.
        training_data: what is known of the training data.
        least_positive: the least label of a positive, or `None` for labels above 0.
    """

    names: FeatureNames
    lookups: TowerLookups
    retrieval: ShardedBruteForceRetrieval | None
    sampling_probability: StreamingSamplingProbability | None
    num_drawn_from: int
    check: bool
    vocabularies: Vocabularies
    training_data: TrainingData
    least_positive: float | None = None

    @classmethod
    def of_model(cls, model: Any) -> ModelInputs:
        """Returns the inputs of a two-tower model, by the layers that it has now."""
        names = FeatureNames(
            query=model.query_features,
            candidate=model.candidate_features,
            candidate_id=model.candidate_id,
            label=model.label,
            exclude=model.exclude_feature,
            positives=model.positive_feature,
            negatives=model.negative_feature,
            negative_probability=model.negative_probability_feature,
            positive_weight=model.corpus_positives if isinstance(model.corpus_positives, str) else None,
            query_id=model.query_id,
        )
        probability, num_drawn_from = model.sampling_probability, 0
        if model.mixed_negatives is not None:
            probability = model.mixed_negatives.sampling_probability
            num_drawn_from = probability.num_candidates
        return cls(
            names=names,
            lookups=model._lookups,
            retrieval=model.retrieval,
            sampling_probability=probability,
            num_drawn_from=num_drawn_from,
            check=model.check_inputs,
            vocabularies=Vocabularies(
                by_feature=dict(model.vocabularies),
                names=names,
                unknown_candidates=model.unknown_candidates,
                skipped=model._skipped,
            ),
            training_data=model._training_data,
            least_positive=None if isinstance(model.corpus_positives, str) else model.corpus_positives,
        )

    @property
    def of_rows(self) -> ModelInputs:
        """The same for batches whose names are rows already."""
        return dataclasses.replace(self, vocabularies=dataclasses.replace(self.vocabularies, are_rows=True))

    def to_arrays(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        queries_only: bool = False,
        number: int | None = None,
        reader: int = 0,
    ) -> Any:
        """Returns data of one batch or many as arrays, if they are columns: DataFrames, dicts, Series or lists.

        Columns that the model does not need are not converted. Names become rows.

        Args:
            x: as in `fit`.
            y: as in `fit`.
            sample_weight: as in `fit`.
            queries_only: as in `FeatureNames.needed`.
            number: the number of the batch, or `None` for all rows at once.
            reader: identifies what reads the batches.

        Returns:
            `x`, `y` and `sample_weight`.

        Raises:
            TypeError: if `sample_weight` is a dict.
            ValueError: if a column that is needed does not hold numbers.
        """
        x = given = columns.as_dict(x)
        if isinstance(x, dict):
            used = [*self.names.needed(queries_only, y), *self.names.optional]
            x = columns.arrays_of(self.vocabularies.encode(x, used), used)
        if not is_missing(y) and not isinstance(y, dict):
            y = columns.as_array(y, "`y`")
        if isinstance(sample_weight, dict):
            raise TypeError(
                "`sample_weight` must be one array, with a weight for each example. Received: a dict with the keys "
                f"{list(sample_weight)}. Pass one of its values."
            )
        if sample_weight is not None:
            sample_weight = flat(columns.as_array(sample_weight, "`sample_weight`"))
        candidate_id = self.names.candidate_id
        names_candidates = self.vocabularies.of_candidates is not None and not self.vocabularies.are_rows
        if names_candidates and not queries_only and candidate_id in x:
            x[candidate_id], sample_weight = self.vocabularies.check_candidates(
                given[candidate_id], x[candidate_id], sample_weight, number, reader
            )
        return x, y, sample_weight

    def batches(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        purpose: Purpose = Purpose(),
        **how: Any,
    ) -> batches.PaddedBatches:
        """Returns the checked and padded batches of what `fit` takes.

        Args:
            x: as in `fit`.
            y: as in `fit`.
            sample_weight: as in `fit`.
            purpose: what they are for.
            **how: as in `padded_batches`.
        """
        if isinstance(x, dict) or columns.is_frame(x):
            x, y, sample_weight = self.to_arrays(x, y, sample_weight, purpose.queries_only)
            if not self.vocabularies.are_rows:
                return self.of_rows.batches(x, y, sample_weight, purpose, **how)
        purpose = self._with_index_ids(purpose)
        prepare = functools.partial(self._prepare, self._corpus_ids(purpose.queries_only), purpose)
        result = batches.padded_batches(x, y, sample_weight, prepare=prepare, **how)
        result.prepare_unchecked, result.column_padding = self._encode, self._column_padding
        result.build_alike = functools.partial(self.build_alike, queries_only=purpose.queries_only)
        return result

    def build_alike(self, batch: Callable[[], Any], queries_only: bool) -> None:
        """Builds the towers in all of several processes, whatever their batches hold.

        Args:
            batch: returns the features of a batch of this process, or `None` if it has none.
            queries_only: as in `FeatureNames.needed`.
        """
        if processes.num_processes() == 1 or not self.check or self.lookups.are_built:
            return

        def describe() -> dict[str, Any] | None:
            features = batch()
            if features is None:
                return None
            candidates = [] if queries_only else [*self.names.of_candidate, self.names.candidate_id]
            needed = [name for name in dict.fromkeys([*self.names.of_query, *candidates]) if name is not None]
            features = columns.as_dict(features)
            self.names.check(features, needed)
            # The values may be invalid, which is found later.
            arrays = columns.arrays_of(self.vocabularies.encode(features, needed), needed)
            return {name: np.asarray(arrays[name])[:0] for name in needed}

        shared_batches.build_alike(describe, self.lookups.build)

    @property
    def _column_padding(self) -> dict[str, Any]:
        """What fills the missing columns of features with lists of ids, by name."""
        names = self.names
        of_ids = {name: NO_CANDIDATE for name in (names.exclude, names.positives, names.negatives, LEFT_OUT) if name}
        # Where there is no id, any probability will do.
        return of_ids if names.negative_probability is None else {**of_ids, names.negative_probability: 1}

    def _with_index_ids(self, purpose: Purpose) -> Purpose:
        """Returns a copy with the ids of the index, if they are needed. It identifies what reads the batches."""
        needs_ids = purpose.ranks and bool(self.vocabularies.by_feature)
        return dataclasses.replace(purpose, index_ids=ids_of(self.retrieval) if needs_ids else None)

    def _encode(self, number: int, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Returns a batch whose names are rows, without checks."""
        return self.vocabularies.encode(x, [*self.names.needed(False, y), *self.names.optional]), y, sample_weight

    def batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        purpose: Purpose = Purpose(),
    ) -> tuple[Any, Any, Any]:
        """Returns one batch, checked and padded. The arguments are those of `batches`."""
        corpus_ids, purpose = self._corpus_ids(purpose.queries_only), self._with_index_ids(purpose)
        self.build_alike(lambda: x, purpose.queries_only)
        prepare = functools.partial(self._prepare, corpus_ids, purpose, 0, x, y, sample_weight)
        batch: tuple[Any, Any, Any] = batches.padded_batch(prepare, self._column_padding)
        return batch

    def queries(self, features: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Returns the checked features of queries as arrays, without padding, and the number of queries."""
        features, _, _ = self._prepare([], Purpose(queries_only=True), 0, features, None, None)
        return {name: np.asarray(values) for name, values in features.items()}, batch_length(features)

    def _prepare(
        self,
        corpus_ids: list[tuple[str, AllowedIds]],
        purpose: Purpose,
        number: int,
        x: Any,
        y: Any,
        sample_weight: Any,
    ) -> tuple[Any, Any, Any]:
        """Returns a batch with all that the model needs. The one place where batches are checked."""
        x, queries_only = columns.as_dict(x), purpose.queries_only
        needed = self.names.needed(queries_only, y)
        self.names.check(x, needed)
        if queries_only:
            x = {name: x[name] for name in [*needed, self.names.query_id, self.names.exclude] if name in x}
        x, y, sample_weight = self.to_arrays(x, y, sample_weight, queries_only, number, id(purpose))
        if not queries_only:
            self.names.labels(x, y)
        if self.check:
            # The checks speak of rows.
            batch_length((x, y, sample_weight))
            features = {name: x[name] for name in needed}
            self._check_values(corpus_ids, number, features, {"`y`": y, "`sample_weight`": sample_weight})
            self._check_optional(number, x)
        if purpose.collects and self.training_data.collects and self.names.candidate_id is not None:
            self._collect(number, x, y, sample_weight)
        return self._with_training_data(purpose, x), y, sample_weight

    def _collect(self, number: int, x: dict[str, Any], y: Any, sample_weight: Any) -> None:
        """Notes what queries have seen, and which candidates are positives."""
        names, candidate_ids = self.names, x[str(self.names.candidate_id)]
        is_present = np.ones(len(candidate_ids), bool) if sample_weight is None else np.asarray(sample_weight) != 0
        is_positive = is_present
        if names.positive_weight is not None:
            is_positive = np.asarray(flat(np.asarray(x[names.positive_weight]))) > 0
        elif names.label is not None:
            labels = np.asarray(names.labels(x, y))
            is_positive = labels > 0 if self.least_positive is None else labels >= self.least_positive
        query_ids = self.query_ids(x)
        if query_ids is None and self.training_data.collects_seen:
            shape = np.asarray(x.get(str(names.query_id))).shape
            raise ValueError(
                "`seen` needs one id of a query in each row. Received: "
                f"the feature {names.query_id!r} of shape {shape}. Set `query_id` to the feature with such ids."
            )
        is_unknown = np.zeros(len(candidate_ids), bool)
        if query_ids is not None and names.query_id in self.vocabularies.by_feature:
            is_unknown = query_ids <= UNKNOWN_ROW
        self.training_data.add(number, query_ids, candidate_ids, is_present, is_positive, is_unknown)

    def query_ids(self, features: dict[str, Any]) -> np.ndarray[Any, Any] | None:
        """Returns the ids of queries, `[num_queries]` ints, or `None` if the features have none."""
        if self.names.query_id is None or self.names.query_id not in features:
            return None
        ids = np.asarray(flat(np.asarray(features[self.names.query_id])))
        return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else None

    def unknown_queries(self, features: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Returns which queries are not in their vocabulary, or had no row in training, as `are_unknown` does."""
        trained = self.training_data.trained_queries
        return self.vocabularies.are_unknown(features, self.names.of_query, self.names.query_id, trained)

    def _with_training_data(self, purpose: Purpose, x: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch with the ids that its lists leave out, and ranks by popularity for unknown queries."""
        candidate_id, known = self.names.candidate_id, self.training_data
        if not purpose.ranks or candidate_id not in x:
            return x
        candidate_ids = np.reshape(x[candidate_id], (-1, 1))
        query_ids = self.query_ids(x)
        if purpose.leaves_out_seen and known.has_seen and query_ids is not None:
            # The candidate itself is ranked, even if it was seen.
            left_out = known.seen(query_ids, candidate_ids)
            if self.names.exclude in x:
                left_out = np.concatenate([left_out, np.asarray(x[self.names.exclude], "int32")], axis=1)
            x = {**x, LEFT_OUT: left_out}
        unknown = self.unknown_queries(x)
        popularity = known.popularity(self.retrieval, purpose.index_ids)
        if unknown is not None and popularity is not None:
            ranks = popularity.ranks(candidate_ids, exclude_ids=self.names.exclude_ids(x))[:, 0]
            x = {**x, POPULAR_RANKS: np.where(unknown, ranks, NO_CANDIDATE).astype("int32")}
        return x

    def _check_values(
        self,
        corpus_ids: list[tuple[str, AllowedIds]],
        number: int,
        features: dict[str, Any],
        separate: dict[str, Any],
    ) -> None:
        described = {f"The feature {name!r}": values for name, values in features.items()}
        described.update({name: values for name, values in separate.items() if not is_missing(values)})
        feature_checks.check_numbers(number, described)
        weights = {"`sample_weight`": separate["`sample_weight`"]}
        if self.names.positive_weight in features:
            weights[f"The feature {self.names.positive_weight!r}"] = features[self.names.positive_weight]
        feature_checks.check_not_negative(number, weights)
        # The ids of the corpus first: a tower may look up fewer.
        feature_checks.check_ids(number, features, corpus_ids)
        towers = self.lookups.find(features)
        for tower in towers:
            feature_checks.check_ids(number, features, tower.allowed)
            self._check_drawn(tower.allowed)
        for name, values in features.items():
            feature_checks.check_range(number, name, values)
        for tower in towers:
            tower.check_computed(number, features)

    def compile_checks(self, features: dict[str, np.ndarray[Any, Any]]) -> None:
        """Compiles what the checks of queries compute, for as many as in `features`, whose values do not matter."""
        for tower in self.lookups.find(features) if self.check else []:
            # Whatever stands for values need not be ids.
            with contextlib.suppress(ValueError):
                tower.check_computed(0, features)

    def _check_optional(self, number: int, x: dict[str, Any]) -> None:
        names = self.names
        for name in (names.exclude, names.positives, names.negatives):
            if name is not None and name in x:
                feature_checks.check_rows_of_ids(number, name, x[name])
        if names.negatives in x and names.candidate_id is not None:
            ids = np.asarray(x[names.negatives])
            known = {names.negatives: np.where(ids == NO_CANDIDATE, 0, ids)}
            for tower in self.lookups.find(x):
                own = [(str(names.negatives), ids) for name, ids in tower.allowed if name == names.candidate]
                feature_checks.check_ids(number, known, own)
        if names.negative_probability in x:
            described = {f"The feature {names.negative_probability!r}": x[names.negative_probability]}
            feature_checks.check_numbers(number, described)
            feature_checks.check_not_negative(number, described)

    def _corpus_ids(self, queries_only: bool) -> list[tuple[str, AllowedIds]]:
        """Returns which ids of candidates the index and the sampling probability know, with the name of the feature."""
        if queries_only or not self.check or self.names.candidate_id is None:
            return []
        allowed = []
        if self.retrieval is not None and self.retrieval.candidate_ids is not None:
            ids = np.sort(ops.convert_to_numpy(self.retrieval.candidate_ids))
            allowed.append(AllowedIds(len(ids), "the index", ids))
        elif self.retrieval is not None and self.retrieval.num_candidates is not None:
            allowed.append(AllowedIds(self.retrieval.num_candidates, "the index"))
        if self.sampling_probability is not None:
            name = f"the sampling probability {self.sampling_probability.name!r}"
            allowed.append(AllowedIds(self.sampling_probability.num_candidates, name))
        return [(self.names.candidate_id, ids) for ids in allowed]

    def _check_drawn(self, allowed: list[tuple[str, AllowedIds]]) -> None:
        for name, ids in allowed:
            if name == self.names.candidate_id and self.num_drawn_from > ids.num_rows:
                raise ValueError(
                    "`mixed_negatives` must draw rows of the candidate tower. Received: "
                    f"{self.num_drawn_from} candidates to draw from, for {ids.num_rows} rows of {ids.table}. "
                    "Create its `StreamingSamplingProbability` with at most as many candidates as rows."
                )
