"""Requests to an index, padded to common sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_rs_contrib.arguments import is_known, on_host
from keras_rs_contrib.ids import NO_CANDIDATE, to_int32
from keras_rs_contrib.index.inclusion import check_mask, check_only_one, check_shape, with_common_length
from keras_rs_contrib.index.sizes import MIN_EXCLUDED, common_size, pad_columns, pad_rows, to_device


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
        if keras.backend.backend() != "jax" or not all(map(is_known, given)):
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
        size = common_size(max(num_queries, 1))

        def of_queries(array: Any) -> Any:
            # A single row is for all queries.
            return pad_rows(array, size) if array is not None and array.ndim == 2 and len(array) != 1 else array

        candidate_ids, exclude_ids = self.candidate_ids, self.exclude_ids
        if candidate_ids is not None:
            candidate_ids = pad_columns(on_host(candidate_ids), common_size(candidate_ids.shape[1]))
        if exclude_ids is not None:
            exclude_ids = pad_columns(on_host(exclude_ids), common_size(exclude_ids.shape[1], MIN_EXCLUDED))
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


def padded_call(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of the index at common sizes, or as they are if they do not fit or are traced."""
    queries, exclude_ids, include_ids = map(arguments.get, ("query_embeddings", "exclude_ids", "include_ids"))
    shape: tuple[int | None, ...] = tuple(getattr(queries, "shape", ()))

    def has_rows(ids: Any) -> bool:
        return len(ids.shape) == 2 and ids.shape[0] == shape[0]

    fits = (
        len(shape) == 2
        and (exclude_ids is None or has_rows(exclude_ids))
        and (include_ids is None or len(include_ids.shape) == 1 or has_rows(include_ids))
    )
    if not fits:
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
