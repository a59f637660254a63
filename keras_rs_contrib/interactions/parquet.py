"""Columns of a Parquet file, in the types that text files have too."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd


def open_parquet(data: bytes) -> Any:
    """Returns the open file, of `pyarrow.parquet`."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ImportError(
            "A Parquet file needs pyarrow. Received: no module 'pyarrow'. Install it: "
            'pip install "keras_rs_contrib[data]".'
        ) from error
    return pyarrow.parquet.ParquetFile(io.BytesIO(data))


def read_columns(file: Any, names: dict[str, str]) -> pd.DataFrame:
    """Returns columns of an open file.

    Args:
        file: what `open_parquet` returns.
        names: the names of the columns, each with its use: `"user"`, `"item"`, `"time"`, `"rating"` or `"other"`.

    Returns:
        Columns of strings, integers with or without missing values, floats, bools or dates.

    Raises:
        ValueError: if a column has another type, or one that does not suit its use.
    """
    import pyarrow as pa

    table = file.read(columns=list(names), use_pandas_metadata=False)
    columns = {}
    for name, use in names.items():
        column = table.column(name)
        given = column.type
        if pa.types.is_dictionary(given):
            column = column.cast(given.value_type)
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            try:
                column = column.cast(pa.string())
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"A column of bytes must be UTF-8. Received: {name!r} ({error}). Decode it first, and write it "
                    "as strings."
                ) from error
        elif pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("ms"))
        elif pa.types.is_decimal(column.type):
            column = column.cast(pa.float64())
        series = column.to_pandas(types_mapper=_nullable_integers().get)
        if use in ("user", "item") and pd.api.types.is_float_dtype(series.dtype):
            series = _whole(series, name)
        kind = series.dtype
        is_string = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        is_id = is_string or pd.api.types.is_integer_dtype(kind)
        is_date = pd.api.types.is_datetime64_any_dtype(kind)
        is_number = pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind)
        fits = {
            "user": is_id,
            "item": is_id,
            "rating": is_number or is_string,
            "time": is_number or is_string or is_date,
            "other": True,
        }
        if not fits[use]:
            raise ValueError(
                f"A column must suit its use. Received: the {use} column {name!r} of type {given}. Convert it to "
                f"{'strings or integers' if use in ('user', 'item') else 'numbers'} first."
            )
        columns[name] = series
    return pd.DataFrame(columns)


def _nullable_integers() -> dict[Any, Any]:
    import pyarrow as pa

    # Missing integers would become floats.
    names = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    return {getattr(pa, name)(): pd.Int64Dtype() if name != "uint64" else pd.UInt64Dtype() for name in names}


def _whole(series: pd.Series, name: str) -> pd.Series:
    """Returns floats, which pandas writes for integers with missing values, as integers."""
    if (series.dropna() % 1 != 0).any() or (series.abs() > 2**53).any():
        wrong = series[(series % 1 != 0) & series.notna() | (series.abs() > 2**53)].iloc[0]
        raise ValueError(
            f"Ids must be strings or integers. Received: {wrong} in the column {name!r}. Convert it to strings first."
        )
    return series.astype("Int64")
