"""The state of a model: its variables, and what it and its layers know beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras

from keras_rs_contrib import _keras
from keras_rs_contrib.checkpoints.plain_values import Array, from_json, to_json
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding
from keras_rs_contrib.vocabulary import Vocabulary

# Of the variables that differ, how many an error names.
NUM_NAMED = 5


def variables_of(model: keras.Model) -> list[list[keras.Variable]]:
    """Returns the variables of a model in the groups, and in the order, in which Keras passes them to a step."""
    return [
        list(model.trainable_variables),
        list(model.non_trainable_variables),
        list(model.optimizer.variables),
        list(model.metrics_variables),
    ]


def saved_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables that a checkpoint holds.

    It does not hold the index of a feature tower: the tower computes it again, and its rows are padded for one mesh.
    """
    derived: set[int] = set()
    for layer in _keras.sublayers(model):
        if isinstance(layer, ShardedBruteForceRetrieval) and not layer.is_tied:
            own = (layer.candidate_embeddings, layer.candidate_ids, layer.id_lookup, layer.tower_checksum)
            derived.update(id(variable) for variable in own)
    return [variable for group in variables_of(model) for variable in group if id(variable) not in derived]


def described(variables: Sequence[keras.Variable]) -> list[list[Any]]:
    """Returns the path, the shape and the dtype of each variable, as JSON."""
    return [[variable.path, list(variable.shape), str(variable.dtype)] for variable in variables]


def difference(saved: list[list[Any]], own: list[list[Any]]) -> str | None:
    """Returns how the variables of a checkpoint differ from those of a model, or `None` if they do not.

    Keras numbers the names of layers, from where another model has ended in the same process. The numbers are ignored.
    """

    def unnumbered(path: str) -> str:
        return re.sub(r"_\d+(?=[/_]|$)", "", path)

    def listed(variables: list[list[Any]]) -> str:
        names = [f"{path!r} {tuple(shape)} {dtype}" for path, shape, dtype in variables[:NUM_NAMED]]
        return ", ".join(names) + (f" and {len(variables) - NUM_NAMED} more" if len(variables) > NUM_NAMED else "")

    if len(saved) != len(own):
        saved_keys = [(unnumbered(path), shape, dtype) for path, shape, dtype in saved]
        own_keys = [(unnumbered(path), shape, dtype) for path, shape, dtype in own]
        only_saved = [each for each, key in zip(saved, saved_keys, strict=True) if key not in own_keys]
        only_own = [each for each, key in zip(own, own_keys, strict=True) if key not in saved_keys]
        return (
            f"{len(saved)} variables there and {len(own)} here; only there: {listed(only_saved) or 'none'}; "
            f"only here: {listed(only_own) or 'none'}"
        )
    different = [
        (there, here)
        for there, here in zip(saved, own, strict=True)
        if (unnumbered(there[0]), *there[1:]) != (unnumbered(here[0]), *here[1:])
    ]
    if not different:
        return None
    there, here = zip(*different, strict=True)
    return f"there {listed(list(there))}; here {listed(list(here))}"


def knowledge_of(model: keras.Model, arrays: list[Array]) -> dict[str, Any]:
    """Returns what a model knows beside its variables as JSON, and appends its arrays.

    This is what a `TwoTowerModel` knows of its training data, and the rates that row optimizers follow.
    """
    training_data = getattr(model, "_training_data", None)
    return {
        "rates": [to_json(table.reference_rates, arrays) for table in _row_sparse(model)],
        "training_data": None if training_data is None else to_json(training_data.state(), arrays),
    }


def set_knowledge(model: keras.Model, knowledge: dict[str, Any], arrays: list[Array]) -> None:
    """Lets a model know what `knowledge_of` has returned."""
    for table, rates in zip(_row_sparse(model), knowledge["rates"], strict=True):
        table.reference_rates = from_json(rates, arrays)
    if knowledge["training_data"] is not None:
        model._training_data.set_state(from_json(knowledge["training_data"], arrays))


def _row_sparse(model: keras.Model) -> list[RowSparseEmbedding]:
    return [layer for layer in _keras.sublayers(model) if isinstance(layer, RowSparseEmbedding)]


def vocabularies_of(model: keras.Model) -> dict[str, list[Any]]:
    """Returns the names in each vocabulary of a model, by feature."""
    vocabularies: dict[str, Vocabulary] = getattr(model, "vocabularies", None) or {}
    return {feature: list(vocabulary.names) for feature, vocabulary in vocabularies.items()}


def first_difference(there: list[Any], here: list[Any]) -> str:
    """Returns how two vocabularies differ."""
    for place, (first, second) in enumerate(zip(there, here, strict=False)):
        if first != second:
            return f"name {place} is {first!r} there and {second!r} here"
    return f"{len(there)} names there and {len(here)} here"
