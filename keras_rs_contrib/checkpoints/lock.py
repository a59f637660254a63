"""A lock on a folder, which ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import pathlib
from collections.abc import Callable

# In this process: how to end each lock, and whether the training that holds it is running.
_HELD: dict[pathlib.Path, tuple[Callable[[], bool], Callable[[], None]]] = {}


class FolderLock:
    """Keeps other trainings out of a folder.

    The operating system ends the lock of a process that is killed. The file remains, and means nothing by itself.

    Args:
        directory: an existing folder.
        is_running: whether the training that takes the lock is running. It may end without releasing the lock.

    Raises:
        BlockingIOError: if another training holds the lock.
        OSError: if the folder is not writable.
    """

    def __init__(self, directory: pathlib.Path, is_running: Callable[[], bool]) -> None:
        self._path = directory.resolve() / "lock"
        if self._path in _HELD and not _HELD[self._path][0]():
            _HELD[self._path][1]()
        self._file: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())
        _HELD[self._path] = (is_running, self.release)

    def release(self) -> None:
        """Lets other trainings use the folder."""
        if self._file is not None:
            _HELD.pop(self._path, None)
            os.close(self._file)
            self._file = None
