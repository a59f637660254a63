"""Splits of interactions into rows for training and rows for testing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.interactions import columns


def random_split(frame: pd.DataFrame, *, test_share: float = 0.2, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns a random share of the rows for testing, and the others for training.

    Args:
        frame: DataFrame with a row for each interaction.
        test_share: float between 0 and 1. The number of test rows is rounded.
        seed: int. The same seed gives the same rows.

    Returns:
        `(train, test)`: each row of `frame` in one of them, in the order and with the index of `frame`.

    Raises:
        TypeError: if `frame` is not a DataFrame.
        ValueError: if one of the parts would be empty.
    """
    _check_rows(frame)
    num_test = round(len(frame) * columns.check_share(test_share, "test_share"))
    if num_test in (0, len(frame)):
        raise ValueError(
            f"Both parts of a split must have rows. Received: {len(frame)} rows with test_share={test_share}, which "
            f"gives {num_test} test rows. Pass another `test_share`."
        )
    is_test = np.zeros(len(frame), bool)
    is_test[np.random.default_rng(seed).permutation(len(frame))[:num_test]] = True
    return frame[~is_test], frame[is_test]


def split_by_time(
    frame: pd.DataFrame, time_column: Any, *, test_share: float = 0.2
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the rows before a point in time for training, and those from then on for testing.

    Rows of equal time are in one part. The cut is that with the share of test rows closest to `test_share`.

    Args:
        frame: DataFrame with a row for each interaction.
        time_column: the name of its column of times, which are numbers or dates.
        test_share: float between 0 and 1.

    Returns:
        `(train, test)`: each row of `frame` in one of them, in the order and with the index of `frame`.

    Raises:
        TypeError: if `frame` is not a DataFrame, or if times are neither numbers nor dates.
        ValueError: if there is no such column, if a time is missing, or if all times are equal.
    """
    times = columns.times_of(columns.column_of(frame, time_column, "time_column"), time_column)
    num_train = len(frame) * (1 - columns.check_share(test_share, "test_share"))
    _check_rows(frame)
    different, counts = np.unique(times, return_counts=True)
    if len(different) < 2:
        raise ValueError(
            f"A split by time needs rows of different times. Received: the same time in all {len(frame)} rows of "
            f"{time_column!r}. Use `random_split`."
        )
    # The number of earlier rows, for a cut at each time but the first.
    num_earlier = np.cumsum(counts)[:-1]
    cut = different[1 + np.abs(num_earlier - num_train).argmin()]
    is_test = times >= cut
    return frame[~is_test], frame[is_test]


def leave_last_out(
    frame: pd.DataFrame, user_column: Any, time_column: Any, *, num_items: int = 1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the last rows of each user for testing, and the others for training.

    The last row is that of the latest time, and of equal times that which comes last in `frame`. Users with `num_items`
    rows or fewer have all of them in training. To get validation rows too, split the training rows again.

    Args:
        frame: DataFrame with a row for each interaction.
        user_column: the name of its column of users.
        time_column: the name of its column of times, which are numbers or dates.
        num_items: positive int, the number of test rows of each user.

    Returns:
        `(train, test)`: each row of `frame` in one of them, in the order and with the index of `frame`.

    Raises:
        TypeError: if `frame` is not a DataFrame, or if times are neither numbers nor dates.
        ValueError: if there is no such column, if a user or a time is missing, or if no user has more than `num_items`
            rows.
    """
    num_items = positive_int(num_items, "num_items")
    users, _ = columns.codes_of(columns.column_of(frame, user_column, "user_column"), user_column)
    times = columns.times_of(columns.column_of(frame, time_column, "time_column"), time_column)
    _check_rows(frame)
    counts = np.bincount(users)
    if counts.max() <= num_items:
        raise ValueError(
            f"A user must have more than `num_items` rows, or no row is left for testing. Received: "
            f"num_items={num_items}, and at most {counts.max()} rows of a user. Pass fewer `num_items`."
        )
    order = np.lexsort((times, users))
    users = users[order]
    # In this order, the rows of a user follow one another.
    num_later = np.cumsum(counts)[users] - 1 - np.arange(len(users))
    is_test = np.zeros(len(frame), bool)
    is_test[order] = (num_later < num_items) & (counts[users] > num_items)
    return frame[~is_test], frame[is_test]


def _check_rows(frame: Any) -> None:
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"`frame` must be a pandas DataFrame. Received: {type(frame).__name__}. Pass what `read_interactions` "
            "returns, or `pandas.DataFrame(data)`."
        )
    if not len(frame):
        raise ValueError("`frame` must have rows. Received: 0 rows. Check how it was filtered.")
