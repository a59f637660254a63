"""What a tower must be, and what it must return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.index.candidate_store import is_table
from keras_rs_contrib.tables.joined_lookups import with_joined_lookups
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding

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


def embed_with_joined_lookups(model: Any, embed: Callable[[], Any]) -> Any:
    """Returns the result of `embed`, in a training step, with one lookup for each row-sparse table.

    Args:
        model: a model with a `query_tower` and a `candidate_tower`, which may share tables.
        embed: runs both towers.
    """
    towers = (model.query_tower, model.candidate_tower)
    layers = {id(layer): layer for tower in towers for layer in _keras.sublayers(tower)}
    tables = [layer for layer in layers.values() if isinstance(layer, RowSparseEmbedding) and layer.trainable]
    # Two tables that are the towers are looked up once each.
    if not tables or (towers[0] is not towers[1] and all(is_table(tower) for tower in towers)):
        return embed()
    of_tables = {id(variable) for table in tables for variable in table.variables}
    others = [variable for variable in model.variables if id(variable) not in of_tables]
    return with_joined_lookups(tables, others, embed)
