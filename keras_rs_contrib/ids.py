"""Candidate ids: int32 labels of candidates. Ids that a conversion to int32 would change are errors."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import check_positional, known_values
from keras_rs_contrib.names import flat_names
from keras_rs_contrib.vocabulary import Vocabulary

# The id of "no candidate", in rows with fewer candidates than columns.
NO_CANDIDATE = -1
# The rank of a candidate that is not in a list: after the k best of any list, for any k.
NOT_IN_LIST = int(np.iinfo(np.int32).max)


def check_candidate_ids(candidate_ids: Any, name: str = "candidate_ids") -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns ids as int32, or raises an error if int32 cannot hold them.

    JAX silently wraps wider integers to int32: 2**32 + 5 would become the id 5.

    Args:
        candidate_ids: integers of any width, as a list, an array or a tensor.
        name: name of the ids in error messages.

    Returns:
        int32 array, shape of `candidate_ids`.

    Raises:
        TypeError: if the ids are not integers.
        ValueError: if an id is outside the range of int32.
    """
    try:
        ids = ops.convert_to_numpy(candidate_ids) if ops.is_tensor(candidate_ids) else np.asarray(candidate_ids)
    except ValueError as error:
        raise TypeError(
            f"`{name}` must be an array of integers. Received: {error} Pass rows of equal length."
        ) from error
    if ids.size == 0:
        return ids.astype(np.int32)
    # An object array of Python integers is valid. The values may be larger than any NumPy dtype can hold.
    integers = ids.dtype == object and all(
        isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in ids.flat
    )
    if not integers and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"`{name}` must be integers. Received: dtype {ids.dtype}, such as {ids.flat[0]!r}. "
            "Number the candidates and keep a table of their names, or use `keras.layers.StringLookup`."
        )
    limits = np.iinfo(np.int32)
    outside = ids[(ids < limits.min) | (ids > limits.max)]
    if outside.size:
        raise ValueError(
            f"`{name}` must be in [{limits.min}, {limits.max}], the range of int32. "
            f"Received: {int(outside[0])}. Number the candidates from 0 and keep a table of their ids."
        )
    return ids.astype(np.int32)


def to_int32(ids: Any, name: str) -> Any:
    """Returns ids as int32, and checks their values if they are known.

    Args:
        ids: integers, as a list, an array or a tensor, which may be symbolic.
        name: name of the ids in error messages.

    Returns:
        int32 ids, shape of `ids`. Symbolic, traced and int32 tensors stay tensors; other ids become a NumPy array.

    Raises:
        TypeError: if the ids are not integers.
        ValueError: if an id is outside the range of int32.
    """
    if not ops.is_tensor(ids) and not isinstance(ids, keras.KerasTensor):
        return check_candidate_ids(ids, name)
    dtype = keras.backend.standardize_dtype(ids.dtype)
    if "int" not in dtype:
        raise TypeError(f"`{name}` must be integers. Received: dtype {dtype}. Cast the ids, or number the candidates.")
    if dtype == "int32":
        return ids
    values = known_values(ids)
    return ops.cast(ids, "int32") if values is None else check_candidate_ids(values, name)


class IdArguments(keras.layers.Layer):  # type: ignore[misc]
    """A layer that checks the ids passed to `call` before Keras converts them to int32.

    Keras and JAX silently wrap wider integers: 2**32 + 5 would become the id 5. If `call` has keyword-only arguments,
    the error about too many arguments by position names them.

    Attributes:
        id_arguments: names of the arguments of `call` that contain ids.
    """

    id_arguments: tuple[str, ...] = ("candidate_ids", "exclude_ids")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with int32 ids."""
        check_positional(type(self).call, 1 + len(args))
        names = _argument_names(type(self).call)

        args = tuple(self.checked(name, value) for name, value in zip_longest(names[: len(args)], args))
        return super().__call__(*args, **{name: self.checked(name, value) for name, value in kwargs.items()})

    def checked(self, name: str | None, value: Any) -> Any:
        """Returns the value of an argument of `call`, as int32 if it holds ids."""
        return to_int32(value, name) if name in self.id_arguments and value is not None else value


def check_known_ids(candidate_ids: Any, num_candidates: int, owner: str, mask: Any = None) -> None:
    """Raises `ValueError` if ids have values, outside of compiled functions, and one is out of range.

    Args:
        candidate_ids: `[batch]` ints.
        num_candidates: the ids are in [0, `num_candidates`).
        owner: the name of the layer whose ids they are.
        mask: `[batch]` bool; False marks padding, which may have any id. `None` if there is no padding.
    """
    ids, present = known_values(candidate_ids), None if mask is None else known_values(mask)
    if ids is None or (mask is not None and present is None):
        return
    wrong = (ids < 0) | (ids >= num_candidates)
    rows = np.flatnonzero(wrong if present is None else wrong & present.astype(bool))
    if rows.size:
        raise ValueError(
            f"`candidate_ids` of {owner!r} must be in [0, {num_candidates - 1}]. Received: {ids[rows[0]]} in row "
            f"{rows[0]}. Leave such rows out, or create the layer for more candidates."
        )


@functools.cache
def _argument_names(call: Callable[..., Any]) -> list[str]:
    """Returns the names of the arguments of a layer's `call`, in order."""
    return list(inspect.signature(call).parameters)[1:]


def check_corpus_ids(
    candidate_ids: Any, num_candidates: int, exclude_ids: list[int]
) -> np.ndarray[Any, np.dtype[np.int32]] | None:
    """Returns the ids of a corpus as int32, and checks that each candidate has its own id.

    Args:
        candidate_ids: `[num_candidates]` integers, or `None` if the row numbers are the ids.
        num_candidates: number of candidates in the corpus.
        exclude_ids: ids of candidates to exclude.

    Returns:
        `[num_candidates]` int32, or `None`.

    Raises:
        TypeError: if the ids are not integers.
        ValueError: if `candidate_ids` has the wrong shape, duplicates, ids outside the range of int32, or -1, the id
            of "no candidate"; or if an id in `exclude_ids` is unknown.
    """
    ids = np.arange(num_candidates, dtype=np.int32) if candidate_ids is None else check_candidate_ids(candidate_ids)
    if ids.shape != (num_candidates,):
        raise ValueError(
            "`candidate_ids` must have one id for each candidate. Received: "
            f"shape {ids.shape} for {num_candidates} candidates. Pass a flat list of {num_candidates} ids."
        )
    unique, counts = np.unique(ids, return_counts=True)
    if unique.size < ids.size:
        raise ValueError(
            "`candidate_ids` must be unique. Received: "
            f"{int(unique[counts > 1][0])} for {int(counts[counts > 1][0])} candidates. Remove the duplicates."
        )
    if NO_CANDIDATE in unique:
        raise ValueError(
            f"`candidate_ids` must not contain {NO_CANDIDATE}, which means no candidate. "
            f"Received: {NO_CANDIDATE} for one of {num_candidates} candidates. Give this candidate another id."
        )
    unknown = np.setdiff1d(exclude_ids, unique)
    if unknown.size:
        raise ValueError(
            "`exclude_ids` must be ids of candidates. Received: "
            f"{int(unknown[0])} for {num_candidates} candidates with ids {int(ids.min())} to {int(ids.max())}. "
            "Remove the unknown id."
        )
    return None if candidate_ids is None else ids


def group_candidate_ids(query_ids: Any, candidate_ids: Any, queries: Any) -> np.ndarray[Any, Any]:
    """Groups pairs of a query and a candidate into one row of candidate ids for each query.

    Use it to create the `exclude_ids` of an index from past interactions, or the positives of each user for an
    evaluation from held-out interactions.

    Args:
        query_ids: `[num_pairs]` ints or names, such as the user of each rating.
        candidate_ids: `[num_pairs]` ints or names, such as the film of each rating.
        queries: `[num_queries]` unique ints or names, the queries to return. Pairs of other queries are ignored.

    Returns:
        `[num_queries, m]` int32, where m is the largest number of candidates of a query, and at least 1. Rows are
        padded with -1. Each row contains a candidate once, in the order of the first pairs. For candidates that are
        strings, or integers outside the range of int32, an object array padded with `None`.

    Raises:
        TypeError: if the ids are neither integers nor strings.
        ValueError: if an argument is not flat, if `query_ids` and `candidate_ids` differ in length, or if `queries` has
            duplicates.

    Example:
    ```python
    seen = group_candidate_ids([7, 8, 7], [100, 200, 300], queries=[8, 7])  # [[200, -1], [100, 300]]
    ```
    """
    if _are_names(queries) or _are_names(query_ids):
        names, shape = flat_names(queries)
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ValueError(f"`queries` must be unique. Received: {twice!r} twice. Remove the duplicates.")
        # Without queries, all pairs are of other ones.
        rows = Vocabulary(names) if names else _vocabulary_of(query_ids)
        return group_candidate_ids(rows.encode(query_ids), candidate_ids, np.arange(1, len(names) + 1).reshape(shape))
    if _are_names(candidate_ids):
        rows = _vocabulary_of(candidate_ids)
        return rows.decode(group_candidate_ids(query_ids, rows.encode(candidate_ids), queries))
    query_ids = check_candidate_ids(query_ids, "query_ids")
    candidate_ids = check_candidate_ids(candidate_ids)
    queries = check_candidate_ids(queries, "queries")
    if query_ids.ndim != 1 or query_ids.shape != candidate_ids.shape or queries.ndim != 1:
        raise ValueError(
            "`query_ids` and `candidate_ids` must be flat and of equal length, and `queries` flat. Received: shapes "
            f"{query_ids.shape}, {candidate_ids.shape} and {queries.shape}. Pass one entry for each pair."
        )
    order = np.argsort(queries)
    in_order = queries[order]
    if (in_order[1:] == in_order[:-1]).any():
        twice = in_order[1:][in_order[1:] == in_order[:-1]][0]
        raise ValueError(f"`queries` must be unique. Received: {twice} twice. Remove the duplicates.")
    places = _places(query_ids, in_order)
    wanted = np.flatnonzero(places >= 0)
    candidate_ids = candidate_ids[wanted]
    # NumPy sorts integers of 64 bits several times as fast as it sorts by two keys, or as a stable sort.
    pairs = order[places[wanted]] << 32 | candidate_ids.view(np.uint32)
    by_pair = np.argsort(pairs)
    pairs = pairs[by_pair]
    starts = np.flatnonzero(np.diff(pairs, prepend=-1))
    # The first of equal pairs.
    positions = np.minimum.reduceat(by_pair, starts) if len(starts) else by_pair
    in_rows = np.sort(pairs[starts] >> 32 << 32 | positions)
    query_rows, candidate_ids = in_rows >> 32, candidate_ids[in_rows & 0xFFFFFFFF]
    counts = np.bincount(query_rows, minlength=len(queries))
    columns = np.arange(len(query_rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    result = np.full((len(queries), max(1, int(counts.max(initial=0)))), NO_CANDIDATE, np.int32)
    result[query_rows, columns] = candidate_ids
    return result


def _vocabulary_of(names: Any) -> Vocabulary:
    """Returns the vocabulary of names, or, if there are none, one of another name."""
    names, _ = flat_names(names)
    return Vocabulary.from_data(names or ["no name"])


def _places(ids: np.ndarray[Any, Any], in_order: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns the int64 place of each id among sorted, unique ids, and -1 for an id that is not among them."""
    if not len(in_order):
        return np.full(ids.shape, -1)
    first, last = int(in_order[0]), int(in_order[-1])
    if last - first < 2 * (ids.size + in_order.size):
        # A table of all ids in between is much faster than a search.
        table = np.full(last - first + 1, -1)
        table[in_order.astype(np.int64) - first] = np.arange(len(in_order))
        offsets = ids.astype(np.int64) - first
        return np.where((offsets >= 0) & (offsets < len(table)), table[np.clip(offsets, 0, len(table) - 1)], -1)
    places = np.minimum(np.searchsorted(in_order, ids), len(in_order) - 1)
    return np.where(in_order[places] == ids, places, -1)


def _are_names(ids: Any) -> bool:
    """Returns whether ids are strings, or integers that int32 cannot hold."""
    limits = np.iinfo(np.int32)
    dtype = getattr(ids, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind != "O":
        ids = np.asarray(ids)
        if dtype.kind not in "iu" or not ids.size:
            return dtype.kind in "US"
        return not limits.min <= int(ids.min()) <= int(ids.max()) <= limits.max
    if ops.is_tensor(ids):
        return False
    flat, _ = flat_names(ids)
    kinds = set(map(type, flat))
    return kinds == {str} or (kinds == {int} and any(not limits.min <= each <= limits.max for each in flat))


def check_exclude_ids(exclude_ids: Any) -> list[int]:
    """Returns the sorted, unique ids to exclude.

    Args:
        exclude_ids: flat collection of integers, such as a list, a set or an array; or `None`.

    Raises:
        TypeError: if `exclude_ids` is not a flat collection of integers.
        ValueError: if an id is outside the range of int32.
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
