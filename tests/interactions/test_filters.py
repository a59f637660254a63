"""Filters, compared with loops over rows."""

from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_rs_contrib.interactions import k_core, rated_at_least

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PAIRS, st.integers(1, 4), st.integers(1, 4))
def test_a_core_equals_a_loop(pairs, min_user, min_item):
    frame = pd.DataFrame(pairs, columns=["user", "item"], index=[f"row {row}" for row in range(len(pairs))])
    frame["user"] = "u" + frame["user"].astype(str)
    kept = list(range(len(pairs)))
    while True:
        users, items = Counter(pairs[row][0] for row in kept), Counter(pairs[row][1] for row in kept)
        smaller = [row for row in kept if users[pairs[row][0]] >= min_user and items[pairs[row][1]] >= min_item]
        if smaller == kept:
            break
        kept = smaller
    if kept:
        result = k_core(frame, "user", "item", min_user=min_user, min_item=min_item)
        pd.testing.assert_frame_equal(result, frame.iloc[kept])
    else:
        with pytest.raises(ValueError, match=f"must remain. Received: {len(pairs)} rows, of which none remains"):
            k_core(frame, "user", "item", min_user=min_user, min_item=min_item)


def test_a_core_removes_in_turns():
    # Without c's row, the item 3 has one row; without that, b has one.
    frame = pd.DataFrame({"user": list("aaaabbc"), "item": [1, 2, 1, 2, 1, 3, 3]})
    assert k_core(frame, "user", "item", min_user=2, min_item=2).index.tolist() == [0, 1, 2, 3]


def test_ratings_at_least():
    frame = pd.DataFrame({"stars": [3, 5, 4, 1]}, index=list("abcd"))
    assert rated_at_least(frame, "stars", 4).index.tolist() == ["b", "c"]
    assert rated_at_least(frame.astype("Float64"), "stars", 3.5).index.tolist() == ["b", "c"]
    with pytest.raises(ValueError, match=r"a rating of 6 or more. Received: ratings of which the largest is 5"):
        rated_at_least(frame, "stars", 6)
    with pytest.raises(ValueError, match="there are 0 rows"):
        rated_at_least(frame[:0], "stars", 6)


def test_invalid_arguments_raise():
    frame = pd.DataFrame({"user": [1, 2], "item": [3, 3], "stars": [1.0, None], "text": ["5", "4"]})
    for number in (0, 1.5, True):
        with pytest.raises(ValueError, match="`min_user` must be a positive int"):
            k_core(frame, "user", "item", min_user=number)
        with pytest.raises(ValueError, match="`min_item` must be a positive int"):
            k_core(frame, "user", "item", min_item=number)
    with pytest.raises(ValueError, match=r"`item_column` must name a column.*'items'.*Did you mean 'item'"):
        k_core(frame, "user", "items")
    with pytest.raises(ValueError, match="`stars` must have a value in each row"):
        k_core(frame, "stars", "item")
    with pytest.raises(TypeError, match=r"must be a pandas DataFrame. Received: dict"):
        k_core(dict(frame), "user", "item")
    with pytest.raises(ValueError, match="none remains"):
        k_core(frame[:0], "user", "item")
    with pytest.raises(ValueError, match="`stars` must have a value in each row"):
        rated_at_least(frame, "stars", 1)
    with pytest.raises(TypeError, match=r"Ratings must be numbers. Received: dtype .*'5'"):
        rated_at_least(frame, "text", 4)
    with pytest.raises(ValueError, match="`rating_column` must name a column"):
        rated_at_least(frame, "ratings", 4)
    for minimum in (None, "4", float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="`minimum` must be a finite number"):
            rated_at_least(frame, "user", minimum)
