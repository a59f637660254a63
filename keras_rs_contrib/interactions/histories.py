"""Histories: the items that a user had before a row, or has had in all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.interactions import columns
from keras_rs_contrib.interactions.columns import Array


def histories(users: Any, items: Any, times: Any, length: int, *, padding: Any = None) -> Array:
    """Returns for each row the most recent earlier items of its user.

    A row comes before another if its time is earlier, and of equal times if it is an earlier row. A history has nothing
    of its own row or of later rows. It also leaves out earlier rows of its own item, which would give away the target,
    and reaches further back instead. Compute histories before splitting rows, so that those of test rows are complete.

    Args:
        users: `[num_rows]` strings or integers, as a Series, an array or a list.
        items: `[num_rows]` strings or integers.
        times: `[num_rows]` numbers or dates, or `None` if rows are in order.
        length: positive int, the number of items in a history.
        padding: what fills short histories. `None` for -1 for integers, and `None` itself for strings.

    Returns:
        `[num_rows, length]`, with the most recent item in the last column, padded on the left. int32 or int64 as
        `items` for integers, and an object array for strings.

    Raises:
        TypeError: if items are neither strings nor integers, or if times are neither numbers nor dates.
        ValueError: if a value is missing, if columns have different lengths, or if an item equals `padding`.
    """
    length = positive_int(length, "length")
    codes, table, order, starts = _in_order(users, items, times, padding)
    codes = codes[order]
    positions = np.arange(len(order))
    # A run is a series of rows of the same item. One jump leads out of it, however long it is. Where it goes on in the
    # rows of the user before, nothing is left.
    begins_run = codes != np.roll(codes, 1)
    run_starts = np.maximum.accumulate(np.where(begins_run, positions, 0))

    result = np.full((len(order), length), len(table) - 1, "int32" if len(table) < 2**31 else "int64")
    current = positions - 1
    for column in reversed(range(length)):
        # Where nothing is left, -1 reads the last row, which is then not used.
        is_target = (current >= starts) & (codes[current] == codes)
        current = np.where(is_target, run_starts[current] - 1, current)
        (rows,) = np.nonzero(current >= starts)
        if not rows.size:
            break
        result[order[rows], column] = codes[current[rows]]
        current = np.maximum(current - 1, -1)
    histories: Array = table[result]
    return histories


def last_items(users: Any, items: Any, times: Any, length: int, *, padding: Any = None) -> tuple[Array, Array]:
    """Returns each user and its most recent items, to recommend what comes next.

    Args:
        users: `[num_rows]` strings or integers, as a Series, an array or a list.
        items: `[num_rows]` strings or integers.
        times: `[num_rows]` numbers or dates, or `None` if rows are in order.
        length: positive int, the number of items for each user.
        padding: what fills short histories. `None` for -1 for integers, and `None` itself for strings.

    Returns:
        `(user_names, history)`: `[num_users]` users in the order of their first rows, and `[num_users, length]` items
        in the form of `histories`. Here repeated items stay.

    Raises:
        TypeError: if items are neither strings nor integers, or if times are neither numbers nor dates.
        ValueError: if a value is missing, if columns have different lengths, or if an item equals `padding`.
    """
    length = positive_int(length, "length")
    codes, table, order, starts = _in_order(users, items, times, padding)
    _, names = columns.codes_of(users, "users")
    (first,) = np.nonzero(starts == np.arange(len(order)))
    ends = np.append(first, len(order))[1:]
    wanted = ends[:, None] - np.arange(length, 0, -1)
    is_there = wanted >= first[:, None]
    result = np.full(wanted.shape, len(table) - 1, codes.dtype)
    result[is_there] = codes[order][wanted[is_there]]
    return names, table[result]


def _in_order(users: Any, items: Any, times: Any, padding: Any) -> tuple[Array, Array, Array, Array]:
    """Returns items as `_items_of` does, and the order of rows by user and time.

    Returns:
        `[num_rows]` items as numbers, what these stand for, the rows by user and then time, and for each place in this
        order the first place of the same user.
    """
    columns.check_same_rows(users=users, items=items, times=times)
    numbers, table = _items_of(items, padding)
    codes, _ = columns.codes_of(users, "users")
    moments = np.zeros(len(codes), "int64") if times is None else columns.times_of(times, "times")
    columns.check_lengths(users=codes, items=numbers, times=moments)
    order = np.lexsort((moments, codes))
    counts = np.bincount(codes)
    return numbers, table, order, np.repeat(np.cumsum(counts) - counts, counts)


def _items_of(items: Any, padding: Any) -> tuple[Array, Array]:
    """Returns items as numbers from 0 on, and what these stand for, with the padding as the last one."""
    series = columns.as_series(items, "items")
    if series.dtype == "category":
        series = series.astype(series.cat.categories.dtype)
    kind = "string" if isinstance(series.dtype, pd.StringDtype) else pd.api.types.infer_dtype(series)
    kind = "integer" if kind == "empty" else kind
    if kind not in ("string", "integer"):
        raise TypeError(
            f"`items` must be all strings or all integers. Received: dtype {series.dtype}, with values of kind "
            f"{kind}, such as {series[0]!r}. Convert the column, for instance with `.astype(str)`."
        )
    codes, uniques = pd.factorize(series)
    uniques = pd.Series(uniques)
    if kind == "string":
        table = uniques.to_numpy(object)
        fits = padding is None or isinstance(padding, str)
    else:
        table = _integers(uniques)
        padding = -1 if padding is None else padding
        fits = isinstance(padding, (int, np.integer)) and not isinstance(padding, bool)
    if not fits:
        raise TypeError(
            f"`padding` must be of the kind of the items. Received: padding={padding!r} for items of kind {kind}. "
            "Leave it out, or pass a value of that kind."
        )
    if kind == "integer" and not np.iinfo(table.dtype).min <= padding <= np.iinfo(table.dtype).max:
        raise ValueError(
            f"`padding` must fit the items' dtype. Received: padding={padding!r} for {table.dtype}. Pass a smaller one."
        )
    (same,) = np.nonzero(table == padding)
    if padding is not None and same.size:
        raise ValueError(
            f"`padding` must not be an item. Received: {padding!r} in row {(codes == same[0]).argmax()}. Pass another "
            "`padding`, or leave such rows out."
        )
    return codes, np.append(table, np.array([padding], table.dtype))


def _integers(series: pd.Series) -> Array:
    """Returns integers as int32 if they have this dtype, and as int64 otherwise."""
    dtype = "int32" if str(series.dtype) in ("int32", "Int32") else "int64"
    if not len(series):
        return np.zeros(0, dtype)
    least, largest = int(series.min()), int(series.max())
    limits = np.iinfo(dtype)
    if not limits.min <= least <= largest <= limits.max:
        raise ValueError(
            f"`items` must fit int64. Received: {largest if largest > limits.max else least}. Map them to rows with a "
            "`Vocabulary`, or convert them with `.astype(str)`."
        )
    return np.asarray(series.to_numpy(dtype))
