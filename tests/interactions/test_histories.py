"""Histories, compared with a loop over rows."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_rs_contrib.interactions import histories, last_items

CASES = settings(max_examples=60, deadline=None, derandomize=True)
ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=25)


def padded(items, length, padding):
    items = items[-length:]
    return [padding] * (length - len(items)) + items


def naive_histories(users, items, times, length, padding):
    result = []
    for row, (user, item, time) in enumerate(zip(users, items, times, strict=True)):
        earlier = [
            (times[other], other)
            for other in range(len(users))
            if users[other] == user and items[other] != item and (times[other], other) < (time, row)
        ]
        result.append(padded([items[other] for _, other in sorted(earlier)], length, padding))
    return result


def naive_last_items(users, items, times, length, padding):
    names = list(dict.fromkeys(users))
    rows = sorted(range(len(users)), key=lambda row: (times[row], row))
    return names, [padded([items[row] for row in rows if users[row] == name], length, padding) for name in names]


@CASES
@given(ROWS, st.integers(1, 6), st.booleans())
def test_histories_and_last_items_equal_loops(rows, length, is_text):
    users, items, times = map(list, zip(*rows, strict=True))
    padding = -1
    if is_text:
        users, items, padding = [f"u{user}" for user in users], [f"i{item}" for item in items], None
    result = histories(users, items, times, length)
    assert result.tolist() == naive_histories(users, items, times, length, padding)
    assert result.shape == (len(rows), length)
    assert result.dtype == (object if is_text else "int64")
    names, result = last_items(users, items, times, length)
    assert (names.tolist(), result.tolist()) == naive_last_items(users, items, times, length, padding)
    in_order = sorted(range(len(rows)), key=lambda row: times[row])
    users, items = [users[row] for row in in_order], [items[row] for row in in_order]
    assert histories(users, items, None, length).tolist() == naive_histories(
        users, items, [0] * len(rows), length, padding
    )


@CASES
@given(ROWS, st.integers(1, 6), st.data())
def test_later_rows_change_nothing(rows, length, data):
    users, items, times = map(list, zip(*rows, strict=True))
    before = histories(users, items, times, length)
    row = data.draw(st.integers(0, len(rows) - 1))
    items = list(items)
    items[row] = 99
    after = histories(users, items, times, length)
    is_later = [(time, each) > (times[row], row) for each, time in enumerate(times)]
    same = ~np.array(is_later)
    same[row] = False
    np.testing.assert_array_equal(before[same], after[same])


def test_a_known_history():
    items = ["Heat", "Up", "Heat", "Heat", "Alien", "Up"]
    assert histories(["ann"] * 6, items, None, 3).tolist() == [
        [None, None, None],
        [None, None, "Heat"],
        [None, None, "Up"],
        [None, None, "Up"],
        ["Up", "Heat", "Heat"],
        ["Heat", "Heat", "Alien"],
    ]


def test_long_runs_of_one_item_are_left_in_one_step():
    num_rows = 100_000
    items = np.r_[5, np.full(num_rows, 7), 8]
    result = histories(np.zeros(num_rows + 2, int), items, None, 2)
    assert (result[1 : num_rows + 1] == [-1, 5]).all()
    assert result[-1].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("items", "dtype", "expected"),
    [
        (np.array([1, 2], "int32"), "int32", [-1, 1]),
        (np.array([1, 2], "uint8"), "int64", [-1, 1]),
        (np.array([1, 2], "uint64"), "int64", [-1, 1]),
        (pd.Series([1, 2], dtype="Int32"), "int32", [-1, 1]),
        (pd.Series([1, 2], dtype="int64[pyarrow]"), "int64", [-1, 1]),
        (pd.Series([1, 2], dtype="category"), "int64", [-1, 1]),
        (pd.Series([1, 2], dtype=object), "int64", [-1, 1]),
        (pd.Series(["a", "b"], index=[8, 9]), object, [None, "a"]),
        (pd.Series(["a", "b"], dtype="string"), object, [None, "a"]),
        (pd.Series(["a", "b"], dtype="category"), object, [None, "a"]),
        (np.array(["a", "b"]), object, [None, "a"]),
        (("a", "b"), object, [None, "a"]),
        (pd.Index(["a", "b"]), object, [None, "a"]),
    ],
)
def test_items_of_any_kind(items, dtype, expected):
    for users in (
        ["x", "x"],
        np.array(["x", "x"]),
        pd.Series([7, 7], index=[3, 3]),
        pd.Series(["x", "x"], dtype="category"),
    ):
        result = histories(users, items, pd.Series([1, 2], index=[5, 6]), 1)
        assert result.dtype == dtype
        assert result[:, 0].tolist() == expected
        names, latest = last_items(users, items, [1, 2], 2)
        assert latest.dtype == dtype
        assert latest[:, 0].tolist() == expected[1:]
        assert names.tolist() == list(users)[:1]


def test_padding_can_be_named():
    assert histories([1, 1], [3, 4], None, 2, padding=0).tolist() == [[0, 0], [0, 3]]
    assert histories([1, 1], ["a", "b"], None, 1, padding="")[:, 0].tolist() == ["", "a"]
    assert last_items([1], ["a"], None, 2, padding="?")[1].tolist() == [["?", "a"]]
    for padding, items, error, message in (
        (0, [0, 1], ValueError, "`padding` must not be an item. Received: 0 in row 0"),
        (None, [5, -1], ValueError, "`padding` must not be an item. Received: -1 in row 1"),
        ("a", ["b", "a"], ValueError, "`padding` must not be an item. Received: 'a' in row 1"),
        ("", [1, 2], TypeError, "`padding` must be of the kind of the items. Received: padding='' for .* integer"),
        (0, ["a", "b"], TypeError, "`padding` must be of the kind of the items"),
        (1.5, [1, 2], TypeError, "`padding` must be of the kind of the items"),
        (2**40, np.array([1, 2], "int32"), ValueError, "must fit the items' dtype"),
    ):
        with pytest.raises(error, match=message):
            histories([1, 1], items, None, 2, padding=padding)


def test_no_rows_have_no_histories():
    for items, dtype in (([], "int64"), (np.zeros(0, "int64"), "int64"), (pd.Series([], dtype="string"), object)):
        assert histories([], items, [], 3).shape == (0, 3)
        names, latest = last_items([], items, [], 3)
        assert (names.shape, latest.shape, latest.dtype) == ((0,), (0, 3), dtype)


@pytest.mark.parametrize("collect", [histories, last_items])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"items": [1.0, 2.0]}, TypeError, "all strings or all integers. Received: dtype float64"),
        ({"items": [True, False]}, TypeError, "all strings or all integers. Received: dtype bool"),
        ({"items": ["a", 1]}, TypeError, "all strings or all integers.*mixed"),
        ({"items": [b"a", b"b"]}, TypeError, "all strings or all integers.*bytes"),
        ({"items": ["a", None]}, ValueError, "`items` must have a value in each row. Received: (nan|None) in row 1"),
        ({"items": [1, 2**63]}, ValueError, "`items` must fit int64. Received: 9223372036854775808"),
        ({"items": [1, 2**80]}, ValueError, "`items` must fit int64"),
        ({"items": [1]}, ValueError, "`users`, `items`, `times` must have a value for each row. Received: 2, 1, 2"),
        ({"times": [1, 2, 3]}, ValueError, "Received: 2, 2, 3 values"),
        ({"times": ["1", "2"]}, TypeError, "`times` must hold numbers or dates"),
        ({"times": [1, None]}, ValueError, "`times` must have a value in each row"),
        ({"users": ["a", None]}, ValueError, "`users` must have a value in each row"),
        ({"users": [["a"], ["b"]]}, ValueError, r"`users` must have one dimension.*shape \(2, 1\)"),
        ({"users": "ab"}, ValueError, "`users` must have one dimension"),
        ({"users": [{}, {}]}, TypeError, "`users` must hold strings or integers"),
        ({"length": 0}, ValueError, "`length` must be a positive int. Received: length=0"),
        ({"length": 2.0}, ValueError, "`length` must be a positive int"),
    ],
)
def test_invalid_arguments_raise(collect, changes, error, message):
    with pytest.raises(error, match=message):
        collect(**{"users": ["a", "b"], "items": [1, 2], "times": [1, 2], "length": 3, **changes})


@pytest.mark.parametrize("function", [histories, last_items])
def test_series_of_other_rows_raise(function):
    frame = pd.DataFrame({"user": ["a", "a", "b"], "item": [1, 2, 3], "time": [1, 2, 3]})
    with pytest.raises(ValueError, match="`users` and `items` must be columns of the same rows"):
        function(frame["user"][::-1], frame["item"], frame["time"], 2)
    with pytest.raises(ValueError, match="`users` and `times` must be columns of the same rows"):
        function(frame["user"], frame["item"], frame["time"][::-1], 2)
    assert len(function(frame["user"].to_numpy()[::-1], frame["item"], frame["time"], 2)) in (2, 3)
