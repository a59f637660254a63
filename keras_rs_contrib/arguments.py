"""Checks of arguments that several layers and metrics share."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import keras
import numpy as np
from keras import ops

from keras_rs_contrib.processes import to_host

P = ParamSpec("P")
R = TypeVar("R")


def positive_int(value: Any, name: str) -> int:
    """Returns `value` as an int, or raises `ValueError` if it is not a positive integer."""
    return _int_of(value, name, 1, "a positive int")


def non_negative_int(value: Any, name: str) -> int:
    """Returns `value` as an int, or raises `ValueError` if it is not an integer of at least 0."""
    return _int_of(value, name, 0, "an int of at least 0")


def _int_of(value: Any, name: str, least: int, what: str) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}. Pass {least} or more.")
    return int(value)


def check_type(name: str, value: Any, kind: type, optional: bool = False) -> None:
    """Raises `TypeError` if `value` is not a `kind`. If `optional`, `None` is also valid."""
    if isinstance(value, kind) or (optional and value is None):
        return
    raise TypeError(
        f"`{name}` must be a `{kind.__name__}`. Received: {value!r} (of type {type(value).__name__}). "
        "Pass an instance of this class."
    )


def check_can_train(method: str) -> None:
    """Raises `NotImplementedError` if the backend is not JAX, for a method that trains."""
    backend = keras.backend.backend()
    if backend != "jax":
        raise NotImplementedError(
            f"Training needs the JAX backend. Received: {method} on {backend!r}. Set KERAS_BACKEND=jax to train; "
            "the saved model answers requests on TensorFlow too."
        )


def differ(first: int | None, second: int | None) -> bool:
    """Returns whether two dimensions are known and different."""
    return first is not None and second is not None and first != second


def is_known(array: Any) -> bool:
    """Returns whether the values of an array or a list are known on the host.

    They are not known while a function is traced for compilation.
    """
    if isinstance(array, (keras.KerasTensor, jax.core.Tracer)):
        return False
    if isinstance(array, jax.Array):
        return True
    return keras.backend.backend() == "jax" or not ops.is_tensor(array) or hasattr(array, "numpy")


def on_host(array: Any) -> np.ndarray[Any, Any]:
    """Returns an array, a tensor, a variable or a list, whose values are known, as a NumPy array.

    If it spans several processes, all of them have to call this.
    """
    if keras.backend.backend() == "jax":
        return to_host(array.value if isinstance(array, keras.Variable) else array)
    return ops.convert_to_numpy(array) if ops.is_tensor(array) else np.asarray(array)


def known_values(array: Any) -> np.ndarray[Any, Any] | None:
    """Returns the values of an array or a list, or `None` if they are not known."""
    return on_host(array) if is_known(array) else None


def check_sample_weight(sample_weight: Any, is_present: Any = None) -> None:
    """Raises `ValueError` if the values of `sample_weight` are known and one of them is negative or not finite.

    Args:
        sample_weight: `[num_rows]` float weights.
        is_present: bool, with a value for each row, which further values may follow; rows with False may have any
            weight. `None` for no such rows.
    """
    weights = known_values(sample_weight)
    if weights is None:
        return
    present: np.ndarray[Any, Any] | None = np.ones(len(weights)) if is_present is None else known_values(is_present)
    if present is None:
        return
    weights, present = weights.astype("float32"), present[: len(weights)].astype(bool)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)) & present)
    if wrong.size:
        raise ValueError(
            "`sample_weight` must be finite and at least 0. Received: "
            f"{weights[wrong[0]]} for row {wrong[0]}. Use 0 for a row that does not count."
        )


def explains_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that has keyword-only parameters: an argument too many by position raises a clear error."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check_positional(function, len(args))
        return function(*args, **kwargs)

    # Keras reads the signature of constructors in a way that does not see through decorators.
    checked.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return checked


def check_positional(function: Callable[..., Any], num_given: int) -> None:
    """Raises `TypeError` if a function that has keyword-only parameters gets too many arguments by position.

    Args:
        function: function or method, such as `Layer.call`, as its class holds it.
        num_given: number of arguments that were passed by position, including `self`.

    Raises:
        TypeError: with the names of the keyword-only parameters.
    """
    positional, keyword_only = _parameters(function)
    if not keyword_only or positional is None or num_given <= len(positional):
        return
    num_bound = int(positional[:1] == ("self",))
    owner = function.__qualname__.removesuffix(".__init__").removesuffix(".call")
    names = [f"`{name}`" for name in positional[num_bound:]]
    names = [", ".join(names[:-1]), *names[-1:]] if len(names) > 2 else names
    raise TypeError(
        f"`{owner}` takes only {' and '.join(names)} by position. "
        f"Received: {num_given - num_bound} arguments by position. "
        f"Name the others: {', '.join(f'`{name}=`' for name in keyword_only)}."
    )


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Returns the positional parameters, or `None` if there is no limit, and the keyword-only ones."""
    parameters = inspect.signature(function).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    is_limited = all(p.kind != p.VAR_POSITIONAL for p in parameters)
    return positional if is_limited else None, tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY)
