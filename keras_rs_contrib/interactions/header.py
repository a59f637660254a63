"""The header of a text file: its separator, its columns, and which of them a caller means."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import re
from collections.abc import Sequence

from keras_rs_contrib.interactions.columns import suggestion

SEPARATORS = ("\t", "::", "|", ",", ";")
NUM_LINES = 100
# In the atomic files of RecBole, each name has its type: https://recbole.io/docs/user_guide/data/atomic_files.html
_TYPED_NAME = re.compile(r"(.+):(?:token|token_seq|float|float_seq)")


@dataclasses.dataclass
class Header:
    """How a text file is laid out.

    Attributes:
        sep: what separates fields, one or more characters.
        names: the names of all columns.
        num_lines: the number of lines before the first row.
        num_bytes: their bytes, in UTF-8.
    """

    sep: str
    names: list[str]
    num_lines: int
    num_bytes: int


def read_header(
    text: bytes, wanted: Sequence[str], column_names: Sequence[str] | None, sep: str | None, quote: str
) -> Header:
    """Returns the header of a text.

    Args:
        text: UTF-8 lines, not all of them empty.
        wanted: names of columns that the header must have.
        column_names: the names of all columns if there is no header, or `None`.
        sep: what separates fields, or `None` to find out.
        quote: one character, or "" if quotes have no meaning.

    Raises:
        ValueError: if there is no header with the wanted names, or if it is not clear what separates fields.
    """
    empty = re.match(rb"(?:[ ]*\n)*", text)
    start = empty.end() if empty else 0
    num_empty = text.count(b"\n", 0, start)
    stop = text.index(b"\n", start) + 1
    place = start
    lines: list[str] = []
    while place < len(text) and len(lines) < NUM_LINES:
        end = text.index(b"\n", place)
        lines.append(text[place:end].decode("utf-8", "replace"))
        place = end + 1
    sep = _separator(lines, wanted, column_names, quote) if sep is None else sep
    first = _fields(lines[0], sep, quote)
    if column_names is None:
        positions(first, wanted, lines[0])
        return Header(sep, first, num_empty + 1, stop)
    names = list(column_names)
    # A header that says the same is not a row.
    if first == names or list(map(_plain, first)) == names:
        return Header(sep, names, num_empty + 1, stop)
    return Header(sep, names, num_empty, start)


def positions(names: Sequence[str], wanted: Sequence[str], first_line: str | None = None) -> list[int]:
    """Returns the places of columns, by their names, or by names without RecBole's type.

    Args:
        names: the names of all columns.
        wanted: the names to look for.
        first_line: the line that the names are from, if they may be a row instead.

    Raises:
        ValueError: if there is no such column, or more than one.
    """
    plain = [_plain(name) for name in names]
    result = []
    for each in wanted:
        found = [place for place, name in enumerate(names) if name == each]
        found = found or [place for place, name in enumerate(plain) if name == each]
        if len(found) > 1:
            raise ValueError(
                f"A column must have a name of its own. Received: {each!r}, which {len(found)} columns have, of "
                f"{list(names)}. Rename one of them in the file."
            )
        if not found:
            raise ValueError(
                f"The file must have the columns that are named. Received: {each!r}, and a file with the columns "
                f"{list(names)}. {_fix(each, names, plain, first_line)}"
            )
        result += found
    if len(set(result)) < len(result):
        raise ValueError(
            f"Each column has one use. Received: {list(wanted)}, of which two are the same column. Name another one."
        )
    return result


def _fix(name: str, names: Sequence[str], plain: Sequence[str], first_line: str | None) -> str:
    if first_line is not None and any(re.fullmatch(r"-?[0-9.]+", each) for each in names):
        return f"If its first line is a row, pass column_names=[...] with {len(names)} names."
    if first_line is not None and len(names) == 1:
        return f"If something else separates its fields, pass `sep`. The first line is {first_line[:100]!r}."
    return suggestion(name, [*names, *plain])


def _plain(name: str) -> str:
    match = _TYPED_NAME.fullmatch(name)
    return match.group(1) if match else name


def _fields(line: str, sep: str, quote: str) -> list[str]:
    if len(sep) == 1 and quote in line and quote:
        # A carriage return within a line, or a field of more than 128 KiB, is an error.
        with contextlib.suppress(csv.Error):
            return [field.strip() for field in next(csv.reader([line], delimiter=sep, quotechar=quote), [])]
    return [field.strip() for field in line.split(sep)]


def _separator(lines: list[str], wanted: Sequence[str], column_names: Sequence[str] | None, quote: str) -> str:
    """Returns the separator that finds the wanted columns, or as many fields as there are names."""
    by_sep = {sep: [_fields(line, sep, quote) for line in lines] for sep in SEPARATORS}
    if column_names is None:
        # The one that finds most is best for errors too.
        def found(sep: str) -> tuple[int, int]:
            first = by_sep[sep][0]
            return len({*first, *map(_plain, first)} & set(wanted)), len(first)

        return max(SEPARATORS, key=found)
    num_lines = {sep: sum(len(fields) == len(column_names) for fields in by_sep[sep]) for sep in SEPARATORS}
    most = max(num_lines.values())
    best = [sep for sep in SEPARATORS if num_lines[sep] == most]
    if not most or len(best) > 1:
        raise ValueError(
            f"One separator of {list(SEPARATORS)} must give {len(column_names)} fields, one for each of "
            f"`column_names`. Received: the line {lines[0][:100]!r}, for which {best if most else 'none'} does. "
            "Pass `sep`, or as many names as the file has columns."
        )
    return best[0]
