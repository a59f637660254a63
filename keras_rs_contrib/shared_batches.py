"""Batches that several processes feed together: how they agree on sizes, and which rows each of them takes."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_rs_contrib import processes
from keras_rs_contrib.batch_padding import batch_length

# Batches whose sizes are agreed on in one exchange.
MAX_AHEAD = 16

Batch = tuple[Any, Any, Any]


def agree(
    batches: Iterator[Batch],
    max_ahead: int = MAX_AHEAD,
    column_padding: dict[str, Any] | None = None,
) -> Iterator[tuple[Batch, int, int]]:
    """Yields the batches of this process, as many as the process with the most has, or raises in all processes.

    Errors while batches are read, differences between batches that must be equal, and different types of batches are
    errors in all processes before the first batch of an exchange is used.

    Args:
        batches: `(x, y, sample_weight)`, read by this process.
        max_ahead: how many batches may be read before the first of them is used.
        column_padding: what fills the missing columns of features whose width differs between processes, by name.

    Yields:
        A batch, its number of rows, and the largest number of rows that a process has in this step. A process whose
        data have ended gets batches without rows.
    """
    has_own_data, num_read = processes.have_own_data(), 0
    empty: Batch | None = None
    part = processes.part_of_batch()
    number = part.number if has_own_data else 0
    # Whether another process reads the same data.
    is_shared = not has_own_data or part.count < processes.num_processes()
    while True:
        num_ahead = min(max(num_read, 1), max_ahead)
        block: list[Batch] = []
        sizes: list[int] = []
        error = None
        try:
            for batch in itertools.islice(batches, num_ahead):
                sizes.append(batch_length(batch))
                block.append(batch)
        except Exception as caught:
            error = caught
        described = [
            (size, _fingerprint(batch) if is_shared else 0, _widths(batch))
            for size, batch in zip(sizes, block, strict=True)
        ]
        kind = None if num_read or not block else _without_rows(block[0])
        found = processes.gather((processes.describe(error), number, described, kind))
        processes.raise_first(error, [each[0] for each in found])
        by_process = [each[2] for each in found]
        _check_equal([each[1] for each in found], by_process, num_read)
        if not num_read:
            empty = _common_kind([each[3] for each in found])
        num_steps = max(map(len, by_process))
        for step in range(num_steps):
            in_step = [each[step] for each in by_process if step < len(each)]
            size, batch = (sizes[step], block[step]) if step < len(block) else (0, empty)  # type: ignore[assignment]
            if has_own_data:
                batch = _widened(batch, [widths for _, _, widths in in_step], column_padding or {})
            yield batch, size, max(size for size, _, _ in in_step)
        num_read += num_steps
        if num_steps < num_ahead:
            return


def build_alike(describe: Callable[[], Any], build: Callable[[Any], None]) -> None:
    """Builds a model in all processes, before one of them may find that its batch is invalid, or has none.

    Building exchanges values: a process that does not build would leave the others waiting.

    Args:
        describe: returns what to build for, or `None` if this process has no batch, or raises.
        build: takes the first result of all processes.
    """
    error, kind = None, None
    try:
        kind = describe()
    except Exception as caught:
        error = caught
    found = processes.gather((processes.describe(error), kind))
    processes.raise_first(error, [each[0] for each in found])
    kinds = [each[1] for each in found if each[1] is not None]
    if kinds:
        build(kinds[0])


def _arrays(batch: Batch) -> list[Any]:
    return [array for array in keras.tree.flatten(batch) if array is not None]


def _fingerprint(batch: Batch) -> int:
    result = 0
    for array in _arrays(batch):
        result = zlib.crc32(np.asarray(array).tobytes(), result)
    return result


def _widths(batch: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(array.shape[1:]) for array in _arrays(batch))


def _without_rows(batch: Batch) -> Batch:
    result: Batch = keras.tree.map_structure(
        lambda array: np.zeros((0, *array.shape[1:]), array.dtype), batch, none_is_leaf=False
    )
    return result


def _check_equal(numbers: list[int], by_process: list[list[Any]], num_before: int) -> None:
    """Raises `ValueError` if processes that hold the same part of the batches have read different ones."""
    first: dict[int, list[Any]] = {}
    for process, (number, described) in enumerate(zip(numbers, by_process, strict=True)):
        known = first.setdefault(number, described)
        if known != described:
            steps = itertools.zip_longest(known, described)
            step = next(i for i, (ours, theirs) in enumerate(steps) if ours != theirs)
            raise ValueError(processes.different(f"data (here, batch {num_before + step})", process))


def _common_kind(kinds: list[Batch | None]) -> Batch | None:
    """Returns a batch without rows of the type that all processes have read, or `None` if none has read one."""
    given = [(process, kind) for process, kind in enumerate(kinds) if kind is not None]
    if not given:
        return None
    described = [_describe(kind) for _, kind in given]
    for (process, _), each in zip(given, described, strict=True):
        if each != described[0]:
            raise ValueError(
                "The batches of all processes must have the same features and dtypes. Received: "
                f"{each} in process {process}, and {described[0]} in process {given[0][0]}. Convert them alike."
            )
    return given[0][1]


def _describe(kind: Batch) -> str:
    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: named(each) for name, each in sorted(value.items())}
        if isinstance(value, (tuple, list)):
            return [named(each) for each in value]
        return None if value is None else f"{value.dtype} of {value.ndim} dimensions"

    parts = {"features": named(kind[0]), "labels": named(kind[1]), "weights": named(kind[2])}
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)


def _widened(batch: Batch, all_widths: list[Any], column_padding: dict[str, Any]) -> Batch:
    """Returns a batch whose features have the largest width that they have in any process, or raises in all of them."""
    x, y, sample_weight = batch
    # In the order of `_arrays`.
    names: list[Any] = sorted(x) if isinstance(x, dict) else []
    names += [None] * (len(all_widths[0]) - len(names))
    needed = {}
    for name, widths in zip(names, zip(*all_widths, strict=True), strict=True):
        if len(set(widths)) > 1 and name not in column_padding:
            raise ValueError(
                "The arrays of a batch must have the same shape in all processes, but for their rows. Received: "
                f"{sorted(set(widths))} for a row of {'an array' if name is None else repr(name)}. Pad them alike."
            )
        needed[name] = tuple(map(max, *widths)) if len(widths) > 1 else widths[0]
    for name in column_padding.keys() & needed.keys():
        missing = [(0, 0), *((0, new - old) for new, old in zip(needed[name], x[name].shape[1:], strict=True))]
        x = {**x, name: np.pad(x[name], missing, constant_values=column_padding[name])}
    return x, y, sample_weight
