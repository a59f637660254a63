"""What the processes of one training agree on. With one process, nothing is exchanged."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Steps between two exchanges of what a process may know alone: a signal, or the time. Each one waits for the devices.
STEPS_BETWEEN_EXCHANGES = 16


def is_first() -> bool:
    """Returns whether this process writes files and prints."""
    return bool(jax.process_index() == 0)


def are_several() -> bool:
    """Returns whether the training has more than one process."""
    return bool(jax.process_count() > 1)


def say(message: str) -> None:
    """Prints a line, in one process."""
    if is_first():
        print(message, flush=True)


def of_first(value: Any) -> Any:
    """Returns what the first process passes, in all processes, which must all call it.

    Args:
        value: anything that JSON can hold. Ignored in other processes.
    """
    if not are_several():
        return value
    content = np.frombuffer(json.dumps(value).encode(), "uint8") if is_first() else np.empty(0, "uint8")
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(length, "uint8")
    padded[: len(content)] = content[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def largest(value: int) -> int:
    """Returns the largest of the values that the processes pass, which must all call it."""
    return int(np.max(multihost_utils.process_allgather(np.int32(value)))) if are_several() else value


def is_preempted(step: int) -> bool:
    """Returns whether JAX has noticed that the machines are about to be taken away, the same in all processes.

    Args:
        step: the number of the step, which grows. JAX lets the processes agree on one of these numbers.
    """
    # It raises an error unless `jax.distributed` has started its service.
    with contextlib.suppress(RuntimeError):
        return bool(multihost_utils.reached_preemption_sync_point(step))
    return False


def has_preemption_service() -> bool:
    """Returns whether JAX handles SIGTERM itself, as a notice of preemption for all processes."""
    return bool(jax.distributed.is_initialized()) and bool(getattr(jax.config, "jax_enable_preemption_service", False))
