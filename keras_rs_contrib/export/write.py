"""The program that writes an export, in a process of its own on the TensorFlow backend."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rs_contrib.export.retrieval import ExportedRetrieval
from keras_rs_contrib.export.search import Retrieval

# The second signature of a SavedModel.
EXCLUDING = "excluding"
OPSET = 18


def write_saved_model(retrieval: ExportedRetrieval, tower: Any, target: pathlib.Path) -> None:
    """Writes a SavedModel with two signatures, of features alone and with excluded ids.

    Args:
        retrieval: what is exported.
        tower: the tower.
        target: a folder, which is created.
    """
    module = Retrieval(retrieval, tower, by_name=True)
    features = module.features()
    # By position, because an argument has the name of a Python variable.
    module.serve = tf.function(lambda *tensors: module.find(dict(zip(features, tensors, strict=True))))
    module.excluding = tf.function(
        lambda exclude_ids, *tensors: module.find(dict(zip(features, tensors, strict=True)), exclude_ids)
    )
    signatures = {
        "serving_default": module.serve.get_concrete_function(*features.values()),
        EXCLUDING: module.excluding.get_concrete_function(module.exclude_ids(), *features.values()),
    }
    tf.saved_model.save(module, str(target), signatures=signatures)


def write_onnx(retrieval: ExportedRetrieval, tower: Any, target: pathlib.Path) -> None:
    """Writes an ONNX file, whose input `exclude_ids` is optional, and the vocabularies as text.

    Args:
        retrieval: what is exported.
        tower: the tower.
        target: a file, which is created.
    """
    import onnx
    import tf2onnx

    module = Retrieval(retrieval, tower, by_name=False)
    features = module.features()
    names = [*features, "exclude_ids"]

    def find(*tensors: Any) -> Any:
        given = dict(zip(names, tensors, strict=True))
        return module.find({name: given[name] for name in features}, given["exclude_ids"])

    function = tf.function(find)
    signature = [*features.values(), module.exclude_ids()]
    model, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    # A value for an input makes it optional.
    default = onnx.numpy_helper.from_array(np.full((1, 1), -1, "int32"), "exclude_ids")
    model.graph.initializer.append(default)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def main(folder: pathlib.Path, target: pathlib.Path, format: str, own_classes: list[tuple[str, str]]) -> None:
    """Writes what a folder holds. If that fails, the reason is in `error.txt` of the folder.

    Args:
        folder: as `ExportedRetrieval.save` writes it.
        target: the file or folder to create.
        format: `"tf_saved_model"` or `"onnx"`.
        own_classes: the classes that the tower needs, pairs of a module and a name in it.
    """
    try:
        classes = {name.rpartition(".")[2]: _in_module(module, name) for module, name in own_classes}
        retrieval, tower = ExportedRetrieval.load(folder, classes)
        {"tf_saved_model": write_saved_model, "onnx": write_onnx}[format](retrieval, tower, target)
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {str(error).rstrip('.')}.")
        raise


def _in_module(module: str, name: str) -> Any:
    found: Any
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
