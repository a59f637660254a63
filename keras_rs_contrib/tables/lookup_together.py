"""Several lookups in one table, joined into one."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops


def lookup_together(tower: keras.layers.Layer, ids: Any) -> Any:
    """Returns the embeddings of several sets of ids, looked up at once.

    Args:
        tower: a layer that adds a last dimension to ids of any shape, such as a `RowSparseEmbedding`.
        ids: a list, tuple or dict of int tensors, symbolic ones too where all have the same first dimension.

    Returns:
        The same structure, of `[..., output_dim]` tensors.

    Raises:
        ValueError: if there are no ids, or symbolic ones of a size unknown beyond the first dimension.

    Example:
    ```python
    tower = RowSparseEmbedding(100, 8)
    positives, negatives = lookup_together(tower, [np.array([3, 7]), np.array([[1, 2], [4, 5], [6, 9]])])
    ```
    """
    tensors = [ops.convert_to_tensor(each) for each in keras.tree.flatten(ids)]
    if not tensors:
        raise ValueError("`ids` must hold at least one tensor. Received: none. Pass the ids that are to be looked up.")
    shapes = [tuple(each.shape) for each in tensors]
    if any(None in shape[1:] for shape in shapes):
        raise ValueError(
            "`ids` must have known sizes, but for the first dimension of symbolic ones. Received: "
            f"shapes {shapes}. Give `keras.Input` the sizes, and fill short rows up with an id."
        )
    # By row where that can be: a batch stays split over the devices as it was.
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
