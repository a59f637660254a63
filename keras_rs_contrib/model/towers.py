"""What a tower must be, and what it must return."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rs_contrib import _keras

# Keras runs them in TensorFlow, which cannot be a part of a function that JAX compiles.
TENSORFLOW_LAYERS = ("Hashing", "HashedCrossing", "IntegerLookup", "StringLookup", "TextVectorization")


def embeddings_of(tower: keras.layers.Layer, inputs: Any, training: bool | None, name: str) -> Any:
    """Returns the embeddings of a batch, `[batch, embedding_dim]`, or `[batch, num_heads, embedding_dim]` of queries.

    Features of shape `[batch, 1]` may give embeddings of shape `[batch, 1, embedding_dim]`, which are reshaped.

    Args:
        tower: the tower.
        inputs: its features.
        training: whether it runs in training mode.
        name: the argument of the model that it is, for errors.

    Raises:
        TypeError: if the tower does not return one tensor.
    """
    outputs = tower(inputs, training=training)
    if not hasattr(outputs, "shape"):
        what = f"a dict with the keys {list(outputs)}" if isinstance(outputs, dict) else f"a {type(outputs).__name__}"
        raise TypeError(
            f"`{name}` must return one tensor, `[batch, embedding_dim]`. Received: {what}. "
            "Return the embeddings alone, or wrap the tower in a layer that selects them."
        )
    if len(outputs.shape) == 3 and outputs.shape[1] == 1:
        outputs = ops.squeeze(outputs, axis=1)
    return outputs


def check_tower(name: str, tower: keras.layers.Layer, features: str | list[str]) -> None:
    """Raises `ValueError` if a tower cannot work on JAX, or with its features.

    Args:
        name: the argument of the model that it is.
        tower: the tower.
        features: its features, of which it receives a list as a dict.
    """
    for layer in _keras.sublayers(tower):
        if type(layer).__name__ in TENSORFLOW_LAYERS and isinstance(layer, keras.layers.Layer):
            raise ValueError(
                f"The layers of `{name}` must run on JAX. Received: {layer.name!r}, a `{type(layer).__name__}`, which "
                "Keras runs in TensorFlow. Apply it in the input pipeline, and pass its result as a feature."
            )
    if isinstance(tower, keras.layers.Embedding) and not isinstance(features, str):
        raise ValueError(
            f"An embedding takes one feature, and not a dict. Received: {features!r} for `{name}`. "
            f"Pass the name itself: {features[0]!r}."
        )
