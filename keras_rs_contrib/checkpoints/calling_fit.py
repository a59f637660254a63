"""The `fit` that calls a callback: its arguments, its other callbacks, and whether it is still running."""

from __future__ import annotations

import dataclasses
import inspect
import math
import threading
import types
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class CallingFit:
    """A call of `fit`.

    Keras tells a callback neither the other callbacks nor the data, and not that `fit` has failed. All of this is
    visible in the functions that are being called, by the names of the arguments of `fit`.

    Attributes:
        callbacks: all callbacks of the call.
        data: what the training batches are read from.
        num_batches: the number of batches in the data, or `None` if it is unknown or infinite.
        steps_per_epoch: the argument of `fit`, or the limit of `keras.config.set_max_steps_per_epoch`.
    """

    callbacks: keras.callbacks.CallbackList
    data: Any
    num_batches: int | None
    steps_per_epoch: int | None
    _code: types.CodeType
    _thread: int

    @property
    def reads_on(self) -> bool:
        """Whether an epoch goes on reading the data where the last one has ended."""
        return self.steps_per_epoch is not None and self.num_batches is None

    def is_running(self, frame: types.FrameType | None = None) -> bool:
        """Returns whether the call has not ended.

        Args:
            frame: the innermost function of the thread that has called `fit`. By default, that of this thread.
        """
        if frame is None and threading.get_ident() != self._thread:
            return any(thread.ident == self._thread for thread in threading.enumerate())
        frame = frame or inspect.currentframe()
        while frame is not None:
            # The frame itself would keep the data alive.
            if frame.f_code is self._code and frame.f_locals.get("callbacks") is self.callbacks:
                return True
            frame = frame.f_back
        return False


def calling_fit() -> CallingFit:
    """Returns the `fit` that is calling a callback in this thread.

    Raises:
        RuntimeError: if there is none.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), keras.callbacks.CallbackList):
        frame = frame.f_back
    callbacks = None if frame is None else frame.f_locals["self"]
    while frame is not None and frame.f_locals.get("callbacks") is not callbacks:
        frame = frame.f_back
    if frame is None or callbacks is None:
        raise RuntimeError(
            "`TrainingCheckpoint` resumes `fit`. Received: a call from elsewhere. Pass it to `fit`, as a callback."
        )
    arguments = frame.f_locals
    steps = arguments.get("steps_per_epoch")
    steps = min((each for each in (steps, keras.config.max_steps_per_epoch()) if each), default=None)
    return CallingFit(
        callbacks=callbacks,
        data=arguments.get("x"),
        num_batches=_num_batches(arguments.get("x"), arguments.get("batch_size"), steps),
        steps_per_epoch=steps,
        _code=frame.f_code,
        _thread=threading.get_ident(),
    )


def _num_batches(data: Any, batch_size: int | None, steps: int | None) -> int | None:
    """Returns the number of batches in what `fit` takes, or `None` if it is unknown or infinite."""
    if hasattr(data, "num_batches"):
        number = data.num_batches
    elif hasattr(data, "cardinality"):
        number = int(data.cardinality())
    else:
        arrays = [array for array in keras.tree.flatten(data) if getattr(array, "shape", ())]
        if not arrays:
            return None
        num_rows = int(arrays[0].shape[0])
        # As Keras chooses it.
        batch_size = batch_size or (math.ceil(num_rows / steps) if steps else 32)
        number = math.ceil(num_rows / batch_size)
    return None if number is None or number < 0 else int(number)
