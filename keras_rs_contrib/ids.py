"""Candidate ids: int32 labels of candidates, refused where a conversion would change them."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

# Stands for "no candidate" where there are fewer candidates than places.
NO_CANDIDATE = -1


def check_candidate_ids(candidate_ids: Any, name: str = "candidate_ids") -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns ids as int32, or raises where one of them is no int32.

    JAX wraps wider integers to int32 without a word, so that 2**31 + 5 would become another candidate's id.

    Args:
        candidate_ids: integers of any width, as a list, an array or a tensor.
        name: what the ids are called in errors.

    Returns:
        int32 array, shape of `candidate_ids`.

    Raises:
        TypeError: if they are no integers.
        ValueError: if one lies outside int32.
    """
    try:
        ids = ops.convert_to_numpy(candidate_ids) if ops.is_tensor(candidate_ids) else np.asarray(candidate_ids)
    except ValueError as error:
        raise TypeError(f"`{name}` must be an array of integers. Received: {error} Pass rows of one length.") from error
    if ids.size == 0:
        return ids.astype(np.int32)
    # Python integers in an array of objects are as good, and may be larger than any dtype holds.
    integers = ids.dtype == object and all(
        isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in ids.flat
    )
    if not integers and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"`{name}` must be integers. Received: dtype {ids.dtype}, such as {ids.flat[0]!r}. "
            "Number the candidates and keep the table of their names, or use `keras.layers.StringLookup`."
        )
    limits = np.iinfo(np.int32)
    outside = ids[(ids < limits.min) | (ids > limits.max)]
    if outside.size:
        raise ValueError(
            f"`{name}` must lie in [{limits.min}, {limits.max}], the range of int32. "
            f"Received: {int(outside[0])}. Number the candidates from 0 and keep the table of their ids."
        )
    return ids.astype(np.int32)


def to_int32(ids: Any, name: str) -> Any:
    """Returns ids as int32, checked as far as they are known.

    Args:
        ids: integers, as a list, an array or a tensor, which may be symbolic.
        name: what the ids are called in errors.

    Returns:
        A tensor as a tensor of int32, anything else as a NumPy array.

    Raises:
        TypeError: if they are no integers.
        ValueError: if one lies outside int32.
    """
    if not ops.is_tensor(ids) and not isinstance(ids, keras.KerasTensor):
        return check_candidate_ids(ids, name)
    dtype = keras.backend.standardize_dtype(ids.dtype)
    if "int" not in dtype:
        raise TypeError(f"`{name}` must be integers. Received: dtype {dtype}. Cast them, or number the candidates.")
    if dtype == "int32":
        return ids
    is_known = not isinstance(ids, keras.KerasTensor) and not isinstance(ids, jax.core.Tracer)
    if is_known and (keras.backend.backend() == "jax" or hasattr(ids, "numpy")):
        return check_candidate_ids(ids, name)
    return ops.cast(ids, "int32")


class IdArguments(keras.layers.Layer):  # type: ignore[misc]
    """Checks a layer's arguments that hold ids, before Keras converts them to int32.

    Keras and JAX wrap wider integers silently, so that 2**32 + 5 becomes another candidate's id.

    Attributes:
        id_arguments: names of the arguments of `call` that hold ids.
    """

    id_arguments: tuple[str, ...] = ("candidate_ids", "exclude_ids")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, with ids as int32."""
        names = _argument_names(type(self))

        def checked(name: str | None, value: Any) -> Any:
            return to_int32(value, name) if name in self.id_arguments and value is not None else value

        args = tuple(checked(name, value) for name, value in zip_longest(names[: len(args)], args))
        return super().__call__(*args, **{name: checked(name, value) for name, value in kwargs.items()})


@functools.cache
def _argument_names(layer_class: type) -> list[str]:
    """Returns the names of the arguments of a layer's `call`, in order."""
    return list(inspect.signature(layer_class.call).parameters)[1:]  # type: ignore[attr-defined]


def check_corpus_ids(
    candidate_ids: Any, num_candidates: int, exclude_ids: list[int]
) -> np.ndarray[Any, np.dtype[np.int32]] | None:
    """Returns the ids of a corpus as int32, one for each candidate, each once.

    Args:
        candidate_ids: `[num_candidates]` integers, or `None`, where row numbers are the ids.
        num_candidates: rows in the candidate table.
        exclude_ids: ids that are to be left out.

    Returns:
        `[num_candidates]` int32, or `None`.

    Raises:
        TypeError: if they are no integers.
        ValueError: if their number is wrong, one lies outside int32, occurs twice, or is -1, which means "none", or
            one to be left out is not there.
    """
    ids = np.arange(num_candidates, dtype=np.int32) if candidate_ids is None else check_candidate_ids(candidate_ids)
    if ids.shape != (num_candidates,):
        raise ValueError(
            "`candidate_ids` needs one id for each candidate. Received: "
            f"shape {ids.shape} for {num_candidates} candidates. Pass a flat list of {num_candidates} ids."
        )
    unique, counts = np.unique(ids, return_counts=True)
    if unique.size < ids.size:
        raise ValueError(
            "`candidate_ids` must differ from one another. Received: "
            f"{int(unique[counts > 1][0])} for {int(counts[counts > 1][0])} candidates. Drop the duplicates."
        )
    if NO_CANDIDATE in unique:
        raise ValueError(
            f"`candidate_ids` must not hold {NO_CANDIDATE}, which stands for no candidate. "
            f"Received: {NO_CANDIDATE} for one of {num_candidates} candidates. Give that candidate another id."
        )
    unknown = np.setdiff1d(exclude_ids, unique)
    if unknown.size:
        raise ValueError(
            "`exclude_ids` must be ids of candidates. Received: "
            f"{int(unknown[0])} for {num_candidates} candidates with ids {int(ids.min())} to {int(ids.max())}. Drop it."
        )
    return None if candidate_ids is None else ids


def group_candidate_ids(query_ids: Any, candidate_ids: Any, queries: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns the candidates of each query as one row, of pairs of a query and a candidate.

    It makes the `exclude_ids` of an index from what has been seen, and the positives of a user-level evaluation from
    what is held out.

    Args:
        query_ids: `[num_pairs]` ints, such as the users of ratings.
        candidate_ids: `[num_pairs]` ints, such as the films rated.
        queries: `[num_queries]` ints, the queries wanted, each once. Pairs of others are left out.

    Returns:
        `[num_queries, m]` int32, m the most candidates that one of the queries has and at least 1, rows filled with -1.
        Each candidate stands in a row once, in the order of its first pair.

    Raises:
        TypeError: if ids are no integers.
        ValueError: if they are not flat, the pairs' differ in number, a query comes twice, or an id is outside int32.

    Example:
    ```python
    seen = group_candidate_ids([7, 8, 7], [100, 200, 300], queries=[8, 7])  # [[200, -1], [100, 300]]
    ```
    """
    query_ids = check_candidate_ids(query_ids, "query_ids")
    candidate_ids = check_candidate_ids(candidate_ids)
    queries = check_candidate_ids(queries, "queries")
    if query_ids.ndim != 1 or query_ids.shape != candidate_ids.shape or queries.ndim != 1:
        raise ValueError(
            "`query_ids` and `candidate_ids` must be flat and of one length, and `queries` flat. Received: shapes "
            f"{query_ids.shape}, {candidate_ids.shape} and {queries.shape}. Pass one entry for each pair."
        )
    order = np.argsort(queries, kind="stable")
    in_order = queries[order]
    if (in_order[1:] == in_order[:-1]).any():
        twice = in_order[1:][in_order[1:] == in_order[:-1]][0]
        raise ValueError(f"`queries` must differ from one another. Received: {twice} twice. Drop the duplicates.")
    places = np.searchsorted(in_order, query_ids)
    wanted = np.isin(query_ids, queries)
    # Watched twice is watched: of equal pairs, the first.
    _, first = np.unique(np.stack([query_ids, candidate_ids]), axis=1, return_index=True)
    wanted &= np.isin(np.arange(len(query_ids)), first)
    rows = order[places[wanted]]
    # Pairs in the order of their rows, and within a row in their own.
    by_row = np.argsort(rows, kind="stable")
    rows, candidate_ids = rows[by_row], candidate_ids[wanted][by_row]
    counts = np.bincount(rows, minlength=len(queries))
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    result = np.full((len(queries), max(1, counts.max(initial=0))), NO_CANDIDATE, np.int32)
    result[rows, columns] = candidate_ids
    return result


def check_exclude_ids(exclude_ids: Any) -> list[int]:
    """Returns ids to be left out, sorted, each once.

    Args:
        exclude_ids: a flat collection of integers, such as a list, a set or an array.

    Raises:
        TypeError: if it is none.
        ValueError: if one lies outside int32.
    """
    if exclude_ids is None:
        return []
    if isinstance(exclude_ids, Iterable) and not isinstance(exclude_ids, str) and not hasattr(exclude_ids, "shape"):
        exclude_ids = list(exclude_ids)
    ids = check_candidate_ids(exclude_ids, name="exclude_ids")
    if ids.ndim != 1:
        raise TypeError(
            f"`exclude_ids` must be flat, such as [0]. Received: an array of shape {ids.shape}. Flatten it."
        )
    return [int(i) for i in np.unique(ids)]
