r"""Interaction data: who used which item, when, and how it was rated. Reads files, splits rows, collects histories.

All functions take and return pandas DataFrames or NumPy arrays, and need neither Keras nor a device.

Example:
```python
from keras_rs_contrib import interactions

with open("ratings.csv", "w") as file:
    file.write("user,movie,stars,time\nann,Heat,5,1\nann,Up,4,2\nann,Alien,5,3\nbob,Heat,3,2\nbob,Alien,4,5\n")
ratings = interactions.read_interactions(
    "ratings.csv", user_column="user", item_column="movie", rating_column="stars", time_column="time"
)
train, test = interactions.leave_last_out(ratings, "user", "time")
history = interactions.histories(train["user"], train["movie"], train["time"], 10)  # [num_rows, 10]
users, latest = interactions.last_items(ratings["user"], ratings["movie"], ratings["time"], 10)
```
"""

try:
    import pandas as _  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "pandas":
        raise
    raise ImportError(
        "`keras_rs_contrib.interactions` needs pandas. Received: no module 'pandas'. Install it: "
        'pip install "keras_rs_contrib[data]".'
    ) from error

from keras_rs_contrib.interactions.filters import k_core, rated_at_least
from keras_rs_contrib.interactions.histories import histories, last_items
from keras_rs_contrib.interactions.reading import read_interactions
from keras_rs_contrib.interactions.splits import leave_last_out, random_split, split_by_time

__all__ = [
    "histories",
    "k_core",
    "last_items",
    "leave_last_out",
    "random_split",
    "rated_at_least",
    "read_interactions",
    "split_by_time",
]
