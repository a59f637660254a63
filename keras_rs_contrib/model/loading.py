"""Loading of `.keras` files that may be damaged, or come from someone else."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import random
import re
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from keras_rs_contrib import _keras, processes
from keras_rs_contrib.model import archive
from keras_rs_contrib.model.archive import Contents, UnusableFile

# The weights that a config may create, in multiples of those in the file, which lacks padding rows and derived weights.
MAX_RATIO = 4
FREE_BYTES = 1 << 26
# Sizes that are always allowed in the config of a model that cannot be created without its values.
FREE_SIZE = 4096
# A list of this many thresholds takes some MB.
MAX_THRESHOLDS = 1_000_000
# Integers that are not sizes.
NOT_SIZES = ("seed", "shared_object_id", "names", "vocabulary", "exclude_ids")
MAX_DEPTH = 100
MAX_CHARACTERS = 600
CREATABLE = "`load_model` needs all that the model in a file is made of."
TRUST = "If you trust its source, load it with `keras.saving.load_model`."


def load_model(
    filepath: str | os.PathLike[str],
    custom_objects: dict[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> keras.Model:
    """Loads a `.keras` file that may be damaged, or come from someone else.

    It returns the model that was saved, or raises one kind of error. `keras.saving.load_model` loads the same files,
    but does not compare checksums, and trusts the sizes in the config. Here, before the model is created:

    - The archive must be complete, with content in proportion to its size.
    - Checksums of the weights, the config and the assets must be right. A `TwoTowerModel` writes them whenever it is
      saved. Other models, and files of older versions, have none; then, changed values cannot be told from saved ones.
    - The config must not ask for more weights than the file has.

    Members of the archive that Keras does not know are ignored.

    Args:
        filepath: path of a `.keras` file on this machine.
        custom_objects: classes and functions that are not registered, by their names.
        compile: whether to compile the model as it was before it was saved.
        safe_mode: whether to refuse Python code in the file. With `False`, loading can run any code.

    Returns:
        The model.

    Raises:
        TypeError: if `filepath` is not a path.
        ValueError: if the file does not exist, is not a `.keras` file, or is damaged; or if its model cannot be created
            here, as classes are not registered, or the distribution or the backend does not fit. The message names the
            file and what to do. The original error is its `__cause__`.

    Example:
    ```python
    model = TwoTowerModel(
        keras.layers.Embedding(20, 8), keras.layers.Embedding(50, 8), query_features="user", candidate_features="movie"
    )
    model.compile("adam")
    model.fit({"user": np.arange(20), "movie": np.arange(20)}, verbose=0)
    model.save("movies.keras")
    model = load_model("movies.keras")
    ```
    """
    if not isinstance(filepath, (str, os.PathLike)):
        raise TypeError(
            f"`filepath` must be a path. Received: {filepath!r} (of type {type(filepath).__name__}). Pass a string or "
            "a `pathlib.Path`."
        )
    path = pathlib.Path(filepath)
    with processes.in_step("load_model"):
        try:
            with _explaining("which cannot be read", OSError):
                contents = archive.read(path)
            with _explaining("whose `config.json` is nested too deeply", RecursionError):
                _check_sizes(contents, custom_objects, safe_mode)
            # Creating the model exchanges values.
            processes.raise_alike(None)
            return _load(path, contents, custom_objects, compile, safe_mode)
        except UnusableFile as error:
            message = f"{error.rule} Received: {str(path)!r}, {error.received}. {error.fix}"
            raise ValueError(message) from error.__cause__


@contextlib.contextmanager
def _explaining(received: str, kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise UnusableFile(received) from error


def _check_sizes(contents: Contents, custom_objects: Any, safe_mode: bool) -> None:
    """Raises `UnusableFile` if the config asks for more weights than the file has. Nothing is allocated."""
    largest = max((size for shape in contents.shapes.values() for size in shape), default=0)
    for name, size in _sizes(contents.config):
        if name == "num_thresholds" and size > MAX_THRESHOLDS:
            raise UnusableFile(f"whose `config.json` asks for {name}={size}", TRUST)
    num_bytes, is_complete = _dry_run(contents.config, custom_objects, safe_mode)
    if num_bytes > MAX_RATIO * contents.num_bytes + FREE_BYTES:
        raise UnusableFile(
            f"whose `config.json` asks for {num_bytes:,} bytes of weights, and which has {contents.num_bytes:,}"
        )
    if is_complete:
        return
    for name, size in _sizes(contents.config):
        if size > max(largest, FREE_SIZE):
            raise UnusableFile(
                f"whose `config.json` asks for {name}={size}, while the largest dimension of its weights is {largest}",
                f"{archive.COPY_AGAIN} {TRUST}",
            )


def _sizes(config: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yields the integers in a config that may be sizes, with their names."""
    if depth > MAX_DEPTH:
        raise UnusableFile("whose `config.json` is nested too deeply")
    if isinstance(config, dict):
        for key, value in config.items():
            if key not in NOT_SIZES:
                yield from _sizes(value, key, depth + 1)
    elif isinstance(config, list):
        for value in config:
            yield from _sizes(value, name, depth + 1)
    elif isinstance(config, int):
        yield name, config


def _dry_run(config: dict[str, Any], custom_objects: Any, safe_mode: bool) -> tuple[int, bool]:
    """Creates a model whose variables have no values.

    Returns:
        The size of all variables in bytes, and whether the model could be created.
    """
    before = {id(variable) for variable in _keras.uninitialized_variables()}
    state = random.getstate()
    is_complete = True
    new: list[keras.Variable] = []
    try:
        with (
            warnings.catch_warnings(),
            _keras.sharing_objects(is_loading=True),
            keras.StatelessScope(initialize_variables=False),
        ):
            warnings.simplefilter("ignore")
            # An optimizer has values from the beginning.
            keras.saving.deserialize_keras_object(_uncompiled(config), custom_objects, safe_mode=safe_mode)
    except Exception:
        # If it is a fault of the file, it fails in the same way without a scope, and the message is that of Keras.
        is_complete = False
    finally:
        # Keras would initialize them at the end of the next trace.
        new = [variable for variable in _keras.uninitialized_variables() if id(variable) not in before]
        _keras.forget_uninitialized_variables(new)
        # Initializers without a seed have drawn one.
        random.setstate(state)
    return sum(math.prod(each.shape) * _itemsize(each) for each in new), is_complete


def _itemsize(variable: keras.Variable) -> int:
    bits = re.search(r"\d+$", keras.backend.standardize_dtype(variable.dtype))
    return max(1, int(bits.group()) // 8) if bits else 1


def _uncompiled(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _uncompiled(value) for key, value in config.items() if key != "compile_config"}
    return [_uncompiled(value) for value in config] if isinstance(config, list) else config


def _load(path: pathlib.Path, contents: Contents, custom_objects: Any, compile: bool, safe_mode: bool) -> keras.Model:
    """Lets Keras load the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = keras.saving.load_model(path, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)
        except Exception as error:
            raise _reason(error, contents.is_verified) from error
    optimizer = [name for name in contents.shapes if name.startswith("optimizer/vars/")]
    for warning in caught:
        text = str(warning.message)
        if text.startswith("Skipping variable loading for optimizer") and len(optimizer) <= 2:
            # Before the first step, a file has the number of steps and the learning rate, which is in the config too.
            continue
        if "skipp" in text.lower() or "could not be loaded" in text:
            raise UnusableFile(f"some of whose weights cannot be loaded: {_one_line(text)}")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if not isinstance(model, keras.Model):
        raise UnusableFile(f"which holds a `{type(model).__name__}` and not a model")
    return model


def _reason(error: Exception, is_verified: bool) -> UnusableFile:
    """Returns why Keras cannot load a file whose archive is intact."""
    text = str(error)
    unknown = re.search(r"Could not locate (\w+) '([^']*)'", text)
    if unknown:
        return UnusableFile(
            f"with the {unknown[1]} {unknown[2]!r}, which is not known here",
            "Import the module that defines and registers it, or pass it in `custom_objects`.",
            CREATABLE,
        )
    if "safe_mode=False" in text:
        return UnusableFile(
            "which contains Python code, such as a lambda",
            "Only if you trust its source, pass `safe_mode=False`.",
            CREATABLE,
        )
    received = f"{type(error).__name__}: {_one_line(text)}"
    if is_verified:
        return UnusableFile(
            f"which is intact, but whose model cannot be created here. {received}",
            "Change what this message names, such as the distribution, the backend or the registered classes.",
            CREATABLE,
        )
    return UnusableFile(
        f"which has no checksums, and whose config or weights do not fit. {received}",
        "If this message names something of your program, such as the distribution, change that. Otherwise: "
        f"{archive.COPY_AGAIN[0].lower()}{archive.COPY_AGAIN[1:]}",
    )


def _one_line(text: str) -> str:
    """Returns what a message of Keras says beside the config, which may be long."""
    text = text.rpartition("Exception encountered: ")[2].partition("Full config:")[0]
    line = " ".join(text.split()).removesuffix(".")
    return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]} ..."
