"""The role of each feature of a batch in a two-tower model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class FeatureNames:
    """The names under which a two-tower model finds its inputs in a dict of features.

    Attributes:
        query: features of the query tower.
        candidate: features of the candidate tower.
        candidate_id: the feature with the ids of candidates, or `None`.
        label: the feature with labels, or `None`.
        exclude: the feature with excluded ids, or `None`.
    """

    query: list[str]
    candidate: list[str]
    candidate_id: str | None = None
    label: str | None = None
    exclude: str | None = None

    def needed(self, queries_only: bool, y: Any = None) -> list[str]:
        """Returns the features that a batch must hold.

        Args:
            queries_only: whether candidates are not needed.
            y: labels that come separately from the features, or `None`.
        """
        names: list[str | None] = list(self.query)
        if not queries_only:
            names += [*self.candidate, self.candidate_id, self.label if is_missing(y) else None]
        return [name for name in dict.fromkeys(names) if name is not None]

    def check(self, features: Any, names: Iterable[str]) -> None:
        """Raises if a batch is not a dict (`TypeError`) or lacks one of the `names` (`ValueError`)."""
        if not isinstance(features, dict):
            raise TypeError(
                "A batch must be a dict of features. Received: "
                f"{type(features).__name__}. Name its arrays, such as {{{self.query[0]!r}: ...}}."
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
        labels = features[self.label] if is_missing(y) else y
        # Keras's own losses take both shapes.
        return labels[:, 0] if len(labels.shape) == 2 and labels.shape[1] == 1 else labels

    def exclude_ids(self, features: dict[str, Any]) -> Any:
        """Returns the excluded ids of the queries, or `None` if the batch has none."""
        return None if self.exclude is None else features.get(self.exclude)


def feature_names(argument: str, names: str | Sequence[str]) -> list[str]:
    """Returns one name or several as a list, or raises `TypeError` if they are not names."""
    result = [names] if isinstance(names, str) else list(names) if isinstance(names, (list, tuple)) else []
    if not result or not all(isinstance(name, str) for name in result):
        raise TypeError(
            f"`{argument}` must be the name of a feature, or several. Received: {names!r}. Pass keys of the batch."
        )
    return result


def select(features: dict[str, Any], names: list[str]) -> Any:
    """Returns the input of a tower: its one feature itself, or several as a dict."""
    return features[names[0]] if len(names) == 1 else {name: features[name] for name in names}


def is_missing(y: Any) -> bool:
    """Returns whether a batch has no `y`. Older releases of Keras get an empty tuple in place of `None`."""
    return y is None or (isinstance(y, tuple) and not y)
