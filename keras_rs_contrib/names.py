"""Columns of names, which are strings or integers, as lists and arrays of Python's strings and integers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

# The row of no name, in rows with fewer names than columns.
NO_ROW = -1


def flat_names(values: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Returns a column of names as a list of strings, integers or what else it holds, and its shape."""
    if isinstance(values, (str, bytes, int)):
        return [as_name(values)], ()
    if isinstance(values, np.ndarray):
        array = values
    elif hasattr(values, "to_numpy"):
        # A Series has one dtype for its index and values; its missing values become None.
        array = values.to_numpy(dtype=object) if not isinstance(values.dtype, np.dtype) else values.to_numpy()
    elif hasattr(values, "numpy") or hasattr(values, "__array__"):
        array = np.asarray(values)
    elif isinstance(values, Iterable):
        rows = list(values)
        if all(isinstance(row, (str, int)) for row in rows):
            return rows, (len(rows),)
        array = _as_array_of_objects(rows)
    else:
        return [values], ()
    flat = array.ravel().tolist()
    if not set(map(type, flat)) <= {str, int}:
        flat = [as_name(value) for value in flat]
    return flat, array.shape


def as_arrow(values: Any) -> Any:
    """Returns a Series of Arrow's strings as Arrow has it, without missing values, or `None` for other columns."""
    if "str" not in str(getattr(values, "dtype", "")) or not hasattr(getattr(values, "array", None), "__arrow_array__"):
        return None
    try:
        import pyarrow
    except ModuleNotFoundError:
        return None
    column = pyarrow.array(values.array)
    return None if column.null_count else column


def padded_names(values: Any) -> np.ndarray[Any, Any]:
    """Returns names as an array of objects, and rows of different lengths padded on the left with `None`."""
    if hasattr(values, "columns"):
        values = values.to_numpy()
    for convert in ("to_list", "tolist", "numpy"):
        # A ragged tensor and a Series; an array; a tensor.
        if hasattr(values, convert):
            values = getattr(values, convert)()
            break
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        values = [values]
    rows = [_one_row(row) for row in values]
    if any(row is not None for row in rows):
        # A missing list is empty.
        rows = [[] if is_missing_name(value) else row for value, row in zip(values, rows, strict=True)]
    if all(row is None for row in rows):
        return np.array([*map(as_name, values), None], object)[:-1]
    width = max(len(row) for row in rows if row is not None)
    padded = [[None] * (width - len(row)) + row for row in rows if row is not None]
    if len(padded) < len(rows):
        # The error names what is mixed.
        return _as_array_of_objects(list(values))
    array = np.empty((len(rows), width), object)
    array[:] = padded
    return array


def _one_row(value: Any) -> list[Any] | None:
    """Returns a row of names as a list, or `None` for a single name."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return None
    return [as_name(each) for each in value]


def are_padding(names: np.ndarray[Any, Any], are_strings: bool) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Returns which elements of an array stand for no name: `None`, NaN, and `""` among strings, or -1 among integers.

    Args:
        names: an array of names.
        are_strings: whether the names of the vocabulary are strings.
    """
    if names.dtype.kind in "iu":
        return np.asarray(names == NO_ROW)
    nothing = "" if are_strings else NO_ROW

    def is_padding(name: Any) -> bool:
        return is_missing_name(name) or (type(name) is type(nothing) and name == nothing)

    return np.array([is_padding(name) for name in names.ravel().tolist()], bool).reshape(names.shape)


def _as_array_of_objects(rows: list[Any]) -> np.ndarray[Any, Any]:
    """Returns rows, which are names or lists of equal length, as an object array."""
    lengths = {len(row) if isinstance(row, (list, tuple, np.ndarray)) else None for row in rows}
    if len(lengths) > 1:
        raise ValueError(
            "Names must form an array. Received: rows of different lengths, or lists beside names. "
            "Pass one flat list, or pad the rows with a name of their own."
        )
    return np.array(rows, object)


def as_name(value: Any) -> Any:
    """Returns a string or an integer as Python has it, and other values unchanged."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, (bool, np.bool_)):
        return value
    if isinstance(value, str):
        return str(value)
    try:
        return operator.index(value)
    except TypeError:
        return value


def is_missing_name(name: Any) -> bool:
    """Returns whether a value stands for a missing one: `None`, NaN, and those of pandas."""
    return name is None or type(name).__name__ in ("NAType", "NaTType") or (isinstance(name, float) and name != name)


def check_names(names: list[Any]) -> None:
    """Raises an error if values are not all strings, or all integers, or if one is empty or missing."""
    kinds = set(map(type, names))
    if kinds == {str} and "" in names:
        raise ValueError(
            f"A name must not be empty. Received: '' in row {names.index('')}. Fill it in, or leave the row out."
        )
    if kinds <= {str} or kinds <= {int}:
        return
    first = next((kind for kind in map(type, names) if kind in (str, int)), None)
    row, wrong = next((row, name) for row, name in enumerate(names) if type(name) is not first)
    if is_missing_name(wrong):
        raise ValueError(
            f"A name must not be missing. Received: {wrong!r} in row {row}. Fill it in, or leave the row out."
        )
    others = "" if first is None else f" beside names of type {first.__name__}"
    raise TypeError(
        "Names must be all strings or all integers. Received: "
        f"{wrong!r} in row {row}{others}. Convert them, for instance with `.astype(str)`."
    )


def check_different(names: list[Any]) -> None:
    """Raises an error if values are not different names."""
    check_names(names)
    if not names:
        raise ValueError(
            "A vocabulary must have a name. Received: none. Pass names, or a smaller `min_count` to `from_data`."
        )
    if isinstance(names[0], int) and NO_ROW in set(names):
        raise ValueError(
            f"A name must not be {NO_ROW}, which stands for no name in rows of ids. Received: it among {len(names)} "
            "names. Give it another number."
        )
    if len(set(names)) < len(names):
        name, count = Counter(names).most_common(1)[0]
        raise ValueError(
            f"Each name must occur once. Received: {name!r} {count} times. Use `Vocabulary.from_data` for a column "
            "of a data set."
        )
