"""Files of a model that several processes use together: one of them writes, and all wait for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import keras
from jax import numpy as jnp

from keras_rs_contrib import _keras, processes

F = TypeVar("F", bound=Callable[..., Any])


def in_one_process(method: F) -> F:
    """Decorates a method of a model that writes files: one process runs it, with the whole value of each variable.

    The others exchange their parts of the variables, wait, and return `None`. If it fails, it fails in all processes.
    """

    @functools.wraps(method)
    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        if processes.num_processes() == 1:
            return method(self, *args, **kwargs)
        with processes.in_step(method.__name__):
            return in_first_process(self, *args, **kwargs)

    def in_first_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.refresh_before_saving()
        optimizer = getattr(self, "optimizer", None)
        variables = {id(each): each for each in [*self.variables, *(optimizer.variables if optimizer else [])]}
        is_writer, whole = processes.is_first(), []
        for variable in variables.values():
            if _keras.has_value(variable):
                value = processes.to_host(variable.value)
                if is_writer:
                    whole.append((variable, jnp.asarray(value)))
        result, error = None, None
        if is_writer:
            in_force = keras.distribution.distribution()
            # As in a program with one process.
            keras.distribution.set_distribution(None)
            try:
                with _keras.holding(whole):
                    result = method(self, *args, **kwargs)
            except Exception as caught:
                error = caught
            finally:
                keras.distribution.set_distribution(in_force)
        processes.raise_alike(error)
        return result

    return cast(F, once)
