"""Interaction data: who used which item, when, and how it was rated. Splits rows, collects histories.

All functions take and return pandas DataFrames or NumPy arrays, and need neither Keras nor a device.
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
from keras_rs_contrib.interactions.splits import leave_last_out, random_split, split_by_time

__all__ = [
    "histories",
    "k_core",
    "last_items",
    "leave_last_out",
    "random_split",
    "rated_at_least",
    "split_by_time",
]
