"""Splits: each row is in one part, and what is in which part."""

import datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_rs_contrib.interactions import leave_last_out, random_split, split_by_time

CASES = settings(max_examples=60, deadline=None, derandomize=True)


def frame_of(users, times):
    """Rows whose index has nothing to do with their place."""
    index = [f"row {7 * row % 101}" for row in range(len(users))]
    return pd.DataFrame({"user": users, "time": times, "place": range(len(users))}, index=index)


def check_parts(frame, train, test):
    """Each row is in one part, with its index and in the same order."""
    for part in (train, test):
        assert len(part)
        pd.testing.assert_frame_equal(part, frame.iloc[part["place"]])
        assert part["place"].is_monotonic_increasing
    assert sorted([*train["place"], *test["place"]]) == list(range(len(frame)))


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 4)), min_size=1, max_size=25)


@CASES
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_random_split_has_the_share(num_rows, share, seed):
    frame = frame_of(range(num_rows), range(num_rows))
    num_test = round(num_rows * share)
    if num_test in (0, num_rows):
        with pytest.raises(ValueError, match="Both parts of a split must have rows"):
            random_split(frame, test_share=share)
        return
    train, test = random_split(frame, test_share=share, seed=seed)
    check_parts(frame, train, test)
    assert len(test) == num_test
    pd.testing.assert_frame_equal(random_split(frame, test_share=share, seed=seed)[1], test)


def test_a_random_split_depends_on_the_seed_alone():
    frame = frame_of(range(1_000), range(1_000))
    parts = [random_split(frame, seed=seed)[1]["place"].tolist() for seed in (0, 1)]
    assert parts[0] != parts[1]
    assert [len(part) for part in parts] == [200, 200]
    # All rows are equally likely.
    counts = np.bincount(np.concatenate([random_split(frame, seed=seed)[1]["place"] for seed in range(200)]))
    assert abs(counts.mean() - 40) < 1e-6
    assert counts.min() > 15
    assert counts.max() < 70


@CASES
@given(ROWS, st.floats(0.01, 0.99))
def test_a_split_by_time_is_the_cut_closest_to_the_share(rows, share):
    users, times = map(list, zip(*rows, strict=True))
    frame = frame_of(users, times)
    if len(set(times)) == 1:
        with pytest.raises(ValueError, match=r"needs rows of different times. Received: the same time in all"):
            split_by_time(frame, "time", test_share=share)
        return
    train, test = split_by_time(frame, "time", test_share=share)
    check_parts(frame, train, test)
    assert train["time"].max() < test["time"].min()
    sizes = [sum(time >= cut for time in times) for cut in sorted(set(times))[1:]]
    best = min(abs(size - share * len(times)) for size in sizes)
    assert abs(len(test) - share * len(times)) <= best + 1e-9


@CASES
@given(ROWS, st.integers(1, 3))
def test_the_last_rows_of_each_user_are_left_out(rows, num_items):
    users, times = map(list, zip(*rows, strict=True))
    frame = frame_of(users, times)
    expected = []
    for user in set(users):
        places = sorted((time, place) for place, (each, time) in enumerate(rows) if each == user)
        if len(places) > num_items:
            expected += [place for _, place in places[-num_items:]]
    if not expected:
        with pytest.raises(ValueError, match="A user must have more than `num_items` rows"):
            leave_last_out(frame, "user", "time", num_items=num_items)
        return
    train, test = leave_last_out(frame, "user", "time", num_items=num_items)
    check_parts(frame, train, test)
    assert test["place"].tolist() == sorted(expected)


@pytest.mark.parametrize(
    "convert",
    [
        lambda times: times.astype("Int64"),
        lambda times: times.astype("float32") / 4,
        lambda times: times.astype("uint8"),
        lambda times: times.astype("int64[pyarrow]"),
        lambda times: pd.to_datetime(times, unit="D"),
        lambda times: pd.to_datetime(times, unit="D").astype("datetime64[s]"),
        lambda times: pd.to_datetime(times, unit="D", utc=True).dt.tz_convert("Asia/Tokyo"),
        lambda times: pd.to_datetime(times, unit="D").astype("timestamp[us][pyarrow]"),
        lambda times: pd.to_datetime(times, unit="D", utc=True).astype("timestamp[us, UTC][pyarrow]"),
    ],
)
def test_times_of_any_kind_have_the_same_order(convert):
    frame = frame_of(["a", "b", "a", "a", "b"], [3, 9, 10, 2, 9])
    frame["time"] = convert(frame["time"])
    assert leave_last_out(frame, "user", "time")[1]["place"].tolist() == [2, 4]
    assert split_by_time(frame, "time", test_share=0.5)[1]["place"].tolist() == [1, 2, 4]


def test_a_clock_that_goes_back_does_not_change_the_order():
    # Half past two twice, on the day on which summer time ends.
    times = pd.to_datetime(["2024-10-27T00:40Z", "2024-10-27T01:30Z"]).tz_convert("Europe/Berlin")
    assert times[0].hour == times[1].hour == 2
    frame = frame_of(["a", "a"], times)
    assert leave_last_out(frame, "user", "time")[1]["place"].tolist() == [1]


SPLITS = [
    lambda frame: split_by_time(frame, "time"),
    lambda frame: leave_last_out(frame, "user", "time"),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        (["10", "9", "8"], TypeError, "'time` must hold numbers or dates. Received: dtype .*'10'"),
        ([True, False, True], TypeError, "must hold numbers or dates. Received: dtype bool"),
        ([datetime.date(2020, 1, 1)] * 3, TypeError, "must hold numbers or dates"),
        ([1, None, 2], ValueError, "must have a value in each row. Received: nan in row 1, and 1 such rows"),
        ([1.0, float("inf"), 2], ValueError, "must be finite. Received: inf in row 1"),
        (pd.to_datetime(["2020-01-01", None, None]), ValueError, "Received: NaT in row 1, and 2 such rows"),
        (pd.array([1, 2, None], "Int64"), ValueError, "Received: <NA> in row 2"),
    ],
)
def test_invalid_times_raise(split, times, error, message):
    with pytest.raises(error, match=message.replace("'time`", "`time`")):
        split(frame_of(["a", "a", "b"], times))


def test_invalid_arguments_raise():
    frame = frame_of(["a", "a", "b"], [1, 2, 3])
    for split in (*SPLITS, random_split):
        with pytest.raises(TypeError, match=r"`frame` must be a pandas DataFrame. Received: dict"):
            split({"time": [1]})
        with pytest.raises(ValueError, match=r"`frame` must have rows. Received: 0 rows"):
            split(frame[:0])
    for share in (0, 1, -0.5, 2, "a", None, float("nan"), True):
        for split in (lambda **each: random_split(frame, **each), lambda **each: split_by_time(frame, "time", **each)):
            with pytest.raises(ValueError, match="`test_share` must be a number between 0 and 1"):
                split(test_share=share)
    for number in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="`num_items` must be a positive int"):
            leave_last_out(frame, "user", "time", num_items=number)
    with pytest.raises(ValueError, match=r"`time_column` must name a column .*'times'.*\['user', .*mean 'time'\?"):
        split_by_time(frame, "times")
    with pytest.raises(ValueError, match=r"`user_column` must name a column .*Pass one of them"):
        leave_last_out(frame, 5, "time")
    with pytest.raises(ValueError, match="'time', which 2 columns have"):
        split_by_time(pd.concat([frame, frame], axis=1), "time")
    with pytest.raises(ValueError, match="must have a value in each row"):
        leave_last_out(frame_of(["a", None, "b"], [1, 2, 3]), "user", "time")
