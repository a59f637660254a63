"""The state of the global random generators of Python and NumPy, which shuffle batches and arrays."""

from __future__ import annotations

import random
from typing import Any

import numpy as np


def random_state() -> dict[str, Any]:
    """Returns the state, as JSON can hold it."""
    version, numbers, gauss = random.getstate()
    _, key, place, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [[int(each) for each in key], int(place), int(has_gauss), float(cached)],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets the state that `random_state` has returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    key, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(key, "uint32"), *rest))  # noqa: NPY002
