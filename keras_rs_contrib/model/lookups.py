"""Which features of a batch a tower looks up in its tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras

from keras_rs_contrib import _keras
from keras_rs_contrib.model.feature_checks import AllowedIds
from keras_rs_contrib.model.feature_names import select


class TowerLookups:
    """The features that towers look up, determined once for each tower.

    Args:
        towers: layers or models, each with the names of its features.
        build: builds the towers, called with the shapes and dtypes of a batch.
    """

    def __init__(
        self,
        towers: Sequence[tuple[keras.layers.Layer, list[str]]],
        build: Callable[[dict[str, keras.KerasTensor]], Any],
    ) -> None:
        self._towers = towers
        self._build = build
        self._known: dict[str, dict[str, AllowedIds]] = {}

    def find(self, features: dict[str, Any]) -> dict[str, AllowedIds]:
        """Returns the rows of the tables, by the name of the feature, as far as batches have shown.

        Args:
            features: a batch, as arrays; towers whose features it lacks are left for later.
        """
        for tower, names in self._towers:
            if tower.path in self._known or not all(name in features for name in names):
                continue
            if not all(layer.built for layer in _keras.sublayers(tower)):
                # JAX warns of dtypes that it would truncate.
                dtypes = {name: jax.dtypes.canonicalize_dtype(array.dtype) for name, array in features.items()}
                self._build({name: keras.KerasTensor(features[name].shape, dtype) for name, dtype in dtypes.items()})
            self._known[tower.path] = looked_up_features(tower, {name: features[name] for name in names})
        return {name: ids for lookups in self._known.values() for name, ids in lookups.items()}


@contextlib.contextmanager
def noting_lookups(
    tower: keras.layers.Layer, features: dict[str, Any], lookups: dict[str, AllowedIds]
) -> Iterator[None]:
    """Notes, while a tower runs, which features go straight into one of its embeddings.

    Args:
        tower: a layer or model.
        features: the very tensors that the tower is called with.
        lookups: where to note the rows of the embeddings, by the name of the feature.
    """

    def noting(embedding: keras.layers.Embedding, call: Callable[..., Any]) -> Callable[..., Any]:
        def call_and_note(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            for name, tensor in features.items():
                if tensor is inputs and (name not in lookups or embedding.input_dim < lookups[name].num_rows):
                    lookups[name] = AllowedIds(embedding.input_dim, f"{embedding.name!r}")
            return call(inputs, *args, **kwargs)

        return call_and_note

    embeddings = [layer for layer in _keras.sublayers(tower) if isinstance(layer, keras.layers.Embedding)]
    for embedding in embeddings:
        # Hidden from Keras's attribute tracking.
        object.__setattr__(embedding, "call", noting(embedding, embedding.call))
    try:
        yield
    finally:
        for embedding in embeddings:
            object.__delattr__(embedding, "call")


def looked_up_features(tower: keras.layers.Layer, features: dict[str, Any]) -> dict[str, AllowedIds]:
    """Returns the features that go straight into an embedding of a tower, and the rows of the embedding.

    Nothing is computed: the tower is traced, even while its variables have no value.

    Args:
        tower: a built layer or model.
        features: a batch of its features, as arrays.
    """
    variables = tower.variables
    lookups: dict[str, AllowedIds] = {}

    def run(values: list[Any], tensors: dict[str, Any]) -> None:
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping), noting_lookups(tower, tensors, lookups):
            tower(select(tensors, list(tensors)), training=False)

    jax.eval_shape(
        run, [jax.ShapeDtypeStruct(tuple(variable.shape), variable.dtype) for variable in variables], features
    )
    return lookups
