"""Invalid rows of a file: counted by kind, reported with line numbers, and too many of them an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

NUM_LINES = 5
NUM_CHARACTERS = 60

# What to check, for each kind of faults.
FIXES = {
    "too few fields": "Check `sep`.",
    "too many fields": "Check `sep` and `quote_char`.",
    "invalid quotes": "If quotes have no meaning in this file, pass quote_char=None.",
    "undecodable text": "Check `encoding`, for instance encoding='latin-1'.",
    "header": "The first line has a text where all other rows have integers.",
    "missing user": "Check `user_column`.",
    "missing item": "Check `item_column`.",
    "invalid time": "Check `time_column`. Times are numbers or ISO 8601, unless `time_format` is given.",
    "invalid rating": "Check `rating_column`. Ratings are finite numbers.",
}


@dataclasses.dataclass
class Faults:
    """The invalid rows of a file.

    Attributes:
        path: the file, for messages.
        unit: what the numbers count, `"line"` or `"row"`.
        numbers: the line numbers of the invalid rows, by kind.
        examples: the text of the first invalid row or value, by kind.
    """

    path: str
    unit: str = "line"
    numbers: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    examples: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, numbers: Iterable[Any], example: Any) -> None:
        """Counts rows as invalid, with their line numbers and the text of the first one."""
        lines = [int(number) for number in numbers]
        if not lines:
            return
        if kind not in self.numbers or lines[0] < self.numbers[kind][0]:
            self.examples[kind] = example
        self.numbers[kind] = sorted([*self.numbers.get(kind, []), *lines])

    @property
    def num_rows(self) -> int:
        """The number of invalid rows."""
        return sum(map(len, self.numbers.values()))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Returns for each kind the number of its rows, and the line numbers of the first ones."""
        return {kind: {"count": len(lines), "lines": lines[:NUM_LINES]} for kind, lines in self.numbers.items()}

    def text(self, total: int) -> str:
        """Returns a text for users about the faults in a file of `total` rows."""
        parts = [f"{self.num_rows:,} of {total:,} rows of {self.path!r} are invalid:"]
        for kind, lines in sorted(self.numbers.items(), key=lambda each: -len(each[1])):
            shown = ", ".join(map(str, lines[:NUM_LINES])) + (", ..." if len(lines) > NUM_LINES else "")
            example = repr(self.examples[kind])
            example = example if len(example) <= NUM_CHARACTERS else example[:NUM_CHARACTERS] + "..."
            plural = "s" if len(lines) > 1 else ""
            parts.append(f"  {kind}: {len(lines):,} ({self.unit}{plural} {shown}), such as {example}. {FIXES[kind]}")
        return "\n".join(parts)
