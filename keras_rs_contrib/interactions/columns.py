"""Columns of interactions as arrays: users as codes, times as numbers, and checks of what callers pass."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

Array = np.ndarray[Any, Any]


def column_of(frame: pd.DataFrame, name: Any, argument: str) -> pd.Series:
    """Returns a column of a DataFrame, or raises an error that says which columns there are."""
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"`frame` must be a pandas DataFrame. Received: {type(frame).__name__}. Pass what `read_interactions` "
            "returns, or `pandas.DataFrame(data)`."
        )
    if name not in frame.columns:
        raise ValueError(
            f"`{argument}` must name a column of the DataFrame. Received: {name!r}, and the columns "
            f"{list(frame.columns)}. {suggestion(name, frame.columns)}"
        )
    column = frame[name]
    if isinstance(column, pd.DataFrame):
        raise ValueError(
            f"`{argument}` must name one column. Received: {name!r}, which {column.shape[1]} columns have. Rename them."
        )
    return column


def suggestion(name: Any, names: Sequence[Any]) -> str:
    """Returns the fix for a column that is missing, with the names that are close to it."""
    texts = {str(each).casefold(): each for each in names}
    close = [texts[each] for each in difflib.get_close_matches(str(name).casefold(), texts, n=3)]
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else "Pass one of them."


def as_series(values: Any, name: str) -> pd.Series:
    """Returns a column in any form as a Series that is indexed from 0 on.

    Raises:
        ValueError: if it has more or fewer than one dimension, or if a value is missing.
    """
    if isinstance(values, (str, bytes)) or np.ndim(values) != 1:
        raise ValueError(
            f"`{name}` must have one dimension, with a value for each row. Received: shape {np.shape(values)}. "
            "Pass one column."
        )
    series = pd.Series(values).reset_index(drop=True)
    missing = series.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"`{name}` must have a value in each row. Received: {series[missing.argmax()]} in row "
            f"{missing.argmax()}, and {missing.sum()} such rows. Leave them out: `frame.dropna()`."
        )
    return series


def codes_of(values: Any, name: str) -> tuple[Array, Array]:
    """Returns for each value a number from 0 on, in the order of first rows, and the values that they stand for."""
    series = as_series(values, name)
    try:
        codes, uniques = pd.factorize(series)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must hold strings or integers. Received: {series.iloc[0]!r} in row 0 ({error}). "
            "Convert the column, for instance with `.astype(str)`."
        ) from error
    # Categories and strings of pandas become arrays of NumPy.
    return codes, np.asarray(uniques)


def times_of(values: Any, name: str) -> Array:
    """Returns times as integers or floats in the same order.

    Raises:
        TypeError: if they are neither numbers nor dates. Texts sort in another order: "10" comes before "9".
        ValueError: if a time is missing or not finite.
    """
    series = as_series(values, name)
    if pd.api.types.is_datetime64_any_dtype(series.dtype):
        if series.dt.tz is not None:
            series = series.dt.tz_convert("UTC").dt.tz_localize(None)
        dates: Array = series.to_numpy()
        return (dates if dates.dtype.kind == "M" else dates.astype("datetime64[ns]")).view("int64")
    if not len(series):
        return np.zeros(0, "int64")
    if not pd.api.types.is_numeric_dtype(series.dtype) or pd.api.types.is_bool_dtype(series.dtype):
        raise TypeError(
            f"`{name}` must hold numbers or dates. Received: dtype {series.dtype}, such as {series[0]!r}. Convert the "
            "column, for instance with `pandas.to_datetime`."
        )
    times: Array = series.to_numpy()
    if times.dtype.kind == "O":
        times = series.to_numpy("float64" if pd.api.types.is_float_dtype(series.dtype) else "int64")
    if times.dtype.kind == "f" and not np.isfinite(times).all():
        row = int(np.flatnonzero(~np.isfinite(times))[0])
        raise ValueError(f"`{name}` must be finite. Received: {times[row]} in row {row}. Leave such rows out.")
    return times


def check_lengths(**columns: Any) -> None:
    """Raises `ValueError` if columns have different numbers of rows."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in lengths)} must have a value for each row. Received: "
            f"{', '.join(map(str, lengths.values()))} values. Pass columns of one DataFrame."
        )


def check_same_rows(**columns: Any) -> None:
    """Raises `ValueError` if Series have the same index in another order: their values are taken by position."""
    series = {name: values for name, values in columns.items() if isinstance(values, pd.Series)}
    first = next(iter(series), "")
    for name, values in series.items():
        index, other = values.index, series[first].index
        if not index.equals(other) and index.sort_values().equals(other.sort_values()):
            raise ValueError(
                f"`{first}` and `{name}` must be columns of the same rows in the same order. Received: Series with "
                "an index in different orders. Take them from one DataFrame, or pass arrays."
            )


def check_share(value: Any, name: str) -> float:
    """Returns `value` as a float, or raises `ValueError` if it is not between 0 and 1."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < float(value) < 1:
        raise ValueError(
            f"`{name}` must be a number between 0 and 1, exclusive. Received: {name}={value!r}. Pass 0.2 for a fifth "
            "of the rows."
        )
    return float(value)
