"""Records of a text file: which lines have the expected number of fields, and where the fields are."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from keras_rs_contrib.interactions.columns import Array
from keras_rs_contrib.interactions.faults import Faults

_NEWLINE = ord("\n")
# A field with more lines that have quotes has probably no end.
_MAX_LINES = 1_000


@dataclasses.dataclass
class Records:
    """Valid records, each with the same number of fields.

    Attributes:
        text: the lines, UTF-8.
        line_numbers: `[num_records]`, from 1, the line in which each record begins.
        num_rows: the number of records, with invalid ones.
        bounds: `[num_records, num_fields + 1]`: field j of a record begins at `bounds[:, j] + 1`, and ends before
            `bounds[:, j + 1]`.
    """

    text: bytes
    line_numbers: Array
    num_rows: int
    bounds: Array

    def lengths(self, column: int, quote: bytes) -> Array:
        """Returns `[num_records]`, the number of bytes in a field without its quotes."""
        begins = self.bounds[:, column] + 1
        lengths: Array = self.bounds[:, column + 1] - begins
        if quote and quote in self.text:
            # An empty last field begins at the end of its line.
            lengths = lengths - 2 * (np.frombuffer(self.text, "uint8")[begins] == ord(quote))
        return lengths


def split_records(text: bytes, sep: bytes, num_fields: int, quote: bytes, first_line: int, faults: Faults) -> Records:
    """Returns the valid records of a text, and adds the others to `faults`. Empty lines are no records.

    Args:
        text: UTF-8 lines, the last one with a newline at its end.
        sep: one byte.
        num_fields: the number of fields that a record has.
        quote: one byte, or none if quotes have no meaning.
        first_line: the number of the first line of `text` in its file.
        faults: where invalid records are added.
    """
    num_broken = 0
    if quote and quote in text and not _is_regular(np.frombuffer(text, "uint8"), sep, quote):
        text, broken = _repair_quotes(text, sep, quote)
        faults.add("invalid quotes", [line + first_line for line, _ in broken], broken[0][1] if broken else "")
        num_broken = len(broken)
    data = np.frombuffer(text, "uint8")
    newlines, seps = np.flatnonzero(data == _NEWLINE), np.flatnonzero(data == sep[0])
    ends = newlines
    if quote and quote in text:
        quotes = np.flatnonzero(data == quote[0])
        # After an odd number of quotes, a newline or a separator is part of a field.
        ends = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
        seps = seps[np.searchsorted(quotes, seps) % 2 == 0]
    starts = np.concatenate([[0], ends[:-1] + 1]).astype("int64") if len(ends) else ends
    counts = np.diff(np.searchsorted(seps, ends), prepend=0) + 1
    lines = np.arange(len(ends)) if ends is newlines else np.searchsorted(newlines, starts)
    is_empty = ends == starts
    wrong = (
        ("undecodable text", _have_undecodable_bytes(text, ends)),
        ("too few fields", counts < num_fields),
        ("too many fields", counts > num_fields),
    )
    is_valid = ~is_empty
    for kind, is_wrong in wrong:
        rows = np.flatnonzero(is_wrong & is_valid)
        if rows.size:
            # Lines of spaces are empty too.
            blank = [not text[starts[row] : ends[row]].strip() for row in rows] if kind == "too few fields" else False
            is_empty[rows] = blank
            is_valid[rows] = False
            rows = rows[~is_empty[rows]]
            example = _shown(text[starts[rows[0]] : ends[rows[0]]]) if rows.size else ""
            faults.add(kind, lines[rows] + first_line, example)
    num_rows = len(ends) - int(is_empty.sum()) + num_broken
    if not is_valid.all():
        seps = seps[np.repeat(is_valid, counts - 1)]
        lengths = ends - starts + 1
        text = data[np.repeat(is_valid, lengths)].tobytes()
        removed = np.cumsum(np.where(is_valid, 0, lengths))
        starts, ends = (starts - removed)[is_valid], (ends - removed)[is_valid]
        seps = seps - np.repeat(removed[is_valid], num_fields - 1)
        lines = lines[is_valid]
    bounds = np.concatenate([starts[:, None] - 1, seps.reshape(len(starts), num_fields - 1), ends[:, None]], axis=1)
    return Records(text, lines + first_line, num_rows, bounds)


def _shown(line: bytes) -> str:
    """Returns a line for messages, with the bytes that cannot be decoded as the file has them."""
    return line.decode("utf-8", "surrogatepass").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _have_undecodable_bytes(text: bytes, ends: Array) -> Array:
    """Returns for each record whether it has a NUL, or the bytes of a lone surrogate, which `as_utf8` writes."""
    result = np.zeros(len(ends), bool)
    if b"\0" not in text and b"\xed" not in text:
        return result
    data = np.frombuffer(text, "uint8")
    (places,) = np.nonzero((data == 0) | (data == 0xED))
    surrogates = data[np.minimum(places + 1, len(data) - 1)] >= 0xA0
    places = places[(data[places] == 0) | surrogates]
    result[np.searchsorted(ends, places)] = True
    return result


def _is_regular(data: Array, sep: bytes, quote: bytes) -> bool:
    """Returns whether quotes enclose whole fields, with two quotes for a quote in a field."""
    (quotes,) = np.nonzero(data == quote[0])
    if len(quotes) % 2:
        return False
    outside = [sep[0], _NEWLINE, quote[0]]
    opening, closing = quotes[0::2], quotes[1::2]
    before = np.where(opening == 0, _NEWLINE, data[opening - 1])
    return bool(np.isin(before, outside).all() and np.isin(data[closing + 1], outside).all())


def _repair_quotes(text: bytes, sep: bytes, quote: bytes) -> tuple[bytes, list[tuple[int, str]]]:
    """Returns text whose quotes are regular, and the place and text of each line that has an unclosed quote.

    Quotes within a field that does not begin with one are part of it. Each line without end is left empty.
    """
    s, q = re.escape(sep), re.escape(quote)
    value = rb"%b(?:[^%b]|%b%b)*+%b|[^%b%b\n][^%b\n]*+" % (q, q, q, q, q, s, q, s)
    record = re.compile(rb"(?:%b|)(?:%b(?:%b|))*+" % (value, s, value))
    unclosed = re.compile(rb"(?:(?:%b|)%b)*%b(?:[^%b]|%b%b)*+" % (value, s, q, q, q, q))
    values = re.compile(value)

    def regular(match: re.Match[bytes]) -> bytes:
        found = match.group()
        return found if found.startswith(quote) else quote + found.replace(quote, 2 * quote) + quote

    lines = text.split(b"\n")
    quoted = [place for place, line in enumerate(lines) if quote in line]
    broken: list[tuple[int, str]] = []
    done = -1
    for index, place in enumerate(quoted):
        if place <= done:
            continue
        # A field may span lines. The line in which it ends has a quote.
        for done in quoted[index : index + _MAX_LINES]:
            candidate = b"\n".join(lines[place : done + 1])
            if not unclosed.fullmatch(candidate):
                break
        if record.fullmatch(candidate):
            lines[place : done + 1] = values.sub(regular, candidate).split(b"\n")
        else:
            broken.append((place, _shown(lines[place])))
            lines[place] = b""
            done = place
    return b"\n".join(lines), broken
