"""Columns of data as arrays: of DataFrames, Series, lists, NumPy and other arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from keras_rs_contrib.names import is_missing_name


def is_frame(data: Any) -> bool:
    """Returns whether data is a DataFrame of pandas, or of a library with the same interface."""
    return hasattr(data, "columns") and hasattr(data, "to_numpy")


def is_series(data: Any) -> bool:
    """Returns whether data is a Series of pandas, or of a library with the same interface."""
    return hasattr(data, "to_numpy") and not is_frame(data)


def as_dict(x: Any) -> Any:
    """Returns a DataFrame as a dict of its columns, and other data unchanged."""
    return {name: x[name] for name in x.columns} if is_frame(x) else x


def names_in(names: str | list[str]) -> list[str]:
    """Returns names as a list."""
    return [names] if isinstance(names, str) else names


def select(features: dict[str, Any], names: str | list[str]) -> Any:
    """Returns the input of a tower: its one feature, or a dict of those in a list."""
    return features[names] if isinstance(names, str) else {name: features[name] for name in names}


def rank(values: Any) -> int:
    """Returns the number of dimensions of an array, a column of lists, nested lists, or a single value."""
    shape = getattr(values, "shape", None)
    if isinstance(values, (str, bytes)) or np.isscalar(values) or not hasattr(values, "__len__"):
        return len(shape or ())
    dtype = getattr(values, "dtype", None)
    if shape is not None and (len(shape) != 1 or (isinstance(dtype, np.dtype) and dtype.kind != "O")):
        return len(shape)
    first = next((value for value in values if not is_missing_name(value)), None)
    return 1 if first is None else 1 + rank(first)


def arrays_of(features: dict[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    """Returns the features that a model needs as arrays, and others only if they are arrays of numbers already.

    Args:
        features: columns by name.
        needed: names of the features that the model uses.

    Raises:
        ValueError: if a feature that is needed does not hold numbers.
    """
    result = {}
    for name, values in features.items():
        if name in needed:
            result[name] = as_array(values, f"The feature {name!r}")
        elif _is_array_of_numbers(values):
            result[name] = values
    return result


def as_array(values: Any, name: str) -> Any:
    """Returns a column as an array of numbers.

    Args:
        values: a column, in any form.
        name: what it is, for errors.

    Raises:
        ValueError: if it is a single value, is ragged, lacks values, or holds something else than numbers.
    """
    if _is_array_of_numbers(values):
        return values
    if isinstance(values, (list, tuple, range)):
        values = _stacked(values, name)
    if is_frame(values):
        values = values[values.columns[0]] if len(values.columns) == 1 else values.to_numpy()
    own_dtype = getattr(values, "dtype", None)
    if hasattr(values, "to_numpy"):
        if hasattr(values, "isna") and bool(np.asarray(values.isna()).any()):
            raise ValueError(
                f"{name} must have a value in each row. Received: a missing value in row "
                f"{int(np.flatnonzero(np.asarray(values.isna()))[0])}. Fill in missing values, or leave such rows out."
            )
        values = values.to_numpy()
    if getattr(values, "shape", None) == () or np.isscalar(values):
        raise ValueError(
            f"{name} must have a row for each example. Received: the single value {values!r}. "
            "Batch the dataset first: `dataset.batch(batch_size)`; or pass an array, such as "
            f"`np.full(num_rows, {values!r})`."
        )
    if isinstance(values, np.ndarray) and values.dtype.kind == "O":
        # Such as a column of lists, or of Python integers.
        values = _stacked(list(values), name)
    # A tensor of strings is left here.
    values = np.asarray(values)
    if not _is_number(values.dtype) or (own_dtype is not None and str(own_dtype) == "category"):
        raise ValueError(
            f"{name} must hold numbers, which JAX can compute with. Received: dtype "
            f"{values.dtype if own_dtype is None else own_dtype}. {_fix(own_dtype, values.dtype)}"
        )
    return values


def _is_array_of_numbers(values: Any) -> bool:
    dtype = getattr(values, "dtype", None)
    if hasattr(values, "to_numpy") or not getattr(values, "shape", None):
        return False
    # Other libraries have their own dtypes.
    return _is_number(dtype) if isinstance(dtype, np.dtype) else "string" not in str(dtype)


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iufb" or bool(jnp.issubdtype(dtype, jnp.floating))


def _stacked(rows: Iterable[Any], name: str) -> np.ndarray[Any, Any]:
    """Returns rows as one array."""
    try:
        return np.asarray(rows if isinstance(rows, (list, tuple)) else list(rows))
    except ValueError as error:
        raise ValueError(
            f"{name} must have rows of equal length. Received: {error} Pad short rows with an id of their own."
        ) from error


def _fix(own_dtype: Any, dtype: np.dtype[Any]) -> str:
    if dtype.kind in "mM":
        return "Convert it first, for instance with `.astype('int64') // 10**9` to seconds."
    if str(own_dtype) == "category":
        return "Pass its codes: `.cat.codes`."
    return "Map it in the input pipeline, for instance with `keras.layers.StringLookup`."
