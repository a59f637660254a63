"""Several lookups in one table, joined into a single call of the layer."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.tables.sharded_embedding import dense_ids


def lookup_together(tower: keras.layers.Layer, ids: Any) -> Any:
    """Returns the embeddings of several tensors of ids, looked up in a single call of the tower.

    A `RowSparseEmbedding` can be looked up only once in a training step.

    Args:
        tower: a layer that maps ids of any shape to embeddings along a new last dimension, such as a
            `RowSparseEmbedding`.
        ids: list, tuple or dict of int tensors, dense or sparse. If one is symbolic, all must have the same first
            dimension.

    Returns:
        `[..., output_dim]` tensors, in the structure of `ids`.

    Raises:
        ValueError: if `ids` is empty, or if a symbolic tensor has an unknown size beyond its first dimension.

    Example:
    ```python
    tower = RowSparseEmbedding(100, 8)
    positives, negatives = lookup_together(tower, [np.array([3, 7]), np.array([[1, 2], [4, 5], [6, 9]])])
    ```
    """
    tensors = [dense_ids(each) for each in keras.tree.flatten(ids)]
    if not tensors:
        raise ValueError(f"`ids` must contain at least one tensor. Received: ids={ids!r}. Pass the ids to look up.")
    shapes = [tuple(each.shape) for each in tensors]
    if any(None in shape[1:] for shape in shapes):
        raise ValueError(
            "`ids` must have known sizes, except for the first dimension of symbolic tensors. Received: "
            f"shapes {shapes}. Pass the sizes to `keras.Input`, and pad short rows with an id."
        )
    # Joins along axis 1 if possible, which keeps the batch split over the devices.
    by_row = all(shape and shape[0] == shapes[0][0] and 0 not in shape[1:] for shape in shapes)
    axis = 1 if by_row else 0
    widths = [math.prod(shape[axis:]) for shape in shapes]
    rows = [(-1, width) if by_row else (width,) for width in widths]
    together = [ops.reshape(each, row) for each, row in zip(tensors, rows, strict=True)]
    embeddings = tower(ops.concatenate(together, axis=axis))
    parts = ops.split(embeddings, np.cumsum(widths)[:-1].tolist(), axis=axis)
    parts = [
        ops.reshape(part, (*((-1,) if by_row else ()), *shape[axis:], embeddings.shape[-1]))
        for part, shape in zip(parts, shapes, strict=True)
    ]
    return keras.tree.pack_sequence_as(ids, parts)
