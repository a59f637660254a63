"""A copy of a state, in memory that is used again, so that training goes on while the state is written."""

from __future__ import annotations

import collections
from typing import Any

import jax
from jax import lax


class Snapshot:
    """Copies arrays on CPUs, into the memory of the last copy.

    While an array is written, a step cannot reuse its memory, and must find as much that is new. The first use of new
    memory takes a CPU several times as long as the copy.
    """

    def __init__(self) -> None:
        self._copies: list[Any] = []
        self._shardings: list[Any] = []
        self._programs: list[tuple[list[int], Any]] = []

    def of(self, values: list[Any]) -> list[Any]:
        """Returns copies of arrays with the same shardings. They are valid until the next call.

        Args:
            values: arrays on CPUs, of the same shapes and dtypes in each call.
        """
        shardings = [value.sharding for value in values]
        if self._copies and shardings == self._shardings:
            copies, self._copies = self._copies, []
            for numbers, program in self._programs:
                new = program([copies[number] for number in numbers], [values[number] for number in numbers])
                for number, array in zip(numbers, new, strict=True):
                    copies[number] = array
            self._copies = copies
        else:
            # Arrays that are put on devices explicitly, as those that the programs return: JAX compiles them once.
            self._copies = [jax.device_put(value.copy(), value.sharding) for value in values]
            self._shardings = shardings
            self._programs = _programs(shardings)
        return jax.block_until_ready(self._copies)  # type: ignore[no-any-return]


def are_on_cpus(values: list[Any]) -> bool:
    """Returns whether all arrays are on CPUs."""
    return all(device.platform == "cpu" for value in values for device in value.sharding.device_set)


def _programs(shardings: list[Any]) -> list[tuple[list[int], Any]]:
    """Returns programs that copy, each with the numbers of its arrays: a program runs on one set of devices."""
    places = collections.defaultdict(list)
    for number, sharding in enumerate(shardings):
        places[frozenset(sharding.device_set)].append(number)
    return [
        (
            numbers,
            jax.jit(_copy, donate_argnums=0, keep_unused=True, out_shardings=[shardings[number] for number in numbers]),
        )
        for numbers in places.values()
    ]


def _copy(_: list[Any], values: list[Any]) -> list[Any]:
    """Returns copies, for which JAX takes the memory of the first argument."""
    # Without a barrier, JAX returns the same arrays.
    return lax.optimization_barrier(values)  # type: ignore[no-any-return]
