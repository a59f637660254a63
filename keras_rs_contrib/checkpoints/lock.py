"""A lock on a folder, which ends with the process that holds it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

# In this process: whether the training that holds a lock is running, and how to end it.
_HELD: dict[pathlib.Path, tuple[Callable[[], bool], Callable[[], None]]] = {}


class FolderLock:
    """Keeps other trainings out of a folder.

    The operating system ends the lock of a process that is killed. The file remains, and means nothing by itself.

    Args:
        directory: an existing folder.
        is_running: whether the training that takes the lock is running. It may end without releasing the lock.
        give_up: ends such a training for good, before another one in this process takes the lock.

    Raises:
        BlockingIOError: if another training holds the lock.
        OSError: if the folder is not writable.
    """

    def __init__(self, directory: pathlib.Path, is_running: Callable[[], bool], give_up: Callable[[], None]) -> None:
        # Not on all systems, on which the rest of the package runs.
        import fcntl

        self._lock_file = directory.resolve() / "lock"
        if self._lock_file in _HELD and not _HELD[self._lock_file][0]():
            _HELD[self._lock_file][1]()
        self._descriptor: int | None = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())
        _HELD[self._lock_file] = (is_running, give_up)

    def release(self) -> None:
        """Lets other trainings use the folder."""
        if self._descriptor is not None:
            _HELD.pop(self._lock_file, None)
            os.close(self._descriptor)
            self._descriptor = None
