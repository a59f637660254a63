"""A checksum of a tower's weights, which tells whether it has changed since an index was made of it."""

from __future__ import annotations

from typing import Any

import jax
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp


def checksum(variables: list[keras.Variable]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Returns two numbers that change with any bit of the variables, and with the order of their elements."""
    # A table that is split may have rows that are none, whose values depend on the number of devices.
    arrays = [variable.value[: variable.shape[0]] if variable.shape else variable.value for variable in variables]
    return np.asarray(_checksum_of_arrays(arrays))


@jax.jit
def _checksum_of_arrays(arrays: list[Any]) -> Any:
    # Not both 0, which stands for no checksum.
    total = jnp.ones(2, jnp.uint32)
    for array in arrays:
        size = array.dtype.itemsize * 8
        bits = lax.bitcast_convert_type(array, f"uint{size}") if array.dtype != bool else array
        bits = bits.reshape(-1).astype(jnp.uint32)
        places = lax.iota(jnp.uint32, bits.size)
        for i, (factor, step) in enumerate(((2654435761, 1), (2246822519, 7))):
            # Odd weights: no change of a single element is lost.
            weights = (places * np.uint32(factor) + np.uint32(step)) | np.uint32(1)
            total = total.at[i].set(total[i] * np.uint32(31) + jnp.sum(bits * weights, dtype=jnp.uint32))
    return total
