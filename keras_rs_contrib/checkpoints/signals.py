"""SIGTERM and SIGINT during training: the first lets the step finish, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from keras_rs_contrib.checkpoints import agreement


class StopSignals:
    """Notes the first signal that asks the training to stop.

    Python runs the handlers in its main thread. A `fit` in another thread leaves the signals alone.

    Args:
        is_running: whether the training is running, given the function that the signal has interrupted. Keras does not
            tell a callback that `fit` has failed.

    Attributes:
        received: the number of the signal, or `None`.
    """

    def __init__(self, is_running: Callable[[types.FrameType | None], bool]) -> None:
        self.received: int | None = None
        self._is_running = is_running
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Begins to handle the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            # JAX notices SIGTERM itself, and lets the processes agree on the step.
            if number == signal.SIGTERM and agreement.has_preemption_service():
                continue
            # A handler that Python has not installed could not be restored, and an ignored signal remains ignored.
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._previous.items():
            # Another handler may have been installed since.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if not self._is_running(frame):
            self.restore()
            signal.raise_signal(number)
        elif self.received is None:
            self.received = number
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + number)
