"""The beginning of a training with checkpoints: the folder is taken, and its newest checkpoint must be of the model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_rs_contrib import processes
from keras_rs_contrib.checkpoints import agreement
from keras_rs_contrib.checkpoints.calling_fit import CallingFit
from keras_rs_contrib.checkpoints.lock import FolderLock
from keras_rs_contrib.checkpoints.model_state import described, difference, first_difference
from keras_rs_contrib.checkpoints.store import Place, Store


def check_can_resume(fit: CallingFit) -> None:
    """Raises `ValueError` if Keras would go on reading finite data in the next epoch: it does not from a checkpoint."""
    steps, batches = fit.steps_per_epoch, fit.num_batches
    if steps is not None and batches is not None and batches > steps:
        raise ValueError(
            "With checkpoints, an epoch must read all of its data. Received: "
            f"steps_per_epoch={steps} for data of {batches} batches. Leave `steps_per_epoch` out, or repeat the data "
            "without end: `dataset.repeat()`."
        )


def open_folder(
    store: Store, vocabularies: dict[str, list[Any]], is_active: Callable[[], bool], release: Callable[[], None]
) -> tuple[FolderLock | None, Place | None]:
    """Takes the folder of a training. Returns its lock, in the first process, and its newest checkpoint, if any.

    Args:
        store: the checkpoints in the folder.
        vocabularies: the names in each vocabulary, by feature, which are written to the folder.
        is_active: whether the training that takes the folder is running.
        release: ends a training that has failed, and is not told.

    Raises:
        OSError: if no file can be written in the folder, or a process cannot reach it.
        RuntimeError: if another training uses the folder.
        ValueError: if the processes pass different folders.
    """
    directories = processes.gather(str(store.directory))
    for process, directory in enumerate(directories):
        if directory != directories[0]:
            raise ValueError(
                "All processes of a training share one folder of checkpoints. Received: "
                f"directory={directories[0]!r} in process 0, and {directory!r} in process {process}. Pass the same one."
            )
    lock: FolderLock | None = None
    outcome: dict[str, Any] = {}
    if processes.is_first():
        try:
            store.directory.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(store.directory, is_active, release)
            store.remove_incomplete()
            place, faults = store.newest()
            _write_vocabularies(store.directory, vocabularies)
            outcome = {"place": place, "faults": faults}
        except OSError as error:
            outcome = {"error": str(error), "is_locked": isinstance(error, BlockingIOError)}
    outcome = agreement.of_first(outcome)
    if "error" in outcome:
        if lock is not None:
            lock.release()
        if outcome["is_locked"]:
            raise RuntimeError(
                "A folder of checkpoints belongs to one training at a time. Received: "
                f"directory={str(store.directory)!r}, in which another one is running. Wait for its end, or pass "
                "another folder."
            )
        raise OSError(
            "`directory` must be a folder in which files can be written. Received: "
            f"directory={str(store.directory)!r}: {outcome['error']}. Pass another folder, or change its permissions."
        )
    try:
        with processes.failing_alike():
            if not store.directory.is_dir():
                raise OSError(
                    "All processes of a training share one folder of checkpoints. Received: "
                    f"directory={str(store.directory)!r}, which only the first process can reach. Pass a folder of a "
                    "file system that all machines mount."
                )
    except OSError:
        if lock is not None:
            lock.release()
        raise
    for fault in outcome["faults"]:
        used = "The one before it is used." if outcome["place"] else "No other is left, and training begins again."
        agreement.say(f"A checkpoint is damaged: {fault}. {used}")
    return lock, None if outcome["place"] is None else Place(*outcome["place"])


def check_same_model(
    info: dict[str, Any],
    path: pathlib.Path,
    variables: Sequence[keras.Variable],
    vocabularies: dict[str, list[Any]],
) -> None:
    """Raises `ValueError` if a checkpoint is of another model, with what differs.

    Args:
        info: what the checkpoint holds beside its variables.
        path: the checkpoint.
        variables: those of the model.
        vocabularies: the names in each vocabulary of the model, by feature.
    """
    different = difference(info["variables"], described(variables))
    if different is not None:
        raise ValueError(
            f"A checkpoint must be of the model that is trained. Received: {path}, of another one: {different}. "
            "Nothing has been changed. Pass another `directory`, or create the model as it was."
        )
    there, here = info["vocabularies"], {feature: checksum(names) for feature, names in vocabularies.items()}
    for feature in sorted({*there, *here}):
        if there.get(feature) != here.get(feature):
            how = "it has one there or here only"
            if feature in there and feature in here:
                how = "its names differ"
                with contextlib.suppress(OSError, ValueError):
                    names = json.loads(_vocabulary_file(path.parent, there[feature]).read_text())
                    how = first_difference(names, vocabularies[feature])
            raise ValueError(
                "A checkpoint must have the vocabularies of the model that is trained. Received: "
                f"{path}, and another vocabulary of {feature!r}: {how}. Nothing has been changed. "
                "Pass another `directory`, or the vocabulary as it was."
            )


def checksum(names: list[Any]) -> str:
    """Returns the SHA-256 of the names in a vocabulary."""
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _vocabulary_file(directory: pathlib.Path, digest: str) -> pathlib.Path:
    return directory / f"vocabulary-{digest[:16]}.json"


def _write_vocabularies(directory: pathlib.Path, vocabularies: dict[str, list[Any]]) -> None:
    for names in vocabularies.values():
        file = _vocabulary_file(directory, checksum(names))
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(names))
            partial.rename(file)
