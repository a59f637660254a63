"""Export of the retrieval of a model to formats that run without this package."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import explains_keywords, on_host
from keras_rs_contrib.export.retrieval import ExportedFeature, ExportedRetrieval, ExportedTower
from keras_rs_contrib.index.candidate_store import check_k
from keras_rs_contrib.model.one_writer import in_one_process
from keras_rs_contrib.model.saving import SavedModel
from keras_rs_contrib.model.training_data import ids_of
from keras_rs_contrib.scores import comparable_candidates

# The modules that a format needs.
FORMATS = {"tf_saved_model": ("tensorflow",), "onnx": ("tensorflow", "tf2onnx", "onnx")}


class ExportingModel(SavedModel):
    """A model whose retrieval can be exported."""

    @explains_keywords
    @in_one_process
    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | int | None = None,
        input_signature: dict[str, Any] | None = None,
        *,
        k: int | None = None,
        exclude_seen: bool | None = None,
    ) -> None:
        """Writes the retrieval of the model, as `recommend` does it, to a file that runs without Keras and JAX.

        The export has the query tower and all candidates, unsharded, and takes any number of queries. Its inputs are
        the query features by their names, with `_` for other characters than letters and digits. Its outputs are `ids`
        and `scores`, `[batch, k]`, as from `recommend`.

        `"tf_saved_model"` is a folder for TensorFlow and TensorFlow Serving. Features and ids with a vocabulary are
        names, and missing ones `""` (-1 for a vocabulary of integers). The signature `serving_default` takes the
        features; the signature `excluding` also takes `exclude_ids`, `[batch, m]`, filled with -1 (or `""`).

        `"onnx"` is a file for ONNX Runtime and others. Features and ids with a vocabulary are rows; for each of them,
        `<file>.<name>.txt` next to the file has a name on each line, as JSON, from row 1 on; row 0 is that of unknown
        names. The input `exclude_ids`, `[batch, m]` int32, is optional.

        The export is written in a process of its own, where Keras runs on TensorFlow. Custom layers of the query tower
        must be classes of a module that can be imported there. The index of a feature tower is refreshed first. This
        needs `pip install "keras_rs_contrib[export]"`.

        Args:
            filepath: the folder or file to create. It must not exist.
            format: `"tf_saved_model"` or `"onnx"`.
            verbose: whether to print where the export is.
            input_signature: dict of the features, with anything that has a `shape`, with the batch, and a `dtype`. By
                default, the features that the model has seen.
            k: number of candidates to return. By default, the `k` of the index.
            exclude_seen: whether the export leaves out what queries have seen, as in `recommend`.

        Raises:
            FileExistsError: if there is a file or folder of this name.
            ImportError: if a package is missing that the format needs.
            ValueError: if the format is unknown, the model has no index or has not seen its features, `k` exceeds the
                number of candidates, or the query tower does not run on TensorFlow. Nothing is written.
        """
        target = _check_target(filepath, format)
        index = self._index()
        self.refresh_index()
        if not index.built:
            index.build((None, None))
        ids = ids_of(index)
        num_excluded = 0 if ids is None else int(np.isin(ids, index.exclude_ids).sum())
        k = check_k(index.k if k is None else k, index.num_candidates, num_excluded)
        features = self._exported_features(input_signature)
        classes = _classes_of(self.query_tower)
        retrieval = self._exported_retrieval(features, k, exclude_seen)
        _check_names(retrieval)
        shapes = {each.name: (each.shape, each.dtype) for each in features if each.is_of_tower}
        tower = ExportedTower(self.query_tower, self.query_features, shapes)
        tower.build_from_config({"features": shapes})
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that it can be renamed, and does not count until it is complete.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            source, written = pathlib.Path(folder) / "source", pathlib.Path(folder) / target.name
            source.mkdir()
            retrieval.save(source, tower)
            self._write(source, written, format, classes)
            if format == "onnx":
                _write_names(target, retrieval, pathlib.Path(folder))
            if target.exists():
                raise FileExistsError(_exists(target))
            written.rename(target)
        if verbose or verbose is None:
            print(f"Exported to {target}, as {format}, with the {k} best of {len(retrieval.arrays['ids'])} candidates.")

    def _write(self, source: pathlib.Path, target: pathlib.Path, format: str, classes: list[type]) -> None:
        environment = {
            **os.environ,
            "KERAS_BACKEND": "tensorflow",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            # The accelerators belong to this process.
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        program = [sys.executable, "-m", "keras_rs_contrib.export.write", str(source), str(target), format]
        names = [[each.__module__, each.__qualname__] for each in classes]
        result = subprocess.run(
            [*program, json.dumps(names)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            error = source / "error.txt"
            reason = error.read_text() if error.exists() else result.stderr.strip()[-2000:]
            tower = self.query_tower
            raise ValueError(
                "The query tower must run on Keras's TensorFlow backend to be exported. Received: "
                f"`query_tower` {tower.name!r}, a `{type(tower).__name__}`, which fails: {reason} "
                "Build it from `keras.layers` and `keras.ops`."
            )

    def _exported_features(self, input_signature: dict[str, Any] | None) -> list[ExportedFeature]:
        names = self.model_inputs.names
        given = {} if input_signature is None else input_signature
        features = []
        for name in names.of_query:
            if name in given:
                shape, dtype = tuple(given[name].shape[1:]), keras.backend.standardize_dtype(given[name].dtype)
            elif name in self._seen_features:
                shape, dtype = self._seen_features[name]
            else:
                raise ValueError(
                    "An export needs the shape and dtype of each query feature, which the model learns from its first "
                    f"batch. Received: a model that has not seen {name!r}. Call it on a batch first, or pass "
                    "`input_signature`."
                )
            features.append(ExportedFeature(name, tuple(shape), dtype, self._names_of(name)))
        unknown = [name for name in given if name not in names.of_query]
        if unknown:
            raise ValueError(
                "`input_signature` must name query features of the model. Received: "
                f"{unknown}, and the features {names.of_query}. Use their names."
            )
        return features

    def _names_of(self, feature: str | None) -> list[Any] | None:
        vocabulary = None if feature is None else self.vocabularies.get(feature)
        return None if vocabulary is None else list(vocabulary.names)

    def _exported_retrieval(
        self, features: list[ExportedFeature], k: int, exclude_seen: bool | None
    ) -> ExportedRetrieval:
        """Returns what is exported, and adds the feature that tells queries apart to `features`, if it is needed."""
        index, inputs = self._index(), self.model_inputs
        ids = ids_of(index)
        assert ids is not None
        kept = ~np.isin(ids, index.exclude_ids)
        table = on_host(index.candidate_embeddings)[: len(ids)][kept]
        arrays = {
            "table": ops.convert_to_numpy(comparable_candidates(table, index.similarity)),
            "ids": ids[kept].astype("int32"),
        }
        query_id, data = inputs.names.query_id, inputs.training_data
        if self._leaves_out_seen(exclude_seen) and data.has_seen:
            known = data.to_arrays()
            arrays.update({name: known[name].astype("int32") for name in ("seen_queries", "seen_starts", "seen_ids")})
            if query_id not in [feature.name for feature in features]:
                features.append(ExportedFeature(str(query_id), (), "int32", self._names_of(query_id), False))
        popularity = data.popularity(index, ids) if self.vocabularies else None
        if popularity is not None:
            counts = np.zeros(len(ids), "float32")
            counts[popularity.rows] = popularity.counts
            arrays["counts"] = counts[kept]
        if query_id in self.vocabularies and len(data.trained_queries):
            arrays["is_trained"] = np.isin(np.arange(len(self.vocabularies[query_id])), data.trained_queries)
        return ExportedRetrieval(
            features=features,
            k=k,
            similarity=index.similarity,
            query_id=query_id,
            candidate_names=self._names_of(self.candidate_id),
            arrays=arrays,
        )


def _check_target(filepath: Any, format: str) -> pathlib.Path:
    if format not in FORMATS:
        raise ValueError(
            f"`format` must be one of {list(FORMATS)}. Received: format={format!r}. "
            'Use "tf_saved_model" for TensorFlow Serving, "onnx" for ONNX Runtime.'
        )
    target = pathlib.Path(filepath)
    if format == "onnx" and target.suffix != ".onnx":
        raise ValueError(f"An ONNX file ends in `.onnx`. Received: {str(target)!r}. Add the ending.")
    if target.exists():
        raise FileExistsError(_exists(target))
    missing = [name for name in FORMATS[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"An export as {format!r} needs {', '.join(FORMATS[format])}. Received: an environment without "
            f'{", ".join(missing)}. Install them: `pip install "keras_rs_contrib[export]"`.'
        )
    return target


def _exists(target: pathlib.Path) -> str:
    return (
        f"An export creates its file or folder. Received: {str(target)!r}, which exists. Remove it, or choose another."
    )


def _classes_of(tower: keras.layers.Layer) -> list[type]:
    """Returns the classes of the layers of a tower that are not Keras's, or raises an error for those of a script."""
    registered = [each for each in keras.saving.get_custom_objects().values() if isinstance(each, type)]
    own = list(dict.fromkeys(type(layer) for layer in _keras.sublayers(tower)))
    of_script = [each.__name__ for each in own if each.__module__ == "__main__"]
    if of_script:
        raise ValueError(
            "The layers of an exported tower must be classes of a module that can be imported. Received: "
            f"`query_tower` {tower.name!r} with {of_script}, of the program that runs. Move them to a module."
        )
    known = ("keras", "keras_rs", "keras_rs_contrib", "__main__")
    return [each for each in dict.fromkeys([*own, *registered]) if each.__module__.partition(".")[0] not in known]


def _check_names(retrieval: ExportedRetrieval) -> None:
    """Raises `ValueError` if features or names cannot be those of an export."""
    # Those of the outputs, and of the other input. TensorFlow does not tell letters by their case.
    taken = {"ids", "scores", "exclude_ids"}
    for feature in retrieval.features:
        name = feature.input_name.lower()
        if name in taken or not name[:1].isalpha():
            raise ValueError(
                "Each input of an export needs a name of its own that begins with a letter; other characters than "
                f"letters, digits and underscores become underscores. Received: the query feature {feature.name!r}, "
                f"and {sorted(taken)} besides. Rename the feature."
            )
        taken.add(name)
    for names in (retrieval.candidate_names, *(feature.names for feature in retrieval.features)):
        for name in names or ():
            try:
                np.int64(name) if isinstance(name, int) else name.encode()
            except (OverflowError, UnicodeEncodeError) as error:
                raise ValueError(
                    "The names of an exported vocabulary must be Unicode, or integers of 64 bits. Received: "
                    f"{name!r}, which is not: {error}. Create the vocabulary from other names."
                ) from error


def _write_names(target: pathlib.Path, retrieval: ExportedRetrieval, folder: pathlib.Path) -> None:
    """Writes the names of each vocabulary next to an ONNX file."""
    names = {each.input_name: each.names for each in retrieval.features}
    names["ids"] = retrieval.candidate_names
    parts = []
    for name, values in names.items():
        if values is not None:
            parts.append((folder / f"{name}.txt", target.with_name(f"{target.stem}.{name}.txt")))
            lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in values)
            parts[-1][0].write_text(lines, encoding="utf-8")
    for _, path in parts:
        if path.exists():
            raise FileExistsError(_exists(path))
    # All are complete.
    for part, path in parts:
        part.rename(path)
