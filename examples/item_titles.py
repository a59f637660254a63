"""Titles of items, from a text file with a column of items and a column of titles."""

import csv
import re

import pandas as pd

SEPARATORS = ("\t", "::", "|", ",", ";")
# Without `title_column`, the first of these, in any case.
TITLE_COLUMNS = ("title", "movie_title", "name")
# In the atomic files of RecBole, each name has its type.
TYPED_NAME = re.compile(r"(.+):(?:token|token_seq|float|float_seq)")


def read_titles(
    path: str,
    item_column: str,
    title_column: str | None = None,
    column_names: list[str] | None = None,
    encoding: str = "utf-8",
) -> dict[str, str]:
    """Returns the title of each item in a file, by the text of the item.

    Args:
        path: CSV, fields separated by tabs, "::", "|" or ";", or an `.item` file of RecBole.
        item_column: the name of the column of items.
        title_column: the name of the column of titles. By default, the first of `TITLE_COLUMNS`, or the only other one.
        column_names: the names of all columns of a file without a header.
        encoding: encoding of the file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is empty, or if it is not clear which columns are meant.
    """
    options = {"dtype": str, "keep_default_na": False, "encoding": encoding, "encoding_errors": "replace"}
    # No file has this separator: the first line is one field.
    line = pd.read_csv(path, sep="\x01", header=None, nrows=1, quoting=csv.QUOTE_NONE, **options).iat[0, 0]

    def names_by(sep: str) -> list[str]:
        if column_names:
            return column_names if len(_fields(line, sep)) == len(column_names) else []
        return [_plain(name) for name in _fields(line, sep)]

    sep = max(SEPARATORS, key=lambda sep: (item_column in names_by(sep), len(names_by(sep))))
    names = names_by(sep)
    if names.count(item_column) != 1:
        if column_names:
            raise ValueError(
                f"The names of columns must be those of the file, with {item_column!r} once. Received: {column_names}, "
                f"and the first line {line[:100]!r}. Name all columns."
            )
        raise ValueError(
            f"The file must have the column of items once. Received: {item_column!r}, and a file with the columns "
            f"{names}. Name one of them."
        )
    title_column = _title_column(names, item_column) if title_column is None else title_column
    if names.count(title_column) != 1:
        raise ValueError(
            f"The file must have the column of titles once. Received: {title_column!r}, and a file with the columns "
            f"{names}. Name one of them."
        )
    frame = pd.read_csv(
        path,
        sep=sep,
        header=None,
        names=list(range(len(names))),
        skiprows=0 if column_names else 1,
        index_col=False,
        on_bad_lines="skip",
        engine="c" if len(sep) == 1 else "python",
        # In other files, quotes are part of the text.
        quoting=csv.QUOTE_MINIMAL if sep in ",;" else csv.QUOTE_NONE,
        **options,
    )
    items, titles = (frame[names.index(name)].fillna("").str.strip() for name in (item_column, title_column))
    is_given = (items != "") & (titles != "")
    return dict(zip(items[is_given], titles[is_given], strict=True))


def _fields(line: str, sep: str) -> list[str]:
    fields = next(csv.reader([line], delimiter=sep)) if sep in ",;" else line.split(sep)
    return [field.strip().removeprefix("\ufeff") for field in fields]


def _plain(name: str) -> str:
    match = TYPED_NAME.fullmatch(name)
    return match.group(1) if match else name


def _title_column(names: list[str], item_column: str) -> str:
    others = [name for name in names if name != item_column]
    for title_column in TITLE_COLUMNS:
        for name in others:
            if name.casefold() == title_column:
                return name
    if len(others) != 1:
        raise ValueError(
            f"It must be clear which column has the titles. Received: the columns {names}, none of which is named "
            f"as one of {list(TITLE_COLUMNS)}. Name it with --title_column."
        )
    return others[0]
