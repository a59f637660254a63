"""Filters: which interactions are kept."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import pandas as pd

from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.interactions import columns


def k_core(
    frame: pd.DataFrame, user_column: Any, item_column: Any, *, min_user: int = 5, min_item: int = 5
) -> pd.DataFrame:
    """Returns the rows that remain when users and items with too few rows are left out until none is left.

    Rows are counted, not different items: a repeated row counts again.

    Args:
        frame: DataFrame with a row for each interaction.
        user_column: the name of its column of users.
        item_column: the name of its column of items.
        min_user: positive int, the number of rows that each user has at least.
        min_item: positive int, the number of rows that each item has at least.

    Returns:
        The rows that remain, in the order and with the index of `frame`.

    Raises:
        TypeError: if `frame` is not a DataFrame.
        ValueError: if there is no such column, if a user or an item is missing, or if no row remains.

    Reference: Seidman, "Network structure and minimum degree", Social Networks 5(3), 1983.
    """
    min_user = positive_int(min_user, "min_user")
    min_item = positive_int(min_item, "min_item")
    users, _ = columns.codes_of(columns.column_of(frame, user_column, "user_column"), user_column)
    items, _ = columns.codes_of(columns.column_of(frame, item_column, "item_column"), item_column)
    rows = np.arange(len(frame))
    while rows.size:
        enough = (np.bincount(users)[users] >= min_user) & (np.bincount(items)[items] >= min_item)
        if enough.all():
            return frame.iloc[rows]
        rows, users, items = rows[enough], users[enough], items[enough]
    raise ValueError(
        f"Users with {min_user} rows and items with {min_item} rows must remain. Received: {len(frame)} rows, of which "
        "none remains. Pass a smaller `min_user` or `min_item`."
    )


def rated_at_least(frame: pd.DataFrame, rating_column: Any, minimum: float) -> pd.DataFrame:
    """Returns the rows with a rating of `minimum` or more, such as the positives among ratings.

    Args:
        frame: DataFrame with a row for each interaction.
        rating_column: the name of its column of ratings.
        minimum: a finite number.

    Returns:
        The rows that remain, in the order and with the index of `frame`.

    Raises:
        TypeError: if `frame` is not a DataFrame, or if ratings are not numbers.
        ValueError: if there is no such column, if a rating is missing, or if no row remains.
    """
    if not isinstance(minimum, numbers.Real) or isinstance(minimum, bool) or not np.isfinite(float(minimum)):
        raise ValueError(f"`minimum` must be a finite number. Received: minimum={minimum!r}. Pass a rating, such as 4.")
    ratings = columns.as_series(columns.column_of(frame, rating_column, "rating_column"), rating_column)
    if len(ratings) and not pd.api.types.is_numeric_dtype(ratings.dtype):
        raise TypeError(
            f"Ratings must be numbers. Received: dtype {ratings.dtype}, such as {ratings[0]!r}. Convert the column, "
            "for instance with `pandas.to_numeric`."
        )
    is_kept = ratings.to_numpy("float64") >= minimum
    if not is_kept.any():
        largest = f"the largest is {ratings.max()}" if len(ratings) else "there are 0 rows"
        raise ValueError(
            f"A row must have a rating of {minimum} or more. Received: ratings of which {largest}. Pass a smaller "
            "`minimum`."
        )
    return frame[is_kept]
