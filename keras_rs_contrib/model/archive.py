"""A `.keras` file, checked before anything is created from it: its members, its sizes, its checksums."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py

from keras_rs_contrib.model import checksums

CONFIG, WEIGHTS, ASSETS = "config.json", "model.weights.h5", "assets/"
# Keras writes files without compression. A file that was compressed again may be smaller, up to this.
MAX_EXPANSION = 100
# Of files too small for a ratio to mean anything.
FREE_BYTES = 1 << 26
BLOCK_BYTES = 1 << 20
INTACT = "`load_model` needs an intact `.keras` file."
COPY_AGAIN = "Copy or download the file again, or save the model again."


class UnusableFile(Exception):
    """What is wrong with a file.

    Args:
        received: what is wrong, which follows the name of the file.
        fix: what to do about it.
        rule: what must hold.
    """

    def __init__(self, received: str, fix: str = COPY_AGAIN, rule: str = INTACT) -> None:
        super().__init__(received)
        self.received = received
        self.fix = fix
        self.rule = rule


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a `.keras` file holds.

    Attributes:
        config: the content of `config.json`.
        shapes: the shape of each dataset of the weights, by its path.
        num_bytes: the size of all weights, in bytes.
        is_verified: whether the file has checksums, which are those of its content.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    num_bytes: int
    is_verified: bool


def read(path: pathlib.Path) -> Contents:
    """Checks a `.keras` file, and returns what it holds.

    Raises:
        UnusableFile: if it is not a `.keras` file, or damaged.
    """
    _check_path(path)
    with contextlib.ExitStack() as stack:
        with _explaining("which cannot be read"):
            file = stack.enter_context(path.open("rb"))
        with _explaining("which is not a zip archive, or truncated"):
            archive = stack.enter_context(zipfile.ZipFile(file))
        with _explaining("whose archive is damaged"):
            _check_members(archive, path.stat().st_size)
            text = archive.read(CONFIG)
        config = _parsed(text)
        with _explaining("whose weights are damaged"):
            weights = stack.enter_context(_weights_in(archive, file))
            shapes, num_bytes = _sizes(weights, archive.getinfo(WEIGHTS).file_size)
            has_checksums = checksums.RECORD in weights
            wrong = checksums.difference(weights, text, lambda name: archive.open(ASSETS + name))
    if wrong is not None:
        raise UnusableFile(wrong)
    build_config = config.get("build_config")
    if isinstance(build_config, dict) and build_config.get("has_checksums") and not has_checksums:
        raise UnusableFile("whose checksums are missing")
    if not has_checksums and b"NaN" in text and _has_nan(config):
        raise UnusableFile("whose `config.json` has NaN")
    return Contents(config, shapes, num_bytes, has_checksums)


def check_weights_file(filepath: Any) -> None:
    """Raises `ValueError` if a file of weights has checksums, and its weights differ from them.

    Args:
        filepath: path of a `.weights.h5` or `.keras` file. Nothing happens for other paths, nor if the file cannot be
            read: Keras says so.
    """
    path = pathlib.Path(str(filepath))
    if not path.name.endswith((".weights.h5", ".keras")) or not path.is_file():
        return
    wrong = None
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            if path.suffix == ".keras":
                archive = stack.enter_context(zipfile.ZipFile(file))
                weights = stack.enter_context(_weights_in(archive, file))
            else:
                weights = stack.enter_context(h5py.File(file))
            has_checksums = checksums.RECORD in weights
        except Exception:
            return
        if has_checksums:
            try:
                wrong = checksums.difference(weights)
            except Exception:
                wrong = "whose weights are damaged"
    if wrong is not None:
        raise ValueError(f"Weights must be as they were saved. Received: {str(path)!r}, {wrong}. {COPY_AGAIN}")


@contextlib.contextmanager
def _explaining(received: str) -> Iterator[None]:
    """Turns other errors into an `UnusableFile`."""
    try:
        yield
    except UnusableFile:
        raise
    except Exception as error:
        raise UnusableFile(received) from error


def _check_path(path: pathlib.Path) -> None:
    text = str(path)
    if path.is_dir():
        raise UnusableFile("a directory", "Pass the path of a file.")
    if not path.exists():
        raise UnusableFile("which does not exist", "Pass the path of a file on this machine.")
    if not text.endswith(".keras"):
        raise UnusableFile(
            "whose name does not end in `.keras`",
            "Load a `.weights.h5` file with `model.load_weights`, and files of older formats with "
            "`keras.saving.load_model`.",
        )
    if not path.is_file():
        raise UnusableFile("which is not a file", "Pass the path of a file.")
    if path.stat().st_size == 0:
        raise UnusableFile("which is empty")


def _check_members(archive: zipfile.ZipFile, file_size: int) -> None:
    """Raises `UnusableFile` if members are missing, unsafe or damaged."""
    members = archive.infolist()
    names = [member.filename for member in members]
    for name in (CONFIG, WEIGHTS):
        if name not in names:
            raise UnusableFile(f"which does not contain `{name}`", "Pass a file that `model.save` has written.")
    if len(set(names)) < len(names):
        raise UnusableFile("which contains several members of one name")
    for name in names:
        # Keras extracts them.
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise UnusableFile(f"with the member {name!r} outside of its folder", "Do not trust its source.")
    num_bytes = sum(member.file_size for member in members)
    if num_bytes > MAX_EXPANSION * file_size + FREE_BYTES:
        raise UnusableFile(
            f"which claims {num_bytes:,} bytes of content in {file_size:,} bytes", "Do not trust its source."
        )
    for member in members:
        with _explaining(f"whose member {member.filename!r} is damaged"), archive.open(member) as file:
            # At its end, the checksum of the archive is compared.
            while file.read(BLOCK_BYTES):
                pass


def _parsed(text: bytes) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    with _explaining("whose `config.json` is not JSON"):
        config = json.loads(text, object_pairs_hook=_without_duplicates)
    if not isinstance(config, dict) or not {"class_name", "config"} <= config.keys():
        raise UnusableFile("whose `config.json` does not describe a model")
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise UnusableFile("whose `config.json` has the same key twice")
    return result


def _has_nan(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isnan(value)


def _sizes(weights: h5py.File, file_size: int) -> tuple[dict[str, tuple[int, ...]], int]:
    """Returns the shapes of all weights, and their size in bytes, without reading them."""
    shapes, num_bytes = {}, 0
    for name, dataset in checksums.datasets_of(weights):
        if dataset.external or dataset.is_virtual:
            raise UnusableFile(f"whose weights {name!r} are in another file", "Do not trust its source.")
        shapes[name] = tuple(map(int, dataset.shape))
        num_bytes += math.prod(shapes[name]) * dataset.dtype.itemsize
    if num_bytes > MAX_EXPANSION * file_size + FREE_BYTES:
        raise UnusableFile(
            f"which claims {num_bytes:,} bytes of weights in {file_size:,} bytes", "Do not trust its source."
        )
    return shapes, num_bytes


@contextlib.contextmanager
def _weights_in(archive: zipfile.ZipFile, file: Any) -> Iterator[h5py.File]:
    """Opens the weights in an archive, in place if they are not compressed.

    Args:
        archive: the archive, whose members are intact.
        file: its open file.
    """
    member = archive.getinfo(WEIGHTS)
    content: Any
    if member.compress_type == zipfile.ZIP_STORED:
        # The local header ends with a name and an extra field, whose lengths are in its bytes 26 to 29.
        file.seek(member.header_offset + 26)
        lengths = file.read(4)
        start = member.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        content = _Part(file, start, member.file_size)
    else:
        content = io.BytesIO(archive.read(member))
    with h5py.File(content, "r") as weights:
        yield weights


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self._file, self._start, self._size, self._place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        num_bytes = max(0, min(len(buffer), self._size - self._place))
        self._file.seek(self._start + self._place)
        num_read = int(self._file.readinto(memoryview(buffer)[:num_bytes]))
        self._place += num_read
        return num_read
