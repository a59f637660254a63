"""Use of one model by several threads: many may read its weights at once, and one alone may change or take them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import keras

from keras_rs_contrib import processes

F = TypeVar("F", bound=Callable[..., Any])

# A step may be traced in these, and one of several processes may call them alone.
WITHOUT_EXCHANGE = ("__call__", "get_weights")


class Access:
    """Lets threads take turns with a model.

    `fit`, `evaluate` and `predict` of Keras on JAX take the values out of all variables and put them back at their end.
    Until then, no other thread may use the model. Threads that only read the weights do not wait for one another.

    A distribution is in force in the thread that has set it. The methods of a model run under the distribution under
    which the model was created, in whichever thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: Counter[int] = Counter()
        self._owner: int | None = None
        self._is_training = False
        self._distribution = keras.distribution.distribution()
        self._creator = threading.get_ident()

    @property
    def is_owner(self) -> bool:
        """Whether this thread uses the model alone."""
        return self._owner == threading.get_ident()

    @contextlib.contextmanager
    def shared(self, method: str) -> Iterator[None]:
        """Keeps others from taking the weights, within `with`.

        Args:
            method: name of the method that needs it, for errors.

        Raises:
            RuntimeError: if another thread is training the model.
        """
        thread = threading.get_ident()
        with self._changed:
            is_owner = self._owner == thread
            if not is_owner and not self._readers[thread]:
                self._wait(lambda: self._owner is None, method)
            self._readers[thread] += not is_owner
        try:
            with self._in_force():
                yield
        finally:
            with self._changed:
                self._readers[thread] -= not is_owner
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self, method: str) -> Iterator[None]:
        """Keeps others from using the model, within `with`. A thread that reads the weights lends them meanwhile.

        Args:
            method: name of the method that needs it, for errors. Others do not wait for `"fit"`.

        Raises:
            RuntimeError: if another thread is training the model.
        """
        thread = threading.get_ident()
        with self._changed:
            if is_owner := self._owner == thread:
                own_reads = 0
            else:
                own_reads, self._readers[thread] = self._readers[thread], 0
                self._changed.notify_all()
                try:
                    self._wait(lambda: self._owner is None and not any(self._readers.values()), method)
                except BaseException:
                    self._readers[thread] = own_reads
                    raise
                self._owner, self._is_training = thread, method == "fit"
        try:
            with self._in_force():
                yield
        finally:
            if not is_owner:
                with self._changed:
                    self._owner, self._is_training = None, False
                    self._readers[thread] = own_reads
                    self._changed.notify_all()

    def _wait(self, is_free: Callable[[], bool], method: str) -> None:
        while not is_free():
            if self._is_training:
                raise RuntimeError(
                    "A model cannot be used while another thread trains it. Received: "
                    f"`{method}` during `fit`. Wait for the end of `fit`, or use a copy: `copy.deepcopy(model)`."
                )
            self._changed.wait()

    def _in_force(self) -> contextlib.AbstractContextManager[Any]:
        is_lost = self._distribution is not None and keras.distribution.distribution() is None
        if is_lost and threading.get_ident() != self._creator:
            return self._distribution.scope()  # type: ignore[no-any-return]
        return contextlib.nullcontext()


def shared(method: F) -> F:
    """Decorates a method of a model that only reads the weights, unless it has to create them."""

    @functools.wraps(method)
    def taking_turns(self: Any, *args: Any, **kwargs: Any) -> Any:
        access = self._access.shared if self.is_built else self._access.alone
        if self._access.is_owner and self.lacks_values:
            raise RuntimeError(
                "Keras takes the weights out of a model for the batches of an epoch. Received: "
                f"`{method.__name__}` between them. Call it in `on_epoch_end` of a callback, or after `fit`."
            )
        with access(method.__name__), _in_step(method.__name__):
            return method(self, *args, **kwargs)

    return cast(F, taking_turns)


def alone(method: F) -> F:
    """Decorates a method of a model that changes the weights, or takes them out of the variables."""

    @functools.wraps(method)
    def taking_turns(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._access.alone(method.__name__), _in_step(method.__name__):
            return method(self, *args, **kwargs)

    return cast(F, taking_turns)


def _in_step(method: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if method in WITHOUT_EXCHANGE else processes.in_step(method)
