"""Plain Python values and NumPy arrays as JSON with a list of arrays, and back, with their types."""

from __future__ import annotations

from typing import Any

import jax
import keras
import numpy as np

Array = np.ndarray[Any, Any]


class NotPlainError(TypeError):
    """The value has a part of another type."""


def to_json(value: Any, arrays: list[Array]) -> Any:
    """Returns what JSON can hold of a value, and appends its arrays.

    Args:
        value: `None`, numbers, strings, arrays, functions of `keras.ops`, by which callbacks of Keras compare metrics,
            and lists, tuples, sets and dicts of them.
        arrays: list to append to.

    Raises:
        NotPlainError: if it holds anything else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"scalar": value.dtype.name, "value": value.item()}
    name = getattr(value, "__name__", "")
    if name and getattr(keras.ops, name, None) is value:
        return {"op": name}
    if isinstance(value, (np.ndarray, jax.Array)):
        if not getattr(value, "is_fully_addressable", True) or value.dtype == object:
            raise NotPlainError(type(value).__name__)
        # A step may reuse the memory of an array of JAX.
        arrays.append(np.array(value) if isinstance(value, jax.Array) else value)
        return {"array": len(arrays) - 1}
    if type(value) in (list, tuple, set):
        return {type(value).__name__: [to_json(each, arrays) for each in value]}
    if type(value) is dict:
        return {"dict": [[to_json(key, arrays), to_json(each, arrays)] for key, each in value.items()]}
    raise NotPlainError(type(value).__name__)


def from_json(content: Any, arrays: list[Array]) -> Any:
    """Returns the value of which `to_json` has returned `content`."""
    if not isinstance(content, dict):
        return content
    kind = next(iter(content))
    if kind == "scalar":
        return np.dtype(content["scalar"]).type(content["value"])
    if kind == "op":
        return getattr(keras.ops, content["op"])
    if kind == "array":
        return arrays[content["array"]]
    if kind == "dict":
        return {from_json(key, arrays): from_json(each, arrays) for key, each in content["dict"]}
    return {"list": list, "tuple": tuple, "set": set}[kind](from_json(each, arrays) for each in content[kind])
