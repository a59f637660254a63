"""Batches as a two-tower model takes them: checked, stripped of what JAX cannot hold, and filled up."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from keras import ops

from keras_rs_contrib import batches, feature_checks
from keras_rs_contrib.feature_names import FeatureNames
from keras_rs_contrib.lookups import TowerLookups
from keras_rs_contrib.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.sampling import StreamingSamplingProbability


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What a model has to know about its batches, and what makes them of any data.

    Attributes:
        names: the names of the features.
        lookups: what the towers look up.
        retrieval: the index, whose ids a batch may have, or `None`.
        sampling_probability: likewise.
        check: whether to look for bad values.
    """

    names: FeatureNames
    lookups: TowerLookups
    retrieval: ShardedBruteForceRetrieval | None
    sampling_probability: StreamingSamplingProbability | None
    check: bool

    def to_arrays(self, x: Any, y: Any, queries_only: bool = False) -> Any:
        """Returns features in the form in which Keras makes batches of them.

        Args:
            x: as of `fit`.
            y: likewise.
            queries_only: as of `FeatureNames.needed`.
        """
        if not isinstance(x, dict):
            return x
        x = {name: np.asarray(values) if isinstance(values, list) else values for name, values in x.items()}
        # Keras stumbles over strings in arrays.
        return feature_checks.without_strings(x, self.names.needed(queries_only, y))

    def batches(
        self, x: Any, y: Any = None, sample_weight: Any = None, *, queries_only: bool = False, **how: Any
    ) -> batches.PaddedBatches:
        """Returns the batches of what `fit` takes.

        Args:
            x: as of `fit`, as `y` and `sample_weight`.
            y: likewise.
            sample_weight: likewise.
            queries_only: as of `FeatureNames.needed`.
            **how: as of `padded_batches`.
        """
        prepare = functools.partial(self._prepare, self._corpus_ids(queries_only), queries_only)
        x = self.to_arrays(x, y, queries_only)
        y, sample_weight = (np.asarray(each) if isinstance(each, list) else each for each in (y, sample_weight))
        return batches.padded_batches(x, y, sample_weight, prepare=prepare, **how)

    def batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, queries_only: bool = False
    ) -> tuple[Any, Any, Any]:
        """Returns one batch, likewise."""
        x, y, sample_weight = self._prepare(self._corpus_ids(queries_only), queries_only, 0, x, y, sample_weight)
        size = batches.batch_length((x, y, sample_weight))
        return batches.pad(x, y, sample_weight, size, batches.padded_size(size))

    def queries(self, features: dict[str, Any]) -> dict[str, Any]:
        """Returns the features of queries as arrays, not filled up."""
        self.names.check(features, self.names.query)
        features = {name: np.asarray(values) for name, values in features.items()}
        features, _, _ = self._prepare({}, True, 0, features, None, None)
        return features

    def _prepare(
        self,
        corpus_ids: dict[str, feature_checks.AllowedIds],
        queries_only: bool,
        number: int,
        x: Any,
        y: Any,
        sample_weight: Any,
    ) -> tuple[Any, Any, Any]:
        needed = self.names.needed(queries_only, y)
        self.names.check(x, needed)
        if queries_only:
            x = {name: x[name] for name in [*needed, self.names.exclude] if name in x}
        else:
            self.names.labels(x, y)
        x = feature_checks.without_strings(x, needed)
        batches.batch_length((x, y, sample_weight))
        if self.check:
            features = {name: x[name] for name in needed}
            beside = {"`y`": y, "`sample_weight`": sample_weight}
            named = {f"The feature {name!r}": values for name, values in features.items()}
            named.update({name: values for name, values in beside.items() if values is not None})
            feature_checks.check_numbers(number, named)
            feature_checks.check_ids(number, features, corpus_ids)
            feature_checks.check_ids(number, features, self.lookups.find(features))
        return x, y, sample_weight

    def _corpus_ids(self, queries_only: bool) -> dict[str, feature_checks.AllowedIds]:
        """Returns which ids of candidates the index and the sampling probability know."""
        if queries_only or not self.check or self.names.candidate_id is None:
            return {}
        allowed = []
        if self.sampling_probability is not None:
            allowed.append(feature_checks.AllowedIds(self.sampling_probability.num_candidates, "sampling_probability"))
        if self.retrieval is not None and self.retrieval.candidate_ids is not None:
            ids = np.sort(ops.convert_to_numpy(self.retrieval.candidate_ids))
            allowed.append(feature_checks.AllowedIds(len(ids), "the index", ids))
        elif self.retrieval is not None and self.retrieval.num_candidates is not None:
            allowed.append(feature_checks.AllowedIds(self.retrieval.num_candidates, "the index"))
        # An index with ids of its own says the most, and otherwise the smaller table.
        return {self.names.candidate_id: min(allowed, key=lambda a: (a.ids is None, a.num_rows))} if allowed else {}
