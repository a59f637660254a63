"""Checks of arguments that several layers and metrics share."""

from __future__ import annotations

import numbers
from typing import Any


def positive_int(value: Any, name: str) -> int:
    """Returns `value` as an int, or raises `ValueError` if it is not a positive integer."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}. Pass 1 or more.")
    return int(value)


def check_type(name: str, value: Any, kind: type, optional: bool = False) -> None:
    """Raises `TypeError` if `value` is not a `kind`. If `optional`, `None` is also valid."""
    if isinstance(value, kind) or (optional and value is None):
        return
    raise TypeError(
        f"`{name}` must be a `{kind.__name__}`. Received: {value!r} (of type {type(value).__name__}). "
        "Pass an instance of this class."
    )


def differ(first: int | None, second: int | None) -> bool:
    """Returns whether two dimensions are known and different."""
    return first is not None and second is not None and first != second
