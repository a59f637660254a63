"""What an exported retrieval consists of: arrays, names and a tower, in a folder that another process reads."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import keras
import numpy as np

# Names in a folder.
TOWER, ARRAYS, SETTINGS = "tower.keras", "arrays.npz", "settings.json"


@dataclasses.dataclass(frozen=True)
class ExportedFeature:
    """A feature of queries.

    Attributes:
        name: its name.
        shape: its shape, without the batch.
        dtype: its dtype, as the tower takes it.
        names: the names of its vocabulary, by row from 1 on; `None` if it has none.
        is_of_tower: whether the tower takes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    names: list[Any] | None = None
    is_of_tower: bool = True

    @property
    def input_name(self) -> str:
        """Its name as an input: formats take letters, digits and underscores alone."""
        return re.sub(r"\W", "_", self.name, flags=re.ASCII)


@dataclasses.dataclass(frozen=True)
class ExportedRetrieval:
    """A query tower and the candidates that it searches.

    Attributes:
        features: the features of queries.
        k: the number of candidates to return.
        similarity: that of the index, for queries; the candidates are comparable already.
        query_id: the feature that tells queries apart, or `None`.
        candidate_names: names of candidate ids, by id from 1 on, or `None`.
        arrays: NumPy arrays by name. `table` `[n, embedding_dim]` float32, the candidates that may be returned, and
            their `ids` `[n]` int32. `counts` `[n]` float32, their numbers of rows in the training data, for unknown
            queries. `is_trained` `[num_rows]` bool, which rows of `query_id` are known. `seen_queries` `[q]`,
            `seen_starts` `[q + 1]` and `seen_ids`, what queries have seen. All but the first two are optional.
    """

    features: list[ExportedFeature]
    k: int
    similarity: str
    query_id: str | None
    candidate_names: list[Any] | None
    arrays: dict[str, np.ndarray[Any, Any]]

    def save(self, folder: pathlib.Path, tower: ExportedTower) -> None:
        """Writes everything into a folder."""
        tower.save(folder / TOWER)
        np.savez(folder / ARRAYS, **self.arrays)  # type: ignore[arg-type]
        settings = {
            "features": [dataclasses.asdict(feature) for feature in self.features],
            "k": self.k,
            "similarity": self.similarity,
            "query_id": self.query_id,
            "candidate_names": self.candidate_names,
        }
        (folder / SETTINGS).write_text(json.dumps(settings))

    @classmethod
    def load(cls, folder: pathlib.Path, classes: dict[str, Any]) -> tuple[ExportedRetrieval, ExportedTower]:
        """Reads what `save` has written, in a process of one's own, with the classes of the tower by name."""
        settings = json.loads((folder / SETTINGS).read_text())
        features = [ExportedFeature(**{**each, "shape": tuple(each["shape"])}) for each in settings.pop("features")]
        with np.load(folder / ARRAYS) as arrays:
            retrieval = cls(features=features, arrays=dict(arrays), **settings)
        # This process has written the file, and may run its code.
        return retrieval, keras.saving.load_model(
            folder / TOWER, custom_objects=classes, compile=False, safe_mode=False
        )


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class ExportedTower(keras.Model):  # type: ignore[misc]
    """A query tower alone, on a dict of its features.

    Args:
        tower: a built layer or model.
        names: its feature, of which it receives a tensor, or a list, of which it receives a dict.
        features: shape, without the batch, and dtype of each feature, by name.
        **kwargs: arguments of `keras.Model`.
    """

    def __init__(self, tower: keras.layers.Layer, names: Any, features: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.tower = tower
        self.names = names
        # Hidden from Keras's attribute tracking.
        object.__setattr__(self, "features", features)

    def call(self, features: dict[str, Any]) -> Any:
        """Returns `[batch, embedding_dim]` float32 embeddings."""
        inputs = features[self.names] if isinstance(self.names, str) else {name: features[name] for name in self.names}
        outputs = self.tower(inputs, training=False)
        outputs = keras.ops.squeeze(outputs, axis=1) if len(outputs.shape) == 3 else outputs
        return keras.ops.cast(outputs, "float32")

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, serialized."""
        tower = keras.saving.serialize_keras_object(self.tower)
        return {**super().get_config(), "tower": tower, "names": self.names, "features": self.features}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ExportedTower:
        """Returns the model that `get_config` describes."""
        config = dict(config)
        return cls(keras.saving.deserialize_keras_object(config.pop("tower")), **config)

    def get_build_config(self) -> dict[str, Any]:
        """Returns what `build_from_config` takes."""
        return {"features": self.features}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the tower for its features."""
        self({name: keras.KerasTensor((None, *shape), dtype) for name, (shape, dtype) in config["features"].items()})
