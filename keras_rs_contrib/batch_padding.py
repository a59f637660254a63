"""Padding of a batch with rows of weight 0."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_rs_contrib import distribution, processes


def batch_length(batch: Any) -> int:
    """Returns the number of rows of the arrays of a batch, or raises `ValueError` if they differ."""
    arrays = [array for array in keras.tree.flatten(batch) if array is not None]
    if any(len(array.shape) == 0 for array in arrays):
        raise ValueError(
            "The arrays of a batch must have a row for each example. Received: a single number. "
            "Batch the dataset first: `dataset.batch(batch_size)`."
        )
    lengths = {int(array.shape[0]) for array in arrays}
    if len(lengths) != 1:
        raise ValueError(
            "The arrays of a batch must have a row for each example. Received: "
            f"arrays of lengths {sorted(lengths)}. Cut them from the same examples."
        )
    return lengths.pop()


def padded_size(size: int, multiple: int | None = None) -> int:
    """Returns `ceil(max(size, 1) / multiple) * multiple`, the number of rows of a padded batch.

    Args:
        size: number of rows before padding.
        multiple: what must divide the number, or `None` for the number of replicas of the distribution in force.
    """
    multiple = multiple or distribution.num_replicas()
    return -(-max(size, 1) // multiple) * multiple


def pad(x: Any, y: Any, sample_weight: Any, size: int, new_size: int) -> tuple[Any, Any, Any]:
    """Returns a batch followed by rows of weight 0.

    Args:
        x: nested structure of `[size, ...]` arrays.
        y: the same, or `None`.
        sample_weight: the same, or `None` for 1.
        size: number of rows of the batch.
        new_size: number of rows with padding.
    """
    if sample_weight is None:
        sample_weight = np.ones(size, "float32")
    if new_size == size:
        return x, y, sample_weight
    rows = np.minimum(np.arange(new_size), size - 1)

    def repeat_last(array: Any) -> Any:
        array = np.asarray(array)
        return array[rows] if size else np.zeros((new_size, *array.shape[1:]), array.dtype)

    def add_zeros(weight: Any) -> Any:
        weight = np.asarray(weight)
        return np.concatenate([weight, np.zeros((new_size - size, *weight.shape[1:]), weight.dtype)])

    x, y = keras.tree.map_structure(repeat_last, (x, y), none_is_leaf=False)
    return x, y, keras.tree.map_structure(add_zeros, sample_weight)


def pad_for_process(batch: Any, size: int, size_of_all: int, multiple: int | None = None) -> tuple[Any, int]:
    """Returns the padded rows of a batch that one of several processes feeds, and for how many rows it gets results.

    Args:
        batch: `(x, y, sample_weight)`: all rows of the batch, or, if each process has its own data, those of this one.
        size: the number of these rows.
        size_of_all: the largest number of rows that a process has in this step.
        multiple: what must divide the number of rows in all processes, as in `pad_batches`.
    """
    x, y, sample_weight = batch
    part = processes.part_of_batch()
    if processes.have_own_data():
        new_size = padded_size(size_of_all, part.num_replicas)
        return pad(x, y, sample_weight, size, new_size), new_size
    new_size = padded_size(size, multiple)
    rows = part.rows(new_size)
    padded = pad(x, y, sample_weight, size, new_size)
    return keras.tree.map_structure(lambda array: array[rows], padded, none_is_leaf=False), new_size
