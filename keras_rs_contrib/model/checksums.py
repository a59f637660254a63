"""Checksums in the files of a model, of its weights, its config and its assets."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import keras
import numpy as np

# Keras saves the attributes of a model in the order of their names, private ones at the end. This one must be the last.
ATTRIBUTE = "_zz_checksums"
RECORD = f"{ATTRIBUTE}/vars/record"
BLOCK_BYTES = 1 << 24


class Checksums(keras.layers.Layer):  # type: ignore[misc]
    """The part of a model that Keras saves last: checksums of all that has been saved before.

    The record is JSON, as uint8:

    - `weights`: SHA-256 of the dtype, shape and bytes of each dataset, by its path. The file holds tables without
      padding rows, so that the numbers depend neither on the devices nor on the backend.
    - `assets`: SHA-256 of each file of the assets, by its path.
    - `config`: CRC-32 of `config.json`, or `None` if Keras does not tell it: it writes a model that needs more than
      half of the free memory in another way.

    Weights in several files have no record.
    """

    _assets: pathlib.Path | None = None

    def note_assets(self, directory: str) -> None:
        """Takes the folder with the assets of the model, which are written before the record."""
        self._assets = pathlib.Path(directory)

    def save_own_variables(self, store: Any) -> None:
        """Writes the record."""
        assets, self._assets = self._assets, None
        file = getattr(store, "h5_file", None)
        if not isinstance(file, h5py.File) or hasattr(store, "sharding_config"):
            return
        files = [] if assets is None else sorted(path for path in assets.rglob("*") if path.is_file())
        archive = getattr(store, "archive", None)
        record = {
            "weights": {name: digest_of_dataset(dataset) for name, dataset in datasets_of(file)},
            "assets": {path.relative_to(assets).as_posix(): _digest_of_file(path) for path in files},  # type: ignore[arg-type]
            "config": archive.getinfo("config.json").CRC if isinstance(archive, zipfile.ZipFile) else None,
        }
        store["record"] = np.frombuffer(json.dumps(record).encode(), "uint8")

    def load_own_variables(self, store: Any) -> None:
        """Does nothing: a checksum is compared before anything is loaded."""


def datasets_of(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yields the datasets of a file with their paths, sorted, except the record. Links are not followed."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    for name in sorted(names):
        if name != RECORD:
            yield name, file[name]


def digest_of_dataset(dataset: h5py.Dataset) -> str:
    """Returns the SHA-256 of a dataset's dtype, shape and values."""
    # Keras writes bfloat16 as bytes, and names the dtype in an attribute.
    digest = hashlib.sha256(f"{dataset.dtype.str} {dataset.attrs.get('dtype')} {dataset.shape}".encode())
    if dataset.dtype.hasobject:
        digest.update(repr(np.asarray(dataset).tolist()).encode())
    elif dataset.ndim == 0 or dataset.size == 0:
        digest.update(np.asarray(dataset).tobytes())
    else:
        num_rows = max(1, BLOCK_BYTES // max(1, dataset.dtype.itemsize * math.prod(dataset.shape[1:])))
        for start in range(0, dataset.shape[0], num_rows):
            digest.update(np.ascontiguousarray(dataset[start : start + num_rows]).data.cast("B"))
    return digest.hexdigest()


def _digest_of_file(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(
    file: h5py.File, config: bytes | None = None, open_asset: Callable[[str], Any] | None = None
) -> str | None:
    """Returns what differs from the record in a file of weights, or `None` if nothing does, or if there is no record.

    Args:
        file: the weights.
        config: the content of `config.json`, or `None` to leave it and the assets out.
        open_asset: function that opens an asset by its path. It raises `KeyError` if there is none.
    """
    if RECORD not in file:
        return None
    try:
        record = json.loads(np.asarray(file[RECORD]).tobytes())
        weights, assets, crc = record["weights"], record["assets"], record["config"]
        is_valid = len(record) == 3 and isinstance(weights, dict) and isinstance(assets, dict)
    except (KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        return "whose checksums are damaged"
    present = dict(datasets_of(file))
    wrong = [
        name for name, digest in weights.items() if name not in present or digest_of_dataset(present[name]) != digest
    ]
    if wrong:
        return f"in which {len(wrong)} of {len(weights)} weights differ from their checksum, such as {wrong[0]!r}"
    if config is None or open_asset is None:
        return None
    if crc is not None and crc != zlib.crc32(config):
        return "in which `config.json` differs from its checksum"
    for name, digest in assets.items():
        try:
            with open_asset(name) as asset:
                is_same = hashlib.file_digest(asset, "sha256").hexdigest() == digest
        except KeyError:
            is_same = False
        if not is_same:
            return f"in which the asset {name!r} differs from its checksum"
    return None
