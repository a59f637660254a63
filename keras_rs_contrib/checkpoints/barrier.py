"""Where the threads that write a checkpoint in each of several processes wait for one another."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from typing import Any

import jax

# JAX has no public function for values that threads exchange while programs run.
from jax._src import distributed

from keras_rs_contrib import processes

_NUMBERS = itertools.count()


class Barrier:
    """Lets all processes pass together, or none of them if one has failed.

    At JAX's own barrier, the others would wait for a process that has failed until their time is over.

    The threads meet at the service to which all processes are connected. Each meeting of a checkpoint has a number. The
    first process waits until the others have come, and tells them whether they pass.
    """

    def __init__(self) -> None:
        self._client: Any = distributed.global_state.client
        self._count = jax.process_count()
        self._own = jax.process_index()
        self._checkpoint = ""
        self._meeting = 0

    def begin(self) -> None:
        """Begins a checkpoint. All processes call it, none of which is at a meeting."""
        if self._checkpoint and not self._own:
            self._client.key_value_delete(self._checkpoint)
        # The same in all processes, and new to the service.
        self._checkpoint = f"keras_rs_contrib/checkpoints/{processes.gather(next(_NUMBERS))[0]}"
        self._meeting = 0

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes. Orbax passes the arguments by these names.

        Args:
            key: not used: all processes meet in the same order.
            timeout_ms: milliseconds after which an error is raised.

        Raises:
            OSError: if a process has failed, in all of them.
            jax.errors.JaxRuntimeError: if the time is over.
        """
        end = time.monotonic() + timeout_ms / 1000
        if self._own:
            self._tell(self._own, None)
            failure = self._told(0, end)
        else:
            told = (self._told(process, end) for process in range(1, self._count))
            failure = next((each for each in told if each is not None), None)
            self._tell(0, failure)
        if failure is not None:
            raise OSError(failure)
        self._meeting += 1

    def fail(self, error: BaseException) -> None:
        """Tells the others, at their next meeting, that this process has failed."""
        # It may have told them already.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell(self._own, f"Process {self._own} has failed: {type(error).__name__}: {error}")

    def _key(self, process: int) -> str:
        return f"{self._checkpoint}/{self._meeting}/{process}"

    def _tell(self, process: int, failure: str | None) -> None:
        self._client.key_value_set(self._key(process), json.dumps(failure))

    def _told(self, process: int, end: float) -> str | None:
        remaining = max(1, int(1000 * (end - time.monotonic())))
        failure: str | None = json.loads(self._client.blocking_key_value_get(self._key(process), remaining))
        return failure
