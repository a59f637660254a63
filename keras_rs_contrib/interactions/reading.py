"""`read_interactions`: a file of interactions as a DataFrame."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from keras_rs_contrib.interactions import files, header, parquet, records, values
from keras_rs_contrib.interactions.columns import Array
from keras_rs_contrib.interactions.faults import Faults
from keras_rs_contrib.interactions.header import Header

MISSING_VALUES = ("NA", "N/A", "NaN", "nan", "NULL", "null", "None", "<NA>", "\\N")


def read_interactions(
    path: str | os.PathLike[str],
    *,
    user_column: str,
    item_column: str,
    time_column: str | None = None,
    rating_column: str | None = None,
    other_columns: Sequence[str] = (),
    column_names: Sequence[str] | None = None,
    sep: str | None = None,
    quote_char: str | None = '"',
    encoding: str = "utf-8",
    time_format: str | None = None,
    missing_values: Sequence[str] = MISSING_VALUES,
) -> pd.DataFrame:
    r"""Returns the interactions in a file: text with separated fields, such as CSV, or Parquet.

    Text may be compressed (gzip, bzip2, xz, zip, Zstandard), whatever the name of the file. A header is needed unless
    `column_names` are given. In RecBole's atomic files, the column `user_id:token` is also found as `user_id`.

    - Users and items are strings without spaces around them. If all of them are written as Python writes integers of 64
      bits, they are integers: "7" is, and "007" and "1.0" are not. Parquet keeps its own strings and integers.
    - Times are numbers in any unit, or dates (ISO 8601, or `time_format`). Dates with a time zone are converted to UTC.
      A column has one kind of times: numbers, dates without a zone, or dates with one. Others are invalid.
    - Ratings are finite numbers.

    Invalid rows are skipped: with too few or too many fields, a quoted field without end, undecodable text, a missing
    user or item, an invalid or missing time or rating. If there are any, a `UserWarning` says how many and where, and
    `frame.attrs["skipped_rows"]` has, for each kind, `{"count": ..., "lines": [...]}` with the first 5 line numbers
    (in Parquet, row numbers from 1). Equal rows are all kept, because people do the same thing again:
    `frame.drop_duplicates()` removes them.

    Args:
        path: file.
        user_column: the name of the column of users.
        item_column: the name of the column of items.
        time_column: the name of the column of times, or `None`.
        rating_column: the name of the column of ratings, or `None`.
        other_columns: names of more columns, which pandas reads as numbers or strings, with missing values.
        column_names: the names of all columns of a text without a header. A first line of the same names is skipped.
        sep: what separates fields: one character, or more than one, such as "::". `None` for a tab, "::", "|", "," or
            ";", whichever finds the columns.
        quote_char: the character that encloses fields with separators, or `None` if it has no meaning in the file, as
            with a `sep` of several characters.
        encoding: encoding of text. A byte order mark overrides it.
        time_format: format of times that are neither numbers nor ISO 8601, as in `datetime.strptime`.
        missing_values: strings that stand for a missing user or item, as the empty string always does.

    Returns:
        A DataFrame with the columns that are named, as they are named, in the order of these arguments. Users and items
        are int64 or strings, times int64, float64, datetime64 or datetime64 in UTC, ratings float64.

    Raises:
        OSError: if the file cannot be read.
        ImportError: if a Parquet or Zstandard file needs pyarrow, which is missing.
        ValueError: if the file is empty, damaged, or has no such column, or if most of its rows are invalid.
    """
    uses = _uses(user_column, item_column, time_column, rating_column, other_columns)
    _check_layout(sep, quote_char, column_names)
    data = files.read_bytes(path)
    if data.startswith(files.PARQUET):
        if sep is not None or column_names is not None:
            raise ValueError(
                "`sep` and `column_names` are for text. Received: a Parquet file. Leave them out: it has names itself."
            )
        faults = Faults(str(path), "row")
        file = parquet.open_parquet(data)
        header.positions(file.schema_arrow.names, list(uses))
        table = parquet.read_columns(file, uses)
        line_numbers, num_rows = np.arange(1, len(table) + 1), len(table)
    else:
        faults = Faults(str(path))
        text = files.as_utf8(data, encoding)
        if not text or text.isspace():
            raise ValueError(f"A file must have rows. Received: {str(path)!r}, which is empty. Check the path.")
        quote = quote_char or ""
        layout = header.read_header(text, list(uses), column_names, sep, quote)
        table, line_numbers, num_rows = _read_text(text, layout, uses, quote, time_format, missing_values, faults)
    has_no_header = column_names is not None
    frame = _valid_rows(table, uses, line_numbers, faults, time_format, list(missing_values), has_no_header)
    if 2 * faults.num_rows > num_rows or not len(frame):
        what = faults.text(num_rows) if faults.num_rows else f"{str(path)!r}, which has a header and no rows."
        raise ValueError(f"Most rows of a file must be valid. Received: {what}\nCorrect the file or the arguments.")
    frame.attrs["skipped_rows"] = faults.summary()
    if faults.num_rows:
        warnings.warn(f"Invalid rows were skipped. {faults.text(num_rows)}", UserWarning, stacklevel=2)
    return frame


def _uses(
    user_column: str,
    item_column: str,
    time_column: str | None,
    rating_column: str | None,
    other_columns: Sequence[str],
) -> dict[str, str]:
    """Returns the use of each column by its name."""
    if isinstance(other_columns, str):
        raise TypeError(
            f"`other_columns` must be a list of names. Received: {other_columns!r}. Pass [{other_columns!r}]."
        )
    named = [(user_column, "user"), (item_column, "item"), (time_column, "time"), (rating_column, "rating")]
    named = [(name, use) for name, use in named if name is not None or use in ("user", "item")]
    named += [(name, "other") for name in other_columns]
    for name, use in named:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"A column must be named by a string. Received: {name!r} for the {use} column. Pass its name."
            )
    if len(dict(named)) < len(named):
        raise ValueError(
            f"Each column has one use. Received: {[name for name, _ in named]}. Name a column for one argument only."
        )
    return {str(name): use for name, use in named}


def _check_layout(sep: str | None, quote_char: str | None, column_names: Sequence[str] | None) -> None:
    if sep is not None and (not isinstance(sep, str) or not sep or "\n" in sep or not sep.isascii()):
        raise ValueError(f"`sep` must be one or more ASCII characters. Received: sep={sep!r}. Pass ',', for instance.")
    if quote_char is not None and (
        not isinstance(quote_char, str) or len(quote_char) != 1 or not quote_char.isascii() or quote_char in (sep, "\n")
    ):
        raise ValueError(
            f"`quote_char` must be one ASCII character other than `sep`. Received: quote_char={quote_char!r} and "
            f"sep={sep!r}. Pass '\"', or None for a file without quotes."
        )
    if column_names is None:
        return
    names = [] if isinstance(column_names, str) else list(column_names)
    if len(set(names)) < max(len(names), 2) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"`column_names` must be different strings, one for each column of the file. Received: {column_names!r}. "
            "Name also the columns that are not read."
        )


def _read_text(
    text: bytes,
    layout: Header,
    uses: dict[str, str],
    quote: str,
    time_format: str | None,
    missing_values: Sequence[str],
    faults: Faults,
) -> tuple[pd.DataFrame, Array, int]:
    """Returns the columns of well-formed rows, their line numbers, and the number of all rows."""
    sep, body = layout.sep.encode(), text[layout.num_bytes :]
    if len(sep) > 1:
        # The parser of pandas is fast for single bytes only.
        unused = next(byte for byte in map(bytes, zip(range(1, 32), strict=True)) if byte not in body)
        sep, body, quote = unused, body.replace(sep, unused), ""
    names = list(uses)
    places = header.positions(layout.names, names)
    first_line = layout.num_lines + 1
    rows = records.split_records(body, sep, len(layout.names), quote.encode(), first_line, faults)
    others = [place for place, name in zip(places, names, strict=True) if uses[name] == "other"]

    def parse(places: list[int], **options: Any) -> pd.DataFrame:
        return pd.read_csv(
            io.BytesIO(rows.text),
            engine="c",
            sep=sep.decode(),
            header=None,
            names=list(range(len(layout.names))),
            usecols=places,
            index_col=False,
            lineterminator="\n",
            skip_blank_lines=False,
            keep_default_na=False,
            low_memory=False,
            quoting=csv.QUOTE_MINIMAL if quote and quote.encode() in rows.text else csv.QUOTE_NONE,
            quotechar=quote or '"',
            **options,
        )

    if not len(rows.line_numbers):
        return pd.DataFrame({name: pd.Series([], dtype=str) for name in names}), rows.line_numbers, rows.num_rows
    texts = [place for place, name in zip(places, names, strict=True) if uses[name] == "time" and time_format]
    table = parse(
        places,
        dtype=dict.fromkeys(texts, str),
        na_filter=bool(others),
        na_values={place: ["", *missing_values] for place in others},
    )
    ids = [place for place, name in zip(places, names, strict=True) if uses[name] in ("user", "item")]
    changed = [place for place in ids if not _is_verbatim(table[place], rows, place, quote)]
    if changed:
        table[changed] = parse(changed, dtype=str, na_filter=False)
    assert len(table) == len(rows.line_numbers)
    return table[places].set_axis(names, axis=1), rows.line_numbers, rows.num_rows


def _is_verbatim(ids: pd.Series, rows: records.Records, place: int, quote: str) -> bool:
    """Returns whether ids are strings, or integers that take as many characters as in the file."""
    if ids.dtype != "int64":
        # A column of objects may hold integers of more than 64 bits.
        return bool(values.is_text(ids) and pd.api.types.infer_dtype(ids, skipna=False) == "string")
    integers = ids.to_numpy()
    # A number that has no positive counterpart remains negative, and so differs.
    num_digits = 1 + np.searchsorted(10 ** np.arange(1, 19), np.abs(integers), side="right")
    return bool((num_digits + (integers < 0) == rows.lengths(place, quote.encode())).all())


def _valid_rows(
    table: pd.DataFrame,
    uses: dict[str, str],
    line_numbers: Array,
    faults: Faults,
    time_format: str | None,
    missing_values: list[str],
    has_no_header: bool,
) -> pd.DataFrame:
    """Returns the rows whose values are valid, and adds the others to `faults`."""
    is_valid = np.ones(len(table), bool)
    parsed: dict[str, Any] = {}
    wrong: list[tuple[str, str, Array]] = []
    for name, use in uses.items():
        if use in ("user", "item"):
            parsed[name] = values.Ids(table[name], missing_values)
            wrong.append((f"missing {use}", name, parsed[name].is_missing))
        elif use == "time":
            parsed[name], is_wrong = values.times(table[name], time_format)
            wrong.append(("invalid time", name, is_wrong))
        elif use == "rating":
            parsed[name], is_wrong = values.ratings(table[name])
            wrong.append(("invalid rating", name, is_wrong))
    if has_no_header and not {"time", "rating"} & set(uses.values()):
        is_header = np.zeros(len(table), bool)
        ids = [parsed[name] for name, use in uses.items() if use != "other"]
        is_header[:1] = any(each.begins_with_a_name() for each in ids) and all(each.begins_with_text() for each in ids)
        wrong.insert(0, ("header", next(iter(uses)), is_header))
    for kind, name, is_wrong in wrong:
        (rows,) = np.nonzero(is_wrong & is_valid)
        if rows.size:
            faults.add(kind, line_numbers[rows], table[name].iloc[rows[0]])
            is_valid[rows] = False
    columns = {}
    for name, use in uses.items():
        if use in ("user", "item"):
            columns[name] = parsed[name].select(is_valid, parse=faults.unit == "line")
        else:
            column = parsed.get(name, table[name])
            columns[name] = column if is_valid.all() else column[is_valid].reset_index(drop=True)
    return pd.DataFrame(columns)
