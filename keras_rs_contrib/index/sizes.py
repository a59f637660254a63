"""The sizes at which an index is searched: powers of two, so that requests of any size share few compiled programs."""

from __future__ import annotations

from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_rs_contrib import processes
from keras_rs_contrib.arguments import on_host
from keras_rs_contrib.ids import NO_CANDIDATE

# The least number of columns of excluded ids, if there are any: fewer cost as much.
MIN_EXCLUDED = 8
# The least k, unless it is that of the index: fewer cost as much.
MIN_K = 16
# More queries than this are searched in parts of different sizes, rather than with up to as much padding as queries.
MAX_PADDED_QUERIES = 64


def common_size(number: int, least: int = 1) -> int:
    """Returns the smallest power of two that is at least `number` and `least`, or 0 for 0."""
    return max(least, 1 << (number - 1).bit_length()) if number else 0


def sizes_up_to(number: int, least: int = 1) -> list[int]:
    """Returns all sizes that `common_size` returns for numbers from 1 to `number`, in ascending order."""
    return [size for size in (1 << i for i in range(common_size(number, least).bit_length())) if size >= least]


def parts(number: int, most: int) -> list[tuple[int, int]]:
    """Returns how many queries to search at once, pairs of a number and its padded size.

    Args:
        number: the number of queries.
        most: how many queries may be searched at once.
    """
    most = 1 << (most.bit_length() - 1)
    result = []
    while number > most:
        result.append((most, most))
        number -= most
    while number > MAX_PADDED_QUERIES and 4 * number < 3 * common_size(number):
        size = common_size(number) // 2
        result.append((size, size))
        number -= size
    return [*result, (number, common_size(max(number, 1)))]


def pad_rows(array: Any, size: int, of_none: Any = 0) -> Any:
    """Returns an array with `size` rows, the last of which repeat the last one, or hold `of_none` if it has none."""
    missing = size - array.shape[0]
    if not missing:
        return array
    array = on_host(array)
    if not len(array):
        return np.full((size, *array.shape[1:]), of_none, array.dtype)
    return np.concatenate([array, np.broadcast_to(array[-1:], (missing, *array.shape[1:]))])


def pad_columns(ids: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Returns `[size]` or `[num_rows, size]` ids on the host, with -1 in the added columns."""
    missing = size - ids.shape[-1]
    padding = [(0, 0)] * (ids.ndim - 1) + [(0, missing)]
    return np.pad(ids, padding, constant_values=NO_CANDIDATE) if missing else ids


def as_array(values: Any) -> Any:
    """Returns an array or a tensor as it is, and other values as a NumPy array."""
    return values if hasattr(values, "shape") else np.asarray(values)


def to_device(array: np.ndarray[Any, Any]) -> Any:
    """Returns an array on the host as a tensor. From JAX 0.10 on, `jnp.asarray` compiles a program for each shape."""
    if processes.num_processes() > 1:
        return processes.on_all_devices(array)
    return jax.device_put(array) if keras.backend.backend() == "jax" else ops.convert_to_tensor(array)
