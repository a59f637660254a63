"""What the processes of one training agree on. With one process, nothing is exchanged."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax.experimental import multihost_utils

from keras_rs_contrib import processes

# Steps between two exchanges of what a process may know alone: a signal, or the time. Each one waits for the devices.
STEPS_BETWEEN_EXCHANGES = 16


def check_distribution() -> None:
    """Raises `ValueError` if this process is one of several, and the distribution in force has not all of them."""
    if jax.process_count() > 1 and processes.num_processes() == 1:
        raise ValueError(
            "Checkpoints are written by all processes together. Received: "
            f"{jax.process_count()} processes, and a model that is in one of them. Set a distribution over the devices "
            "of all processes, such as `keras.distribution.DataParallel()`."
        )


def say(message: str) -> None:
    """Prints a line, in one process."""
    if processes.is_first():
        print(message, flush=True)


def of_first(value: Any) -> Any:
    """Returns what the first process passes, in all processes, which must all call it."""
    return processes.gather(value)[0]


def largest(value: int) -> int:
    """Returns the largest of the values that the processes pass, which must all call it."""
    return max(processes.gather(value))  # type: ignore[no-any-return]


def own_or_first(values: list[Any]) -> Any:
    """Returns the value of this process in a list of those of all processes, or the first if there were fewer or more.

    Args:
        values: one for each process that has written them.
    """
    return values[jax.process_index()] if len(values) == processes.num_processes() > 1 else values[0]


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
