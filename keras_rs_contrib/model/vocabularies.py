"""Names in the batches of a two-tower model: their rows, and back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_rs_contrib import processes
from keras_rs_contrib.arguments import check_type
from keras_rs_contrib.columns import as_dict, names_in, rank
from keras_rs_contrib.model.feature_names import FeatureNames
from keras_rs_contrib.names import NO_ROW
from keras_rs_contrib.vocabulary import UNKNOWN_ROW, Vocabulary

# What `unknown_candidates` of a model may be.
ACTIONS = ("error", "skip")


@dataclasses.dataclass
class Skipped:
    """How many rows were skipped, because their candidate is not in the vocabulary.

    Attributes:
        counts: the number of rows, and of those skipped, in the last pass of each reader over its data.
        example: a candidate of the rows skipped.
    """

    counts: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    example: Any = None

    def add(self, number: int | None, reader: int, num_rows: int, num_skipped: int) -> None:
        """Adds the rows of a batch.

        Args:
            number: the number of the batch, 0 at the beginning of a pass, or `None` for all rows at once.
            reader: identifies what reads the batches.
            num_rows: the number of rows.
            num_skipped: the number of rows skipped.
        """
        rows, skipped = self.counts.get(reader, (0, 0)) if number != 0 else (0, 0)
        self.counts[reader] = (rows + num_rows, skipped + num_skipped)

    def reset(self) -> None:
        """Counts from 0 again."""
        self.counts.clear()

    def warn(self) -> None:
        """Warns if rows were skipped: once, or in each process that has its own data."""
        if not processes.is_first() and not processes.have_own_data():
            return
        num_rows, num_skipped = (sum(column) for column in zip((0, 0), *self.counts.values(), strict=True))
        if num_skipped:
            warnings.warn(
                f"{num_skipped} of {num_rows} rows were skipped, because their candidate is not in the vocabulary. "
                f"Received: {self.example!r}, for instance. To use them, create the vocabulary from all candidates.",
                stacklevel=3,
            )


@dataclasses.dataclass(frozen=True)
class Vocabularies:
    """The vocabularies of a model, by the names of features.

    Attributes:
        by_feature: the vocabulary of each feature that has one.
        names: the names of the features. Those with rows of candidate ids have the vocabulary of `candidate_id`.
        unknown_candidates: "error", or "skip" for a weight of 0 in place of an error.
        skipped: counts the rows that are skipped.
        are_rows: whether features hold rows already, in place of names.
    """

    by_feature: dict[str, Vocabulary]
    names: FeatureNames
    unknown_candidates: str = "error"
    skipped: Skipped = dataclasses.field(default_factory=Skipped)
    are_rows: bool = False

    @property
    def of_candidates(self) -> Vocabulary | None:
        """The vocabulary of candidate ids, or `None` if they are rows already."""
        return None if self.names.candidate_id is None else self.by_feature.get(self.names.candidate_id)

    def encode(self, features: Any, names: Iterable[str]) -> Any:
        """Returns features whose names are rows, and other features unchanged.

        Args:
            features: columns by name, or a DataFrame.
            names: the features that the model uses.

        Raises:
            TypeError: if a value is neither a string nor an integer, as the vocabulary has them.
            ValueError: if a name is missing.
        """
        features = as_dict(features)
        if self.are_rows or not self.by_feature or not isinstance(features, dict):
            return features
        features = dict(features)
        for name in dict.fromkeys(names):
            if name not in features:
                continue
            of_ids = (self.names.exclude, self.names.positives, self.names.negatives)
            if name in of_ids and self.of_candidates is not None:
                features[name] = self._encode_ids_of(name, features[name])
            elif name in self.by_feature:
                features[name] = _encode_feature(name, self.by_feature[name], features[name])
        return features

    def _encode_ids_of(self, name: str, values: Any) -> np.ndarray[Any, Any]:
        """Returns a feature of candidate ids as rows."""
        assert self.of_candidates is not None
        rows = self.of_candidates.encode(values, padded=True)
        if name == self.names.negatives and (rows == UNKNOWN_ROW).any():
            if self.unknown_candidates == "error":
                place = int(np.argwhere(rows == UNKNOWN_ROW)[0][0])
                raise ValueError(
                    f"The feature {name!r} must hold names of the vocabulary of {self.names.candidate_id!r}. Received: "
                    f"an unknown name in row {place}. Leave it out, or create the model with unknown_candidates='skip'."
                )
            # Row 0 would be trained.
            rows[rows == UNKNOWN_ROW] = NO_ROW
        return rows

    def check_candidates(
        self, names: Any, rows: np.ndarray[Any, Any], sample_weight: Any, number: int | None, reader: int
    ) -> tuple[np.ndarray[Any, Any], Any]:
        """Returns the rows and the weights of candidates, with a weight of 0 for those that are skipped.

        Args:
            names: the names of the candidates.
            rows: `[num_rows]` or `[num_rows, 1]`, their rows.
            sample_weight: the weights, or `None`.
            number: the number of the batch, or `None` for all rows at once.
            reader: identifies what reads the batches.

        Raises:
            ValueError: if a candidate is unknown, and `unknown_candidates` is "error".
        """
        is_unknown = (rows if rows.ndim == 1 else rows[:, 0]) <= UNKNOWN_ROW
        unknown = np.flatnonzero(is_unknown)
        if self.unknown_candidates == "skip":
            self.skipped.add(number, reader, len(rows), unknown.size)
        if not unknown.size:
            return rows, sample_weight
        first = names.iloc[unknown[0]] if hasattr(names, "iloc") else names[unknown[0]]
        if self.unknown_candidates == "error":
            place = "" if number is None else f" of batch {number}"
            raise ValueError(
                f"The feature {self.names.candidate_id!r} must hold names of its vocabulary. Received: {first!r} in "
                f"row {unknown[0]}{place}, and {unknown.size} unknown names in all. Leave such rows out, or create the "
                "model with unknown_candidates='skip'."
            )
        self.skipped.example = first
        # A row of weight 0 needs an id that the model knows.
        known = np.flatnonzero(~is_unknown)
        rows[unknown] = rows[known[0]] if known.size else UNKNOWN_ROW + 1
        weight = np.ones(len(rows), "float32") if sample_weight is None else np.array(sample_weight)
        weight[unknown] = 0
        return rows, weight

    def encode_ids(self, ids: Any) -> Any:
        """Returns rows of candidate ids, in any form that `recommend` takes, as rows of the vocabulary."""
        return ids if ids is None or self.of_candidates is None else self.of_candidates.encode(ids, padded=True)

    def decode_ids(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns the names of candidate ids, or the ids if they have none."""
        return ids if self.of_candidates is None else self.of_candidates.decode(ids)

    def are_unknown(
        self, features: dict[str, Any], names: Iterable[str], query_id: str | None = None, trained: Any = ()
    ) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Returns which queries have no known name, `[num_queries]`, or `None` if no feature has a vocabulary.

        Args:
            features: arrays of rows, by name.
            names: the features of the query tower.
            query_id: the feature that tells queries apart.
            trained: sorted rows of `query_id` that are known, or nothing for all but row 0.
        """
        known = []
        for name in names:
            if name in self.by_feature:
                rows = np.asarray(features[name])
                is_known = rows > UNKNOWN_ROW
                if name == query_id and len(trained):
                    is_known &= np.isin(rows, trained)
                known.append(is_known.any(axis=tuple(range(1, is_known.ndim))))
        return ~np.any(known, axis=0) if known else None

    def named(self, features: dict[str, Any]) -> dict[str, Any]:
        """Returns the values of one row, by feature, with names in place of rows."""
        return {
            name: self.by_feature[name].decode(value).tolist() if name in self.by_feature else value
            for name, value in features.items()
        }


def _encode_feature(name: str, vocabulary: Vocabulary, values: Any) -> np.ndarray[Any, Any]:
    """Returns a column of names as rows. Rows of several names, such as histories, may have padding."""
    try:
        return vocabulary.encode(values, padded=rank(values) > 1)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"The feature {name!r} must hold names of its vocabulary. {error}") from error


def check_action(unknown_candidates: Any) -> str:
    """Returns `unknown_candidates` of a model, or raises `ValueError` if it is none."""
    if unknown_candidates not in ACTIONS:
        raise ValueError(
            f"`unknown_candidates` must be one of {list(ACTIONS)}. Received: {unknown_candidates!r}. Pass one of them."
        )
    return str(unknown_candidates)


def check_vocabularies(
    vocabularies: Any,
    towers: Iterable[tuple[keras.layers.Layer, str | list[str]]],
    ids: Iterable[str | None],
) -> dict[str, Vocabulary]:
    """Returns the vocabularies of a model as a dict, or raises an error if they do not fit its features or tables.

    Args:
        vocabularies: vocabularies by feature, or `None`.
        towers: the towers with their features.
        ids: the features with ids of queries and candidates.

    Raises:
        TypeError: if they are not a dict of `Vocabulary`.
        ValueError: if the model does not have a feature, or a table has too few rows.
    """
    if vocabularies is None:
        return {}
    if not isinstance(vocabularies, dict):
        raise TypeError(
            "`vocabularies` must be a dict by the names of features. Received: "
            f"{vocabularies!r}. Pass {{'user_id': users}}, for instance."
        )
    towers = list(towers)
    features = [name for _, names in towers for name in names_in(names)]
    known = [name for name in dict.fromkeys([*features, *ids]) if name is not None]
    for name, vocabulary in vocabularies.items():
        check_type(f"vocabularies[{name!r}]", vocabulary, Vocabulary)
        if name not in known:
            raise ValueError(
                f"`vocabularies` must be of features of the model. Received: {name!r}, and the features {known}. "
                "Use their names."
            )
    for tower, name in towers:
        if isinstance(tower, keras.layers.Embedding) and isinstance(name, str) and name in vocabularies:
            size = len(vocabularies[name])
            if tower.input_dim < size:
                raise ValueError(
                    f"The table of {name!r} must have a row for each name of its vocabulary, and row 0. Received: "
                    f"input_dim={tower.input_dim} for {size} rows. Create it with input_dim=len(vocabulary)."
                )
    return dict(vocabularies)


def config_of_vocabularies(vocabularies: dict[str, Vocabulary]) -> dict[str, Any]:
    """Returns vocabularies, serialized. Features may share one."""
    different = list({id(each): each for each in vocabularies.values()}.values())
    numbers = {id(each): number for number, each in enumerate(different)}
    return {
        "vocabularies": [keras.saving.serialize_keras_object(each) for each in different],
        "numbers": {name: numbers[id(each)] for name, each in vocabularies.items()},
    }


def vocabularies_of_config(config: Any) -> dict[str, Vocabulary]:
    """Returns the vocabularies that `config_of_vocabularies` has serialized. `None` for none."""
    if config is None:
        return {}
    different = [keras.saving.deserialize_keras_object(each) for each in config["vocabularies"]]
    return {name: different[number] for name, number in config["numbers"].items()}
