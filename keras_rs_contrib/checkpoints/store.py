"""The checkpoints in a folder: written in the background, complete or not there at all, and checked when read."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from keras_rs_contrib import processes
from keras_rs_contrib.checkpoints import agreement
from keras_rs_contrib.checkpoints.barrier import Barrier
from keras_rs_contrib.checkpoints.plain_values import Array
from keras_rs_contrib.checkpoints.snapshot import Snapshot, are_on_cpus

# Few enough that they stay in the cache of the processor.
BLOCK_BYTES = 1 << 20
# For which a process waits for another one to write its part.
TIMEOUT_SECONDS = 1200
# Of the threads that write, from 0 for that of training to 19 for the lowest.
PRIORITY = 15


class Place(NamedTuple):
    """Where in a training a checkpoint was written. Later places are greater.

    Attributes:
        epoch: the number of complete epochs.
        batches: the number of batches that were trained in the next one.
    """

    epoch: int
    batches: int

    @property
    def name(self) -> str:
        """The name of the folder."""
        return f"epoch-{self.epoch}-batch-{self.batches}"


class Store:
    """The checkpoints in a folder.

    Each is a folder with the arrays of the model as Orbax writes them, `info.json`, `arrays.npz`, and the size and the
    CRC-32 of each file in `checksums.json`. It has another name until all of this is written.

    All processes call all methods, except that only the first one changes and reads the names of files.

    Args:
        directory: the folder.
        keep: the number of newest checkpoints that remain.
    """

    def __init__(self, directory: pathlib.Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        checkpoint = import_orbax()
        # Compression would take longer than training takes, and random weights hardly shrink.
        handler = checkpoint.PyTreeCheckpointHandler(use_compression=False)
        self._args = checkpoint.args
        self._restore_args = checkpoint.ArrayRestoreArgs
        # A thread of its own does not know the distribution in force.
        self._is_first = processes.is_first()
        self._barrier = Barrier() if processes.num_processes() > 1 else None
        options = checkpoint.options.AsyncOptions(
            timeout_secs=TIMEOUT_SECONDS, barrier_sync_fn=self._barrier and self._barrier.wait
        )
        self._checkpointer = checkpoint.AsyncCheckpointer(handler, async_options=options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint", _lower_priority)
        self._snapshot = Snapshot()
        self._pending: concurrent.futures.Future[None] | None = None
        self._pending_place: Place | None = None
        # The newest complete checkpoint.
        self.last: Place | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    def path_of(self, place: Place) -> pathlib.Path:
        """Returns the folder of a checkpoint."""
        return self.directory / place.name

    def _partial_path_of(self, place: Place) -> pathlib.Path:
        return self.directory / f"writing-{place.name}"

    def places(self) -> list[Place]:
        """Returns the complete checkpoints in ascending order."""
        names = (re.fullmatch(r"epoch-(\d+)-batch-(\d+)", path.name) for path in self.directory.iterdir())
        return sorted(Place(int(name[1]), int(name[2])) for name in names if name)

    def remove_incomplete(self) -> None:
        """Removes what a training that has died was writing."""
        for path in self.directory.glob("writing-*"):
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> tuple[Place | None, list[str]]:
        """Returns the newest checkpoint that is not damaged, or `None`, and what is wrong with each newer one.

        Those that are damaged get another name, and do not count anymore.
        """
        faults: list[str] = []
        for place in reversed(self.places()):
            fault = fault_of(self.path_of(place))
            if fault is None:
                self.last = place
                return place, faults
            faults.append(f"{self.path_of(place)}: {fault}")
            damaged = self.directory / f"damaged-{place.name}"
            shutil.rmtree(damaged, ignore_errors=True)
            self.path_of(place).rename(damaged)
        return None, faults

    def info(self, place: Place) -> tuple[dict[str, Any], list[Array]]:
        """Returns what was saved beside the variables."""
        path = self.path_of(place)
        info = json.loads((path / "info.json").read_text())
        with np.load(path / "arrays.npz", allow_pickle=False) as file:
            arrays = [file[f"arr_{number}"].view(dtype) for number, dtype in enumerate(info.pop("array_dtypes"))]
        return info, arrays

    def restore(self, place: Place, like: list[Any]) -> list[Any]:
        """Returns the variables of a checkpoint.

        Args:
            place: the checkpoint.
            like: an array for each variable, of its shape, dtype and sharding.
        """
        not_empty = {str(number): array for number, array in enumerate(like) if array.size}
        restore_args = {
            name: self._restore_args(sharding=array.sharding, global_shape=array.shape, dtype=array.dtype)
            for name, array in not_empty.items()
        }
        item = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in not_empty.items()
        }
        args = self._args.PyTreeRestore(item=item, restore_args=restore_args)
        restored = self._checkpointer.restore(self.path_of(place) / "state", args=args)
        return [restored.get(str(number), array) for number, array in enumerate(like)]

    def save(self, place: Place, values: list[Any], info: dict[str, Any], arrays: list[Array]) -> Exception | None:
        """Begins to write a checkpoint. Returns the error of the previous one, or of this one if it has already failed.

        Args:
            place: where in the training.
            values: the variables, which the next step may replace.
            info: what JSON can hold.
            arrays: NumPy arrays that nothing changes.
        """
        error = self.wait()
        # Orbax writes no array without elements.
        tree = {str(number): value for number, value in enumerate(values) if value.size}
        processes.wait_for_programs()
        on_cpus = are_on_cpus(list(tree.values()))
        if on_cpus:
            tree = dict(zip(tree, self._snapshot.of(list(tree.values())), strict=True))
        self._pending_place = place
        if on_cpus and self._barrier is None:
            self._pending = self._thread.submit(self._finish, place, info, arrays, tree)
            return error
        # Orbax copies arrays of other devices before it returns, and lets the processes wait for one another.
        failure = self._begin(place, tree)
        if failure is not None:
            return failure
        self._pending = self._thread.submit(self._finish, place, info, arrays)
        return error

    def wait(self) -> Exception | None:
        """Waits until nothing is being written. Returns the error of the last checkpoint, if it is new."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        error = pending.exception()
        if error is None:
            self.last = self._pending_place
            return None
        if isinstance(error, Exception):
            return error
        raise error

    def close(self) -> Exception | None:
        """Waits, and ends the threads. Returns an error as `wait` does."""
        error = self.wait()
        self._thread.shutdown()
        self._checkpointer.close()
        self._snapshot = Snapshot()
        return error

    def _begin(self, place: Place, tree: dict[str, Any]) -> Exception | None:
        """Lets Orbax begin to write arrays. Returns the error if it cannot.

        Args:
            place: where in the training.
            tree: the arrays, by name.
        """
        path = self._partial_path_of(place)
        failure: Exception | None = None
        if self._barrier is not None:
            # All have ended the last one, which may have failed.
            self._barrier.begin()
        if self._is_first:
            self.remove_incomplete()
            try:
                path.mkdir()
                _check_free_space(path, sum(array.nbytes for array in tree.values()))
            except OSError as error:
                shutil.rmtree(path, ignore_errors=True)
                failure = error
        # The processes wait for one another in Orbax.
        if agreement.largest(failure is not None):
            return failure or OSError(f"The first process could not create {path}.")
        try:
            self._checkpointer.save(path / "state", args=self._args.PyTreeSave(tree))
        except Exception as error:
            # Orbax reports a full disk as one of several types.
            self._give_up(path, error)
            return error
        return None

    def _finish(
        self, place: Place, info: dict[str, Any], arrays: list[Array], tree: dict[str, Any] | None = None
    ) -> None:
        """Completes a checkpoint, in the background.

        Args:
            place: where in the training.
            info: what JSON can hold.
            arrays: NumPy arrays.
            tree: the arrays that Orbax has not yet begun to write.
        """
        path = self._partial_path_of(place)
        try:
            failure = None if tree is None else self._begin(place, tree)
            if failure is not None:
                raise failure
            self._checkpointer.wait_until_finished()
            if self._is_first:
                _write_info(path, info, arrays)
                path.rename(self.path_of(place))
            if self._barrier is not None:
                self._barrier.wait(key="complete", timeout_ms=1000 * TIMEOUT_SECONDS)
        except BaseException as error:
            self._give_up(path, error)
            raise
        if not self._is_first:
            return
        for old in self.places()[: -self.keep]:
            # Without a checksum, a folder that is removed by half does not count.
            (self.path_of(old) / "checksums.json").unlink(missing_ok=True)
            shutil.rmtree(self.path_of(old), ignore_errors=True)

    def _give_up(self, path: pathlib.Path, error: BaseException) -> None:
        """Lets the other processes fail too, or removes the files of a checkpoint that has failed."""
        if self._barrier is not None:
            # Others may still be writing, and would wait for their files. The next checkpoint removes them.
            self._barrier.fail(error)
        else:
            shutil.rmtree(path, ignore_errors=True)


def import_orbax() -> Any:
    """Returns the module `orbax.checkpoint`, or raises an `ImportError` that says how to install it."""
    try:
        import orbax.checkpoint
    except ModuleNotFoundError as error:
        raise ImportError(
            "`TrainingCheckpoint` writes files with Orbax. Received: no module "
            f"{error.name!r}. Install it: `pip install orbax-checkpoint`."
        ) from error
    return orbax.checkpoint


def _check_free_space(path: pathlib.Path, num_bytes: int) -> None:
    """Raises `OSError` if a file system has no space for a checkpoint, before all of them write a part of it."""
    total, _, free = shutil.disk_usage(path)
    # Some network file systems do not know their size.
    if total and free < num_bytes:
        raise OSError(f"the checkpoint has {num_bytes:,} bytes, and {free:,} are free")


def fault_of(path: pathlib.Path) -> str | None:
    """Returns what is wrong with the files of a checkpoint, or `None` if nothing is."""
    try:
        expected = json.loads((path / "checksums.json").read_text())
        files = expected.items()
    except (OSError, ValueError, AttributeError):
        return "`checksums.json` is missing or damaged"
    for name, (size, checksum) in files:
        file = path / name
        if not file.is_file():
            return f"the file {name!r} is missing"
        if file.stat().st_size != size:
            return f"the file {name!r} has {file.stat().st_size} bytes instead of {size}"
        if _crc(file) != checksum:
            return f"the file {name!r} differs from its checksum"
    return None


def _write_info(path: pathlib.Path, info: dict[str, Any], arrays: list[Array]) -> None:
    """Writes what is saved beside the variables, and the checksums of all files."""
    dtypes = [array.dtype.str if array.dtype.kind != "V" else array.dtype.name for array in arrays]
    # A file of NumPy does not hold bfloat16.
    plain = [array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array for array in arrays]
    np.savez(path / "arrays.npz", *plain)
    (path / "info.json").write_text(json.dumps({**info, "array_dtypes": dtypes}))
    (path / "checksums.json").write_text(json.dumps(_checksums(path)))


def _lower_priority() -> None:
    """Lets training go before this thread, and before those that it starts."""
    if sys.platform == "linux":
        # Other systems lower the priority of the whole process.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PRIORITY)


def _checksums(path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Returns the size and the CRC-32 of each file in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): (os.stat(file).st_size, _crc(file)) for file in files}


def _crc(path: pathlib.Path) -> int:
    checksum, block = 0, memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            checksum = zlib.crc32(block[:size], checksum)
    return checksum
