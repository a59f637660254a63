"""Damages `.keras` files in many ways, and tells what becomes of loading them."""

import io
import json
import random
import re
import signal
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
VALUES = [None, True, 0, -1, 3, 2**31, 2**40, 10**400, 0.5, float("nan"), float("inf"), "", "x", [], [1], {}, {"x": 1}]
SECONDS = 60


class Hang(BaseException):
    """Loading takes too long. Not an `Exception`, which loading might catch."""


def members_of(file: bytes) -> dict[str, bytes]:
    """Returns the contents of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns an archive with the given contents."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def without_checksums(file: bytes) -> bytes:
    """Returns a file as it would be if models were saved without checksums."""
    members = members_of(file)
    weights = io.BytesIO(members[WEIGHTS])
    with h5py.File(weights, "r+") as h5:
        del h5["_zz_checksums"]
    config = json.loads(members[CONFIG])
    del config["build_config"]["has_checksums"]
    return archive_of({**members, WEIGHTS: weights.getvalue(), CONFIG: json.dumps(config).encode()})


def _flipped(content: bytes, rng: random.Random) -> bytes:
    array = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if array:
            array[rng.randrange(len(array))] ^= 1 << rng.randrange(8)
    return bytes(array)


def _truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _members(file: bytes, rng: random.Random) -> bytes:
    members = members_of(file)
    name, other = rng.sample(sorted(members), 2)
    action = rng.choice(["remove", "empty", "swap", "rename", "add", "compress"])
    if action == "remove":
        del members[name]
    elif action == "empty":
        members[name] = b""
    elif action == "swap":
        members[name], members[other] = members[other], members[name]
    elif action == "rename":
        members[rng.choice(["a", "assets/a", name.upper()])] = members.pop(name)
    elif action == "add":
        members[rng.choice(["notes.txt", "assets/x/y.txt", "__MACOSX/config.json", "model.weights.npz"])] = b"x"
    return archive_of(members, zipfile.ZIP_DEFLATED if action == "compress" else zipfile.ZIP_STORED)


def _in_member(name: str, change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    def changed(file: bytes, rng: random.Random) -> bytes:
        members = members_of(file)
        members[name] = change(members[name], rng)
        return archive_of(members, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))

    return changed


def _weight_values(content: bytes, rng: random.Random) -> bytes:
    """Changes a number of a weight."""
    file = io.BytesIO(content)
    with h5py.File(file, "r+") as h5:
        names: list[str] = []
        h5.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) and item.size else None)
        dataset = h5[rng.choice(names)]
        values = np.array(dataset[()])
        raw = bytearray(values.tobytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        dataset[...] = np.frombuffer(bytes(raw), values.dtype).reshape(values.shape)
    return file.getvalue()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Returns all dicts and lists within a value, with each of their keys."""
    found: list[tuple[Any, Any]] = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *_places(value[key])]
    return found


def _config_value(content: bytes, rng: random.Random) -> bytes:
    config = json.loads(content)
    parent, key = rng.choice(_places(config))
    action = rng.choice(["value", "value", "value", "nested", "remove", "deep", "twice"])
    if action == "remove":
        del parent[key]
    elif action == "nested":
        parent[key] = rng.choice([[parent[key]], {"x": parent[key]}])
    elif action == "deep":
        parent[key] = "DEEP"
        depth = rng.choice([50, 500, 100_000])
        return json.dumps(config).encode().replace(b'"DEEP"', b"[" * depth + b"]" * depth)
    elif action == "twice" and isinstance(parent, dict):
        twice = json.dumps({"TWICE": parent.pop(key)})[1:-1]
        parent["TWICE"] = 0
        return json.dumps(config).encode().replace(b'"TWICE": 0', f"{twice}, {twice}".replace("TWICE", key).encode())
    else:
        parent[key] = rng.choice(VALUES)
    return json.dumps(config).encode()


def _config_size(content: bytes, rng: random.Random) -> bytes:
    """Makes an integer of the config large, or negative."""
    config = json.loads(content)
    sizes = [(parent, key) for parent, key in _places(config) if type(parent[key]) is int]
    parent, key = rng.choice(sizes)
    parent[key] = rng.choice([0, -1, parent[key] + 1, 2**20, 2**31, 2**40, 2**62, 10**30])
    return json.dumps(config).encode()


def _config_name(content: bytes, rng: random.Random) -> bytes:
    config = json.loads(content)
    named = [(parent, key) for parent, key in _places(config) if key in ("class_name", "registered_name", "module")]
    parent, key = rng.choice(named)
    names = ["Dense", "Lambda", "function", "__lambda__", "os", "builtins", "keras.layers", "keras_rs_contrib>NoSuch"]
    others = [parent[key] for parent, key in named if isinstance(parent[key], str)]
    parent[key] = rng.choice([*names, *others])
    return json.dumps(config).encode()


def _metadata(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"{", b"[]", b'{"keras_version": "99.0"}', b'{"keras_version": null}', content + b"x"])


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes of the file": _flipped,
    "end of the file": _truncated,
    "members": _members,
    "bytes of the weights": _in_member(WEIGHTS, _flipped),
    "end of the weights": _in_member(WEIGHTS, _truncated),
    "a value of the weights": _in_member(WEIGHTS, _weight_values),
    "bytes of the config": _in_member(CONFIG, _flipped),
    "a value of the config": _in_member(CONFIG, _config_value),
    "a size in the config": _in_member(CONFIG, _config_size),
    "a name of a class": _in_member(CONFIG, _config_name),
    "metadata": _in_member("metadata.json", _metadata),
}


def is_clear(error: BaseException, path: Any) -> bool:
    """Returns whether an error names the rule, the file, what is wrong, and what to do."""
    pattern = rf"`load_model` needs [^.]+(\.keras` file)?\. Received: {re.escape(repr(str(path)))}, .+\. [A-Z].+\."
    return type(error) is ValueError and re.fullmatch(pattern, str(error), re.DOTALL) is not None


def outcome(path: Any, load: Callable[[Any], Any], answers: Callable[[Any], Any], expected: Any) -> tuple[str, str]:
    """Loads a file.

    Args:
        path: path of the file.
        load: function of the path.
        answers: function of a model that returns arrays.
        expected: what it returned for the model that was saved.

    Returns:
        "equal", "different" (other answers, or none), "clear" (the error) or "other", and a text about it.
    """

    def hang(*_: Any) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # NumPy warns about Keras's variables.
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            try:
                model = load(path)
            except (Exception, Hang) as error:
                return "clear" if is_clear(error, path) else "other", f"{type(error).__name__}: {error}"
            try:
                found = answers(model)
            except Exception as error:
                return "different", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    is_equal = all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    return ("equal" if is_equal else "different"), ""
