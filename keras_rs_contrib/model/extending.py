"""A larger copy of a trained model: its weights, the slots of its optimizer and its other state, with new rows."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import on_host
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.model.grown_index import copy_index
from keras_rs_contrib.model.growth import Growth, growth_of
from keras_rs_contrib.model.shared_layers import copy_of_config
from keras_rs_contrib.model.vocabularies import config_of_vocabularies
from keras_rs_contrib.negatives.sampling import StreamingSamplingProbability
from keras_rs_contrib.tables.layout import axis_of_rows, check_rows_divide
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding
from keras_rs_contrib.tables.row_variable import RowSparseVariable
from keras_rs_contrib.tables.sharded_embedding import TABLES, ShardedEmbedding

Pairs = list[tuple[keras.layers.Layer, keras.layers.Layer]]
# The name of an optimizer's moving average of a weight, after that of the weight.
AVERAGE = "average"


def extended(model: Any, new: Any, candidates: Any = None, candidate_ids: Any = None) -> Any:
    """Returns a larger copy of a model, which does not change: see `TwoTowerModel.extend`."""
    growth = growth_of(model, new)
    for table, num_rows in growth.tables.values():
        _check_can_grow(table, num_rows)
    larger, pairs = _larger(model, growth)
    _copy_settings(pairs)
    num_kept = _copy_weights(pairs, growth)
    larger._seen_features.update(model._seen_features)
    larger._training_data.take_arrays(model._training_data.to_arrays())
    object.__setattr__(larger, "_has_said_that_seen_are_ranked", model._has_said_that_seen_are_ranked)
    copy_index(model, larger, growth, candidates, candidate_ids)
    _compile(model, larger, pairs, num_kept)
    return larger


def _check_can_grow(table: keras.layers.Embedding, num_rows: int) -> None:
    """Raises `ValueError` if a table cannot have a number of rows on the mesh in force."""
    if getattr(table, "quantization_mode", None) is not None:
        raise ValueError(
            "A quantized table cannot grow: its rows are not trained. Received: "
            f"{table.name!r}, quantized to {table.quantization_mode}. Extend the model before `quantize`."
        )
    if table.built and not isinstance(table, ShardedEmbedding):
        path = next(weight.path for weight in table.weights if weight.name == "embeddings")
        check_rows_divide(num_rows, axis_of_rows(None, path), path)


# The larger model, with its initial weights.


def _larger(model: Any, growth: Growth) -> tuple[Any, Pairs]:
    """Returns the model that the config of a model describes once it has larger tables, and the pairs of layers."""
    config = _config(model, growth)
    larger, pairs = _model_of(model, config)
    wanted = {number: num_rows for number, (_, num_rows) in growth.tables.items()}
    for number, (table, num_rows) in growth.tables.items():
        now = _num_rows(pairs)
        if now[number] == num_rows:
            continue
        # A layer around the table creates it, for a number of rows in its own config.
        for place in _places_of(config, table.input_dim):
            changed = copy_of_config(config)
            _set(changed, place, num_rows)
            try:
                candidate, its_pairs = _model_of(model, changed)
            except Exception:
                # It was another number.
                continue
            then = _num_rows(its_pairs)
            if then[number] == num_rows and all(then[each] in (now[each], wanted.get(each)) for each in now):
                config, larger, pairs = changed, candidate, its_pairs
                break
    for old, new in pairs:
        expected = wanted.get(id(old), getattr(old, "input_dim", None))
        if isinstance(old, keras.layers.Embedding) and new.input_dim != expected:
            raise ValueError(
                "A table grows through its config, or a number of rows in that of the layer around it. Received: "
                f"{old.name!r} with {old.input_dim} rows, of which no config says so. Pass the table, or its number "
                "of rows, to the constructor of the layer, and return it from `get_config`."
            )
    return larger, pairs


def _config(model: Any, growth: Growth) -> dict[str, Any]:
    with _setting_rows(growth):
        config: dict[str, Any] = copy_of_config(model.get_config())
    config["vocabularies"] = config_of_vocabularies(growth.vocabularies)
    if model.retrieval is not None and not model.retrieval.is_tied:
        # Built later, when it is known which candidates it has.
        config["retrieval"]["build_config"] = None
    if growth.num_ids is not None:
        layers = [config["sampling_probability"]]
        if config["mixed_negatives"] is not None:
            layers.append(config["mixed_negatives"]["config"]["sampling_probability"])
        for layer in layers:
            if layer is not None:
                layer["config"]["num_candidates"] = max(layer["config"]["num_candidates"], growth.num_ids)
    return config


@contextlib.contextmanager
def _setting_rows(growth: Growth) -> Iterator[None]:
    """Lets tables have their new number of rows within `with`, for their configs, wherever these are."""
    before = [(table, table.input_dim) for table, _ in growth.tables.values()]
    try:
        for table, num_rows in growth.tables.values():
            table.input_dim = num_rows
        yield
    finally:
        for table, num_rows in before:
            table.input_dim = num_rows


def _model_of(model: Any, config: dict[str, Any]) -> tuple[Any, Pairs]:
    """Returns the model of a config, built like a given one, and the pairs of layers."""
    try:
        larger = type(model).from_config(config)
    except Exception as error:
        raise ValueError(
            f"A larger model is created from the config of the old one. Received: {error} Correct what it says, or "
            "let the layer that it names return all arguments of its constructor from `get_config`."
        ) from error
    old_index, index = model.retrieval, larger.retrieval
    if old_index is not None:
        # Row 0 was excluded before if it had to be.
        index.exclude_ids = list(old_index.exclude_ids)
        if not old_index.is_tied:
            index.build_from_config(old_index.get_build_config() or {})
    larger.build_from_config(model.get_build_config() or {})
    return larger, _pairs(model, larger)


def _pairs(model: Any, larger: Any) -> Pairs:
    """Returns each layer of a model with its copy."""
    old, new = _keras.sublayers(model), _keras.sublayers(larger)
    old_names, new_names = ([(type(layer), layer.name) for layer in layers] for layers in (old, new))
    if len(set(old_names)) == len(old_names) and set(old_names) == set(new_names):
        # Attributes that were assigned again may be in another order.
        by_name = dict(zip(new_names, new, strict=True))
        return [(layer, by_name[name]) for layer, name in zip(old, old_names, strict=True)]
    if [kind for kind, _ in old_names] != [kind for kind, _ in new_names]:
        missing = [name for kind, name in old_names if kind not in [kind for kind, _ in new_names]]
        raise ValueError(
            "The config of a model must describe all its layers. Received: "
            f"{len(old)} layers, and {len(new)} in the model of its config, which lacks {missing}. Create all layers "
            "in the constructors of the towers."
        )
    return list(zip(old, new, strict=True))


def _num_rows(pairs: Pairs) -> dict[int, int]:
    """Returns the number of rows of each table in the larger model, by the `id` of the old one."""
    return {id(old): new.input_dim for old, new in pairs if isinstance(old, keras.layers.Embedding)}


def _places_of(
    config: Any, number: int, place: tuple[Any, ...] = (), is_own: bool = False
) -> Iterator[tuple[Any, ...]]:
    """Yields where a number occurs in the configs of layers that are not Keras's.

    Args:
        config: a config, or a part of one.
        number: the number.
        place: the keys that lead to the part.
        is_own: whether the part is in the config of such a layer.
    """
    if isinstance(config, dict):
        if "class_name" in config and "config" in config:
            is_own = not str(config.get("module")).startswith("keras.")
            yield from _places_of(config["config"], number, (*place, "config"), is_own)
            return
        items: Any = config.items()
    elif isinstance(config, list | tuple):
        items = enumerate(config)
    else:
        if is_own and type(config) is not bool and config == number:
            yield place
        return
    for key, value in items:
        yield from _places_of(value, number, (*place, key), is_own)


def _set(config: Any, place: tuple[Any, ...], value: Any) -> None:
    """Sets a part of a config, in place. Tuples become lists."""
    for key in place[:-1]:
        if isinstance(config[key], tuple):
            config[key] = list(config[key])
        config = config[key]
    config[place[-1]] = value


# The state.


def _copy_settings(pairs: Pairs) -> None:
    """Copies what a config does not hold of the layers."""
    # Setting a layer sets those within it, which come after it.
    for old, new in pairs:
        if new.trainable != old.trainable:
            new.trainable = old.trainable
        if isinstance(old, RowSparseEmbedding):
            new.reference_rates = old.reference_rates


def _copy_weights(pairs: Pairs, growth: Growth) -> dict[int, int]:
    """Copies the weights of all layers but the index, and returns how many rows of grown weights are old, by `id`."""
    num_kept = {}
    for old_layer, new_layer in _without_index(pairs):
        for old, new in _own_variables(old_layer, new_layer):
            if isinstance(old_layer, StreamingSamplingProbability) and old.shape != new.shape:
                # Not the placeholders of fixed counts.
                _assign(new, _with_rows(old, np.zeros_like(_value(new)), old_layer.num_candidates))
            elif id(old_layer) in growth.tables and _has_rows(old, new):
                num_kept[id(new)] = old_layer.input_dim
                _assign(new, _with_rows(old, _value(new), old_layer.input_dim))
            elif old.shape == new.shape:
                _assign(new, _value(old))
            else:
                raise ValueError(
                    "Only tables grow. Received: the weight "
                    f"{old.path!r} of shape {tuple(old.shape)}, with shape {tuple(new.shape)} in the larger model. Use "
                    "an embedding for what depends on the number of rows."
                )
            if new.trainable != old.trainable:
                new.trainable = old.trainable
    return num_kept


def _without_index(pairs: Pairs) -> Pairs:
    """Returns the layers whose weights are not of candidates, of which there may be more or others."""
    return [(old, new) for old, new in pairs if not isinstance(old, ShardedBruteForceRetrieval)]


def _own_variables(old: keras.layers.Layer, new: keras.layers.Layer) -> list[tuple[keras.Variable, keras.Variable]]:
    """Returns the variables of a layer that are not in the layers within it, each with its copy."""
    own = []
    for layer in (old, new):
        inner = {id(v) for each in _keras.sublayers(layer)[1:] for v in each.variables}
        own.append([variable for variable in layer.variables if id(variable) not in inner])
    if [variable.name for variable in own[0]] != [variable.name for variable in own[1]]:
        raise ValueError(
            "The larger model must have the weights of the old one. Received: "
            f"{[v.name for v in own[0]]} of {old.name!r}, and {[v.name for v in own[1]]} in the larger model. Create "
            "weights in the constructor or in `build` of the layer."
        )
    return list(zip(*own, strict=True))


def _has_rows(old: keras.Variable, new: keras.Variable) -> bool:
    """Returns whether a variable of an embedding has a row for each id. Padding may keep its shape as it was."""
    return old.name in TABLES or isinstance(old, RowSparseVariable) or old.shape != new.shape


def _value(variable: keras.Variable) -> np.ndarray[Any, Any]:
    return on_host(variable)


def _assign(variable: keras.Variable, value: np.ndarray[Any, Any]) -> None:
    variable.assign(value)


def _with_rows(old: keras.Variable, initial: np.ndarray[Any, Any], num_kept: int) -> np.ndarray[Any, Any]:
    """Returns the first rows of an old variable, and then the rows of an initial value."""
    result = np.array(initial)
    result[:num_kept] = _value(old)[:num_kept]
    return result


def _compile(model: Any, larger: Any, pairs: Pairs, num_kept: dict[int, int]) -> None:
    """Compiles the larger model like the old one, and copies the state of the optimizer.

    Args:
        model: the model.
        larger: the larger one, with its weights.
        pairs: their layers.
        num_kept: how many rows of grown weights are old, by `id`.
    """
    if not model.compiled:
        return
    try:
        larger.compile_from_config(model.get_compile_config())
    except Exception as error:
        raise ValueError(
            "A larger model is compiled from the config of the old one, which must hold the arguments of `compile`. "
            f"Received: {error} Register classes and functions of your own with "
            "`keras.saving.register_keras_serializable`."
        ) from error
    if not model.optimizer.built:
        return
    copies = {id(old): id(new) for pair in _without_index(pairs) for old, new in _own_variables(*pair)}
    old_slots, slots = model.optimizer.variables, larger.optimizer.variables
    trained = larger.trainable_variables
    is_same = [copies[id(each)] for each in model.trainable_variables] == [id(each) for each in trained]
    if not is_same or len(old_slots) != len(slots):
        raise ValueError(
            "The optimizer must be built for the weights that are trainable now. Received: "
            f"{len(old_slots)} variables of the optimizer, and {len(slots)} for {len(trained)} trainable weights. "
            "Compile the model again."
        )
    for old, new, weight in zip(old_slots, slots, _weights_of(slots, trained), strict=True):
        _assign(new, _slot(old, new, weight, num_kept))


def _weights_of(slots: list[keras.Variable], trained: list[keras.Variable]) -> list[keras.Variable | None]:
    """Returns the weight of each variable of an optimizer, or `None` if its name does not say it."""
    # Keras names a slot after its weight. Weights of one name have their slots in order.
    by_name: dict[str, list[keras.Variable]] = {}
    for variable in trained:
        by_name.setdefault(variable.path.replace("/", "_"), []).append(variable)
    result: list[keras.Variable | None] = []
    num_before: Counter[str] = Counter()
    for slot in slots:
        name = max((name for name in by_name if slot.name.startswith(f"{name}_")), key=len, default=None)
        result.append(None if name is None else by_name[name][num_before[slot.name]])
        num_before[slot.name] += 1
    return result


def _slot(
    old: keras.Variable, new: keras.Variable, weight: keras.Variable | None, num_kept: dict[int, int]
) -> np.ndarray[Any, Any]:
    """Returns the value of a variable of the larger model's optimizer."""
    initial = _value(new)
    if weight is not None and id(weight) in num_kept:
        if new.name.endswith(f"_{AVERAGE}"):
            # Keras begins with the weight itself, in the first step.
            initial = _value(weight)
        return _with_rows(old, initial, num_kept[id(weight)])
    if old.shape == new.shape:
        return _value(old)
    # Such as the sums over columns of Adafactor, whose name does not say of which weight they are.
    result, value = np.array(initial), _value(old)
    result[tuple(map(slice, value.shape))] = value
    return result
