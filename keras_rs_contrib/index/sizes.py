"""The sizes at which an index is searched: powers of two, so that requests of any size share few compiled programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_rs_contrib.ids import NO_CANDIDATE, to_int32
from keras_rs_contrib.index.inclusion import check_mask, check_only_one, check_shape, is_known, with_common_length

# The least number of columns of excluded ids, if there are any: fewer cost as much.
MIN_EXCLUDED = 8
# The least k, unless it is that of the index: fewer cost as much.
MIN_K = 16
# More queries than this are searched in parts of different sizes, rather than with up to as much padding as queries.
MAX_PADDED_QUERIES = 64


def padded_size(number: int, least: int = 1) -> int:
    """Returns the smallest power of two that is at least `number` and `least`, or 0 for 0."""
    return max(least, 1 << (number - 1).bit_length()) if number else 0


def sizes_up_to(number: int, least: int = 1) -> list[int]:
    """Returns all sizes that `padded_size` returns for numbers from 1 to `number`, in ascending order."""
    return [size for size in (1 << i for i in range(padded_size(number, least).bit_length())) if size >= least]


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
    while number > MAX_PADDED_QUERIES and 4 * number < 3 * padded_size(number):
        size = padded_size(number) // 2
        result.append((size, size))
        number -= size
    return [*result, (number, padded_size(max(number, 1)))]


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
    """Returns `[num_rows, size]` ids on the host, with -1 in the added columns."""
    missing = size - ids.shape[1]
    return np.pad(ids, ((0, 0), (0, missing)), constant_values=NO_CANDIDATE) if missing else ids


def as_array(values: Any) -> Any:
    """Returns an array or a tensor as it is, and other values as a NumPy array."""
    return values if hasattr(values, "shape") else np.asarray(values)


def on_host(array: Any) -> np.ndarray[Any, Any]:
    """Returns an array or a tensor as a NumPy array."""
    return ops.convert_to_numpy(array) if ops.is_tensor(array) else np.asarray(array)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is searched: queries, their ids, and the candidates to which they are limited, padded to common sizes.

    Within compiled functions, and on backends that do not compile, nothing is padded.

    Attributes:
        queries: `[num_queries, embedding_dim]` float.
        candidate_ids: `[num_queries, n]` int32, candidates to rank; or `None`.
        exclude_ids: `[num_queries, m]` int32, or `None`.
        include_ids: `[m]` or `[num_queries, m]` int32, or `None`.
        include_mask: `[num_candidates]` or `[num_queries, num_candidates]` bool, or `None`.
        is_padded: whether the sizes are common ones.
    """

    queries: Any
    candidate_ids: Any = None
    exclude_ids: Any = None
    include_ids: Any = None
    include_mask: Any = None
    is_padded: bool = False

    def padded(self, num_candidates: int) -> Request:
        """Returns the request at a common size.

        Raises:
            TypeError: if ids are not integers, or a mask is not of bools.
            ValueError: if a shape does not fit, or candidates are included by ids and by a mask.
        """
        ids = (self.candidate_ids, self.exclude_ids, self.include_ids)
        given = [each for each in (self.queries, *ids, self.include_mask) if each is not None]
        if keras.backend.backend() != "jax" or not all(map(_can_be_read, given)):
            return self
        num_queries = self.queries.shape[0]
        check_only_one(self.include_ids, self.include_mask)
        include_ids, include_mask = self.include_ids, self.include_mask
        if include_ids is not None:
            include_ids = on_host(to_int32(include_ids, "include_ids"))
            check_shape("include_ids", include_ids, num_queries)
        if include_mask is not None:
            include_mask = on_host(include_mask)
            check_mask(include_mask, num_queries, num_candidates)
        size = padded_size(max(num_queries, 1))

        def of_queries(array: Any) -> Any:
            # A single row is for all queries.
            return pad_rows(array, size) if array is not None and array.ndim == 2 and len(array) != 1 else array

        candidate_ids, exclude_ids = self.candidate_ids, self.exclude_ids
        if candidate_ids is not None:
            candidate_ids = pad_columns(on_host(candidate_ids), padded_size(candidate_ids.shape[1]))
        if exclude_ids is not None:
            exclude_ids = pad_columns(on_host(exclude_ids), padded_size(exclude_ids.shape[1], MIN_EXCLUDED))
        return Request(
            pad_rows(self.queries, size),
            None if candidate_ids is None else pad_rows(candidate_ids, size, NO_CANDIDATE),
            None if exclude_ids is None else pad_rows(exclude_ids, size, NO_CANDIDATE),
            of_queries(include_ids),
            of_queries(include_mask),
            is_padded=True,
        )


def cut(array: Any, shape: tuple[int | None, ...]) -> Any:
    """Returns the first rows and columns of a result, on the device. A slice there would be one more program.

    Args:
        array: `[num_rows, num_columns]`, at least as many as in `shape`.
        shape: the shape of the result, `(n,)` for one column.
    """
    if tuple(array.shape) == shape:
        return array
    num_columns = shape[1] if len(shape) == 2 else 1
    # Within a compiled function, arrays of constants give results that are traced.
    array = on_host(array) if is_known(array) else array
    array = array[: shape[0], :num_columns].reshape(shape)
    return to_device(array) if isinstance(array, np.ndarray) else array


def to_device(array: np.ndarray[Any, Any]) -> Any:
    """Returns an array on the host as a tensor. From JAX 0.10 on, `jnp.asarray` compiles a program for each shape."""
    return jax.device_put(array) if keras.backend.backend() == "jax" else ops.convert_to_tensor(array)


def padded_call(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of the index at common sizes, or as they are if they do not fit or are traced."""
    given = {name: value for name, value in arguments.items() if value is not None}
    queries = given.get("query_embeddings")
    exclude_ids, include_ids = given.get("exclude_ids"), given.get("include_ids")
    shape: tuple[int | None, ...] = tuple(getattr(queries, "shape", ()))
    has_rows = all(len(ids.shape) == 2 and ids.shape[0] == shape[0] for ids in (exclude_ids,) if ids is not None)
    has_lists = all(
        len(ids.shape) == 1 or (len(ids.shape) == 2 and ids.shape[0] == shape[0])
        for ids in (include_ids,)
        if ids is not None
    )
    if len(shape) != 2 or not has_rows or not has_lists:
        return arguments
    request = Request(queries, exclude_ids=exclude_ids, include_ids=include_ids).padded(0)
    if not request.is_padded:
        return arguments
    result = {"query_embeddings": request.queries, "exclude_ids": request.exclude_ids}
    if request.include_ids is not None:
        result["include_ids"] = with_common_length(request.include_ids)
    result = {name: value for name, value in result.items() if value is not None}
    result = {name: to_device(value) if isinstance(value, np.ndarray) else value for name, value in result.items()}
    # Within a compiled function, constants are traced too.
    return {**arguments, **result} if all(map(is_known, result.values())) else arguments


def _can_be_read(array: Any) -> bool:
    return is_known(array) and (not isinstance(array, jax.Array) or array.is_fully_addressable)
