"""Errors of a user's callbacks: if one of several processes has one, all raise it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_rs_contrib import processes
from keras_rs_contrib.model.added_callbacks import with_callbacks

METHODS = ("train", "test", "predict")
# Between them, the processes run programs together.
BATCH_HOOKS = (
    "on_batch_begin",
    "on_batch_end",
    *(f"on_{method}_batch_{place}" for method in METHODS for place in ("begin", "end")),
)
OTHER_HOOKS = (
    "on_epoch_begin",
    "on_epoch_end",
    *(f"on_{method}_{place}" for method in METHODS for place in ("begin", "end")),
)


@contextlib.contextmanager
def callbacks_in_step(callbacks: Any) -> Iterator[None]:
    """Lets the callbacks of `fit`, `evaluate` or `predict` fail in all processes, within `with`, if one fails in one.

    An error at a batch is raised when the processes next agree on batches: until then, the others train with this one.

    Args:
        callbacks: the callbacks of a user, in any form.
    """
    if processes.num_processes() == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        for callback in {id(each): each for each in with_callbacks(callbacks)}.values():
            own = vars(callback)
            for name in (*BATCH_HOOKS, *OTHER_HOOKS):
                if name not in own and getattr(type(callback), name) is getattr(keras.callbacks.Callback, name):
                    continue
                hook = getattr(callback, name)
                # Some callbacks of Keras keep their functions in the instance.
                stack.callback(own.__setitem__ if name in own else own.pop, name, hook)
                setattr(callback, name, (_noting if name in BATCH_HOOKS else _in_step)(hook))
        yield


def _noting(hook: Callable[..., None]) -> Callable[..., None]:
    has_failed = False

    def call(*args: Any, **kwargs: Any) -> None:
        nonlocal has_failed
        if has_failed:
            return
        try:
            hook(*args, **kwargs)
        except Exception as error:
            has_failed = True
            processes.note(error)

    return call


def _in_step(hook: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        with processes.in_step("callbacks"):
            hook(*args, **kwargs)

    return call
