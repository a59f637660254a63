"""What a tower must be, and what it must return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.columns import select
from keras_rs_contrib.index.candidate_store import is_table
from keras_rs_contrib.index.corpus import input_names
from keras_rs_contrib.model.feature_names import FeatureNames, flat
from keras_rs_contrib.tables.joined_lookups import with_joined_lookups
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding

# Keras runs them in TensorFlow, which cannot be a part of a function that JAX compiles.
TENSORFLOW_LAYERS = (
    keras.layers.Hashing,
    keras.layers.HashedCrossing,
    keras.layers.IntegerLookup,
    keras.layers.StringLookup,
    keras.layers.TextVectorization,
)


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


@dataclasses.dataclass(frozen=True)
class TowerCandidates:
    """The input of a candidate tower: the candidates of a batch, and other ids that are looked up with them.

    They are joined, because a `RowSparseEmbedding` allows one lookup per step.

    Attributes:
        inputs: what the tower is called with.
        num_queries: the number of candidates of the batch.
        num_negatives: the number of negatives of each query alone, or `None`.
    """

    inputs: Any
    num_queries: Any
    num_negatives: int | None

    @classmethod
    def join(cls, features: dict[str, Any], names: FeatureNames, drawn_ids: Any) -> TowerCandidates:
        """Returns the candidates of a batch.

        Args:
            features: the batch.
            names: the names of its features.
            drawn_ids: `[num_drawn]` int32, or `None`.
        """
        inputs = select(features, names.candidate)
        negative_ids = None if names.negatives is None else features.get(names.negatives)
        if drawn_ids is None and negative_ids is None:
            return cls(inputs, None, None)
        ids = ops.cast(flat(inputs), "int32")
        num_queries, num_negatives = ops.shape(ids)[0], None
        if negative_ids is not None:
            num_negatives = int(negative_ids.shape[1])
            # Padding is looked up too, and masked in the loss.
            negative_ids = ops.maximum(ops.cast(negative_ids, "int32"), 0)
            ids = ops.reshape(ops.concatenate([ops.expand_dims(ids, 1), negative_ids], axis=1), (-1,))
        if drawn_ids is not None:
            ids = ops.concatenate([ids, drawn_ids])
        return cls(ids, num_queries, num_negatives)

    def split(self, embeddings: Any) -> tuple[Any, Any]:
        """Returns the embeddings of candidates, and of negatives of each query, `[num_queries, n, embedding_dim]`."""
        if self.num_negatives is None:
            return embeddings, None
        num_rows = self.num_queries * (1 + self.num_negatives)
        dimension = embeddings.shape[-1]
        of_queries = ops.reshape(embeddings[:num_rows], (-1, 1 + self.num_negatives, dimension))
        return ops.concatenate([of_queries[:, 0], embeddings[num_rows:]]), of_queries[:, 1:]


def check_tower(name: str, tower: keras.layers.Layer, features: str | list[str]) -> None:
    """Raises `ValueError` if a tower cannot work on JAX, or with its features.

    Args:
        name: the argument of the model that it is.
        tower: the tower.
        features: its features, of which it receives a list as a dict.
    """
    for layer in _keras.sublayers(tower):
        if isinstance(layer, TENSORFLOW_LAYERS):
            raise ValueError(
                f"The layers of `{name}` must run on JAX. Received: {layer.name!r}, a `{type(layer).__name__}`, which "
                "Keras runs in TensorFlow. Apply it in the input pipeline, and pass its result as a feature."
            )
    inputs = input_names(tower)
    if inputs is not None and not isinstance(features, str) and set(inputs) != set(features):
        raise ValueError(
            "The features of a functional tower must be its inputs, which Keras does not match by name. Received: "
            f"{features} for `{name}`, whose inputs are {sorted(inputs)}. Pass the names of its inputs."
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
