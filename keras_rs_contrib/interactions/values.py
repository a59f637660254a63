"""Values of a column of a file: ids, times and ratings, and which of them are invalid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from keras_rs_contrib.interactions.columns import Array

_INTEGER = r"(?:0|-?[1-9][0-9]{0,18})"
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_DATE_WITH_ZONE = r"[0-9-]+[ T][0-9:.,]+ ?(?:[zZ]|[+-][0-9]{2}(?::?[0-9]{2})?)"


def is_text(series: pd.Series) -> bool:
    """Returns whether a column holds strings."""
    return bool(pd.api.types.is_string_dtype(series.dtype) or pd.api.types.is_object_dtype(series.dtype))


class Ids:
    """A column of users or items.

    Args:
        series: strings, or integers with or without missing values.
        missing_values: strings that stand for a missing value, beside the empty one.

    Attributes:
        is_missing: `[num_rows]` bool.
    """

    def __init__(self, series: pd.Series, missing_values: list[str]) -> None:
        self.is_missing = series.isna().to_numpy(bool)
        self._is_text = is_text(series)
        if self._is_text:
            self._values = series.str.strip()
            self.is_missing = self.is_missing | self._values.isin(["", *missing_values]).to_numpy(bool)
        else:
            self._values = series.fillna(0) if self.is_missing.any() else series

    def begins_with_text(self) -> bool:
        """Returns whether the first row is not an integer."""
        return self._is_text and not _are_integers(self._values[:1])

    def begins_with_a_name(self) -> bool:
        """Returns whether the first row alone is not an integer, as where it is a header."""
        return self.begins_with_text() and len(self._values) > 1 and _are_integers(self._values[1:])

    def select(self, rows: Array, *, parse: bool) -> pd.Series:
        """Returns the ids of valid rows, as integers or strings.

        Args:
            rows: `[num_rows]` bool, False for missing ids.
            parse: whether strings become integers if all of them are written as Python writes integers of 64 bits.
        """
        kept = self._values if rows.all() else self._values[rows].reset_index(drop=True)
        if not self._is_text:
            integers = kept.to_numpy(str(kept.dtype).lower())
            fits = integers.dtype != "uint64" or integers.max(initial=0) <= np.iinfo("int64").max
            return pd.Series(integers.astype("int64") if fits else integers)
        # The first row saves the other checks for most columns of strings.
        if parse and _are_integers(kept[:1]):
            codes, uniques = pd.factorize(kept)
            if _are_integers(pd.Series(uniques)):
                integers = np.array([int(text) for text in uniques], object)
                if np.abs(integers).max(initial=0) <= np.iinfo("int64").max:
                    return pd.Series(integers.astype("int64")[codes])
        return kept


def _are_integers(text: pd.Series) -> bool:
    return bool(text.str.fullmatch(_INTEGER).all())


def ratings(series: pd.Series) -> tuple[pd.Series, Array]:
    """Returns ratings as float64, and which of them are not finite numbers."""
    if is_text(series) or pd.api.types.is_bool_dtype(series.dtype):
        # Without this, True would be 1.
        series = pd.to_numeric(series.astype(str).str.strip(), errors="coerce")
    values = series.astype("float64" if not series.hasnans else "Float64").to_numpy("float64", na_value=np.nan)
    return pd.Series(values), ~np.isfinite(values)


def times(series: pd.Series, time_format: str | None) -> tuple[pd.Series, Array]:
    """Returns times, and which of them are invalid.

    Times are numbers, dates without a time zone, or dates with one. Those of the most frequent kind are valid.

    Args:
        series: numbers, dates or strings.
        time_format: format of strings, as in `datetime.strptime`, or `None` for numbers and ISO 8601.

    Returns:
        `[num_rows]` int64, float64, datetime64, or datetime64 in UTC; and `[num_rows]` bool.
    """
    if pd.api.types.is_datetime64_any_dtype(series.dtype):
        is_wrong = series.isna().to_numpy()
        return (series if series.dt.tz is None else series.dt.tz_convert("UTC")), is_wrong
    if pd.api.types.is_bool_dtype(series.dtype):
        return series, np.ones(len(series), bool)
    if pd.api.types.is_numeric_dtype(series.dtype):
        return _numbers(series)
    text = series.astype(str).str.strip()
    if time_format is None:
        has_zone = text.str.fullmatch(_DATE_WITH_ZONE).to_numpy(bool)
        # For texts that are not numbers, `to_numeric` is slow.
        is_number = text.str.fullmatch(_NUMBER).to_numpy(bool)
        numeric = pd.Series(np.nan, series.index)
        if is_number.any():
            numeric = text.where(is_number, "nan").astype("float64")
        dates = pd.to_datetime(text.where(~is_number), format="ISO8601", errors="coerce", utc=True)
    else:
        numeric = pd.Series(np.nan, series.index)
        dates = pd.to_datetime(text, format=time_format, errors="coerce", utc=True)
        has_zone = np.full(len(text), "%z" in time_format or "%Z" in time_format)
    kinds = [np.isfinite(numeric.to_numpy()), dates.notna().to_numpy() & ~has_zone, dates.notna().to_numpy() & has_zone]
    most_frequent = int(np.argmax([kind.sum() for kind in kinds]))
    is_wrong = ~kinds[most_frequent]
    if most_frequent == 0:
        if (numeric[~is_wrong].abs() < 2**63).all():
            # Parsed again, because floats do not hold all integers.
            numeric = pd.to_numeric(text.where(~is_wrong, "0"))
        return numeric, is_wrong
    return (dates if most_frequent == 2 else dates.dt.tz_localize(None)), is_wrong


def _numbers(series: pd.Series) -> tuple[pd.Series, Array]:
    is_missing = series.isna().to_numpy()
    values: Any = series.fillna(0).to_numpy() if is_missing.any() else series.to_numpy()
    return pd.Series(values), is_missing | ~np.isfinite(values)
