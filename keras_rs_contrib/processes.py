"""Several processes that use one model together: which rows of a batch are whose, and what all of them must know.

All processes run the same program. Functions that exchange something wait until each process has called them.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import pickle
import random
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Values of up to this many bytes need one exchange, and others two.
NUM_SHORT = 4096
NUM_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of each batch that the devices of this process hold.

    Attributes:
        number: which part it is, from 0.
        count: the number of parts. Processes that only split tables, and not batches, hold the same part.
        num_replicas: the number of devices over which the part is split.
    """

    number: int
    count: int
    num_replicas: int

    def rows(self, num_rows: int) -> slice:
        """Returns which rows of a batch belong to the part.

        Args:
            num_rows: the number of rows of the batch, divisible by the number of replicas.
        """
        size = num_rows // self.count
        return slice(self.number * size, (self.number + 1) * size)


def mesh_in_force() -> Mesh | None:
    """Returns the mesh of the distribution in force, or `None` without one."""
    distribution = keras.distribution.distribution() if keras.backend.backend() == "jax" else None
    return None if distribution is None or distribution.device_mesh is None else distribution.device_mesh.backend_mesh


def num_processes() -> int:
    """Returns the number of processes whose devices the mesh in force has, 1 without a distribution.

    Raises:
        ValueError: if these are neither one process nor all of them.
    """
    mesh = mesh_in_force()
    return 1 if mesh is None else _num_processes(mesh)


@functools.lru_cache(maxsize=8)
def _num_processes(mesh: Mesh) -> int:
    number = len({device.process_index for device in mesh.devices.flat})
    if 1 < number < jax.process_count():
        raise ValueError(
            "A mesh must have devices of all processes, or of one. Received: "
            f"a mesh with devices of {number} of {jax.process_count()} processes. Create it from `jax.devices()`, or "
            "from `jax.local_devices()` for a model in each process."
        )
    return number


def is_first() -> bool:
    """Returns whether this process writes files, prints, and shows progress bars: one process of each model does."""
    return num_processes() == 1 or jax.process_index() == 0


def verbosity(verbose: Any) -> Any:
    """Returns `verbose` of Keras in the process that prints, and 0 in the others."""
    return verbose if is_first() else 0


def have_own_data() -> bool:
    """Returns whether each of several processes has its own part of the data: `auto_shard_dataset=False`.

    Otherwise, all processes have the same data.
    """
    return num_processes() > 1 and not keras.distribution.distribution().auto_shard_dataset


def part_of_batch() -> Part:
    """Returns which part of each batch belongs to this one of several processes.

    Raises:
        ValueError: if the devices of a process are not neighbors along the axis of the batch.
    """
    mesh = mesh_in_force()
    assert mesh is not None
    return _part_of_batch(mesh, _batch_axis())


def _batch_axis() -> str:
    return str(keras.distribution.distribution().batch_dim_name)


@functools.lru_cache(maxsize=8)
def _part_of_batch(mesh: Mesh, axis: str) -> Part:
    along_batch = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    along_batch = along_batch.reshape(len(along_batch), -1)
    places: dict[int, list[int]] = {}
    for place, devices in enumerate(along_batch):
        for process in sorted({device.process_index for device in devices}):
            places.setdefault(process, []).append(place)
    own = places.get(jax.process_index(), [])
    size = len(own)
    for process, each in places.items():
        if len(each) != size or each[0] % size or each != list(range(each[0], each[0] + size)):
            raise ValueError(
                f"The devices of each process must be neighbors along the mesh axis {axis!r} of the batch, and equally "
                f"many. Received: process {process} at {each} of {len(along_batch)} places. Create the mesh from "
                "`jax.devices()` in their order."
            )
    return Part(own[0] // size, len(along_batch) // size, size)


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of the processes, in each of them.

    Args:
        value: any value that can be pickled.

    Raises:
        Exception: the error of another process that has failed meanwhile: see `in_step`.
        RuntimeError: if the processes are within different methods.
    """
    if num_processes() == 1:
        return [value]
    if _state.noted is not None:
        error, _state.noted = _state.noted, None
        tell(error)
        raise error
    return _values(_exchange(None, value))


class _Message(NamedTuple):
    """What a process sends in an exchange.

    Attributes:
        methods: the names of the methods in which it is.
        failure: what `describe` returns of the error with which it leaves them, or `None`.
        value: any value that can be pickled.
    """

    methods: tuple[str, ...]
    failure: tuple[str, str] | None
    value: Any


class _State:
    """What this process knows of its exchanges.

    Attributes:
        methods: the names of the methods in which it is, the outermost first.
        noted: an error that the others do not know yet, or `None`.
    """

    def __init__(self) -> None:
        self.methods: list[str] = []
        self.noted: Exception | None = None


_state = _State()
# An attribute of errors that all processes raise.
SHARED = "_is_raised_in_all_processes"


def _exchange(failure: tuple[str, str] | None, value: Any) -> list[_Message]:
    wait_for_programs()
    sent = np.frombuffer(pickle.dumps(tuple(_Message(tuple(_state.methods), failure, value))), "uint8")
    length = np.frombuffer(len(sent).to_bytes(NUM_LENGTH, "little"), "uint8")
    starts = multihost_utils.process_allgather(np.concatenate([length, _padded(sent[:NUM_SHORT], NUM_SHORT)]))
    lengths = [int.from_bytes(each[:NUM_LENGTH].tobytes(), "little") for each in starts]
    parts = [starts[:, NUM_LENGTH:]]
    longest = max(lengths) - NUM_SHORT
    if longest > 0:
        # Each power of two is compiled once.
        parts.append(multihost_utils.process_allgather(_padded(sent[NUM_SHORT:], 1 << (longest - 1).bit_length())))
    rows = zip(np.hstack(parts), lengths, strict=True)
    return [_Message(*pickle.loads(row[:length].tobytes())) for row, length in rows]


def _values(messages: list[_Message]) -> list[Any]:
    """Returns the values in messages, or raises an error in all processes that have not raised theirs."""
    raise_first(None, [each.failure for each in messages])
    for process, each in enumerate(messages):
        if each.methods != messages[0].methods:
            places = [" in ".join(f"`{name}`" for name in reversed(one.methods)) for one in (messages[0], each)]
            raise _shared(
                RuntimeError(
                    "All processes must call the same methods in the same order. Received: "
                    f"{places[0] or 'none'} in process 0, and {places[1] or 'none'} in process {process}. "
                    "Call each method in all processes."
                )
            )
    return [each.value for each in messages]


def _padded(data: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    return np.pad(data, (0, size - len(data)))


@contextlib.contextmanager
def in_step(method: str) -> Iterator[None]:
    """Lets all processes leave the body of `with` together: if one of them raises an error, all do.

    The body may exchange values. A process that fails tells the others in their next exchange, at the latest in the one
    at the end. Errors of the JAX runtime are not told: the others may be waiting in the program that has failed.

    Args:
        method: the name of the method whose body it is.

    Raises:
        Exception: of the same type, if it is a built-in one, and otherwise `RuntimeError`, in the other processes.
    """
    if num_processes() == 1:
        yield
        return
    _state.methods.append(method)
    try:
        yield
        gather(None)
    except Exception as error:
        if not hasattr(error, SHARED) and not _is_of_runtime(error):
            tell(error)
        raise
    finally:
        _state.methods.pop()
        if not _state.methods:
            # A program may have failed before an exchange could raise it.
            _state.noted = None


def _is_of_runtime(error: Exception) -> bool:
    """Returns whether a program has failed, as it does if another process has ended."""
    # On CPUs, JAX raises some as `ValueError`.
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def tell(error: Exception) -> None:
    """Tells the other processes, in their next exchange, that this one raises an error."""
    _shared(error)
    _exchange(describe(error), None)


def note(error: Exception) -> None:
    """Lets the next exchange of this process raise an error, in all of them.

    Until then, it must do all that the others do: they may be waiting for it in a program.
    """
    if _state.noted is None:
        _state.noted = error


def _shared(error: Exception) -> Exception:
    with contextlib.suppress(AttributeError):
        setattr(error, SHARED, True)
    return error


@contextlib.contextmanager
def failing_alike() -> Iterator[None]:
    """Raises an error in all processes if the body of `with` raises one in any of them.

    The body must not exchange anything: the others would wait for a process that has failed.

    Raises:
        Exception: of the same type, if it is a built-in one, and otherwise `RuntimeError`, in the other processes.
    """
    if num_processes() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_alike(error)


def raise_alike(error: Exception | None) -> None:
    """Raises an error in all processes if one of them passes an error.

    Args:
        error: the error of this process, or `None`.
    """
    if error is None:
        gather(None)
        return
    if num_processes() > 1:
        tell(error)
    raise error


def describe(error: Exception | None) -> tuple[str, str] | None:
    """Returns the type and the message of an error, to be exchanged."""
    return None if error is None else (type(error).__name__, str(error))


def raise_first(error: Exception | None, described: list[tuple[str, str] | None]) -> None:
    """Raises the error of this process, or the first one of another process.

    Args:
        error: the error of this process, or `None`.
        described: what `describe` returns, for each process.
    """
    if error is not None:
        raise _shared(error)
    for process, each in enumerate(described):
        if each is not None:
            kind = getattr(builtins, each[0], RuntimeError)
            has_message = isinstance(kind, type) and issubclass(kind, (ValueError, TypeError, OSError, ImportError))
            kind = RuntimeError if not has_message or issubclass(kind, UnicodeError) else kind
            raise _shared(kind(f"Process {process} has failed: {each[0]}: {each[1]}"))


def own_slice(numbers: Sequence[int]) -> slice:
    """Returns where the rows of this process are among those of all processes, one after the other.

    Args:
        numbers: the number of rows of each process.
    """
    stops = np.cumsum([0, *numbers])
    return slice(int(stops[jax.process_index()]), int(stops[jax.process_index() + 1]))


def check_same(what: str, data: Any) -> None:
    """Raises `ValueError` in all processes if they are about to process different data as if it were the same.

    Args:
        what: name of the data in the error message, in the plural.
        data: any value that can be pickled, of which a checksum travels.
    """
    if num_processes() == 1:
        return
    found = gather(zlib.crc32(pickle.dumps(data)))
    for process, each in enumerate(found):
        if each != found[0]:
            raise ValueError(different(what, process))


def share_random_state() -> None:
    """Sets the global random generators of Python and NumPy in all processes to the state of those in the first one.

    Keras shuffles by them. A process that has drawn other numbers would read its rows from other batches.
    """
    state = (random.getstate(), np.random.get_state())  # noqa: NPY002
    python_state, numpy_state = gather(state if is_first() else None)[0]
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002


def different(what: str, process: int) -> str:
    """Returns the error message for data that differ between processes."""
    return (
        f"All processes must pass the same {what}, if `auto_shard_dataset` of the distribution is true. Received: "
        f"others in process {process} than in process 0. Use the same seeds and files in all processes, or, if each "
        "has its own part of the data, `DataParallel(auto_shard_dataset=False)`."
    )


def to_host(array: Any) -> np.ndarray[Any, Any]:
    """Returns an array as a NumPy array. If it spans several processes, they exchange its parts."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    wait_for_programs()
    result: np.ndarray[Any, Any] = multihost_utils.process_allgather(array, tiled=True)
    return result


def wait_for_programs() -> None:
    """Waits on CPUs until all programs that this one of several processes has started are done.

    Accelerators run them one after the other. CPUs run those that do not depend on each other at the same time, in
    another order in each process, so that one would receive what another program has sent.
    """
    mesh = mesh_in_force()
    if mesh is not None and num_processes() > 1 and mesh.devices.flat[0].platform == "cpu":
        for array in jax.live_arrays():
            # Those that a step has been given, and failed ones, which fail again when they are used.
            with contextlib.suppress(RuntimeError):
                array.block_until_ready()


def own_rows(array: Any) -> np.ndarray[Any, Any]:
    """Returns the rows of a result that belong to the part of the batch of this process, `[own_rows, ...]`.

    Args:
        array: `[batch, ...]`, with a row for each row of a batch.
    """
    mesh = mesh_in_force()
    assert mesh is not None
    if isinstance(array, jax.Array) and not array.is_fully_replicated:
        by_batch = NamedSharding(mesh, PartitionSpec(_batch_axis()))
        if array.sharding.is_equivalent_to(by_batch, array.ndim):
            shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
            return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
    return to_host(array)[part_of_batch().rows(array.shape[0])]


def on_all_devices(array: np.ndarray[Any, Any]) -> Any:
    """Returns an array that all processes have as an array on all devices of the mesh in force, without an exchange."""
    mesh = mesh_in_force()
    assert mesh is not None
    sharding = NamedSharding(mesh, PartitionSpec())
    array = np.asarray(array)
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
