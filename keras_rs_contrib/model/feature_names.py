"""The role of each feature of a batch in a two-tower model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from keras_rs_contrib.columns import names_in

# The feature with all ids that a query's list leaves out, which the model adds to batches whose candidates are ranked.
LEFT_OUT = "ids_left_out"
# The feature with the rank of each candidate by popularity, for queries that are unknown, and -1 for all others.
POPULAR_RANKS = "ranks_by_popularity"


@dataclasses.dataclass(frozen=True)
class FeatureNames:
    """The names under which a two-tower model finds its inputs in a dict of features.

    Attributes:
        query: the feature of the query tower, or a list of features, which the tower receives as a dict.
        candidate: the same of the candidate tower.
        candidate_id: the feature with the ids of candidates, or `None`.
        label: the feature with labels, or `None`.
        exclude: the feature with excluded ids, or `None`.
        positives: the feature with further positives of queries, or `None`.
        negatives: the feature with negatives of each query alone, or `None`.
        negative_probability: the feature with their sampling probabilities, or `None`.
        positive_weight: the feature with the weights of positives in rank metrics, or `None`.
        query_id: the feature that tells queries apart, or `None`.
    """

    query: str | list[str]
    candidate: str | list[str]
    candidate_id: str | None = None
    label: str | None = None
    exclude: str | None = None
    positives: str | None = None
    negatives: str | None = None
    negative_probability: str | None = None
    positive_weight: str | None = None
    query_id: str | None = None

    @property
    def of_query(self) -> list[str]:
        """The names of the features of the query tower."""
        return names_in(self.query)

    @property
    def of_candidate(self) -> list[str]:
        """The names of the features of the candidate tower."""
        return names_in(self.candidate)

    def needed(self, queries_only: bool, y: Any = None) -> list[str]:
        """Returns the features that a batch must hold.

        Args:
            queries_only: whether candidates are not needed.
            y: labels that come separately from the features, or `None`.
        """
        names: list[str | None] = list(self.of_query)
        if not queries_only:
            label = self.label if is_missing(y) else None
            names += [*self.of_candidate, self.candidate_id, label, self.positive_weight]
        return [name for name in dict.fromkeys(names) if name is not None]

    @property
    def optional(self) -> list[str]:
        """The features that a batch may hold."""
        names = (self.query_id, self.exclude, self.positives, self.negatives, self.negative_probability)
        return [name for name in dict.fromkeys(names) if name is not None]

    def are_candidates_in(self, features: dict[str, Any]) -> bool:
        """Returns whether a batch has the features of the candidate tower, or only those of the query tower.

        Raises:
            ValueError: if it has some features of the candidate tower and lacks others.
        """
        if all(name in features for name in self.of_candidate):
            return True
        # Features of both towers say nothing.
        if any(name in features for name in self.of_candidate if name not in self.of_query):
            self.check(features, self.of_candidate)
        return False

    def check(self, features: Any, names: Iterable[str]) -> None:
        """Raises if a batch is not a dict (`TypeError`) or lacks one of the `names` (`ValueError`)."""
        if not isinstance(features, dict):
            raise TypeError(
                "A batch must be a dict of features. Received: "
                f"{type(features).__name__}. Name its arrays, such as {{{self.of_query[0]!r}: ...}}."
            )
        missing = [name for name in names if name not in features]
        if missing:
            raise ValueError(
                f"A batch must hold the features {list(names)}. Received: {sorted(features)}, without "
                f"{missing[0]!r}. Add it, or change the feature names of the model."
            )

    def labels(self, features: dict[str, Any], y: Any) -> Any:
        """Returns the labels of a batch, `[batch]`, or `None` if the model has none.

        Args:
            features: the batch.
            y: labels, if the batch does not hold them.

        Raises:
            ValueError: if the model has no labels and some are given, or they are given twice.
        """
        if self.label is None:
            if not is_missing(y):
                raise ValueError(
                    "A model without `label` trains on positives and does not use labels. Received: `y`. "
                    "Drop it, or pass `label=` with the name of the feature that holds the labels."
                )
            return None
        if not is_missing(y) and self.label in features:
            raise ValueError(
                f"Labels come as a feature or as `y`. Received: the feature {self.label!r} and `y`. Drop one of them."
            )
        # Keras's own losses take both shapes.
        return flat(features[self.label] if is_missing(y) else y)

    def exclude_ids(self, features: dict[str, Any]) -> Any:
        """Returns the excluded ids of the queries, or `None` if the batch has none."""
        return features.get(LEFT_OUT, None if self.exclude is None else features.get(self.exclude))


def feature_names(argument: str, names: str | Sequence[str]) -> str | list[str]:
    """Returns one name, or several as a list, or raises `TypeError` if they are not names."""
    result = names if isinstance(names, str) else list(names) if isinstance(names, (list, tuple)) else []
    if not result or not all(isinstance(name, str) for name in result):
        raise TypeError(
            f"`{argument}` must be the name of a feature, or several. Received: {names!r}. Pass keys of the batch."
        )
    return result


def flat(ids: Any) -> Any:
    """Returns ids of shape `[batch, 1]` as `[batch]`, and others unchanged."""
    return ids[:, 0] if len(ids.shape) == 2 and ids.shape[1] == 1 else ids


def is_missing(y: Any) -> bool:
    """Returns whether a batch has no `y`. Older releases of Keras get an empty tuple in place of `None`."""
    return y is None or (isinstance(y, tuple) and not y)
