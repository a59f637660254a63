"""How the layers that two towers share come back as one layer each."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_rs_contrib import _keras


def shared_layers(first: keras.layers.Layer, second: keras.layers.Layer) -> list[dict[str, Any]]:
    """Returns the configs of the models that are in two towers, and gives each config of a shared layer a common id.

    To be called within `sharing_objects`. Keras adds the id to the first config when it meets the layer again. The
    configs of most layers hold copies of the configs of their layers, which the id does not reach. A layer that has
    been serialized before gets it at once.

    A model calls its layers when it is created. So that these calls are counted before a tower calls the same layers,
    the models must be created first, the inner ones before those around them.

    Args:
        first: a tower that is serialized afterwards.
        second: another.
    """
    layers = {id(layer) for layer in _keras.sublayers(first)}
    shared = [layer for layer in _keras.sublayers(second) if id(layer) in layers]
    configs = []
    for layer in sorted(shared, key=lambda layer: len(_keras.sublayers(layer))):
        # A layer without a config of its own is created by the layer around it.
        with contextlib.suppress(NotImplementedError):
            config = keras.saving.serialize_keras_object(layer)
            if isinstance(layer, keras.Model):
                configs.append(config)
    return configs


def copy_of_config(config: Any) -> Any:
    """Returns a config with dicts, lists and tuples of its own, but the same leaves."""
    if isinstance(config, dict):
        return {key: copy_of_config(value) for key, value in config.items()}
    if type(config) in (list, tuple):
        return type(config)(copy_of_config(value) for value in config)
    return config


def deserialize_tower(config: dict[str, Any]) -> Any:
    """Returns a layer that may share layers with those deserialized before, within `sharing_objects`.

    The config of a functional model names a tensor by a layer and the position of the call that returned it. Keras
    counts the calls from 0, also those of a layer that other models have called already: the positions are moved on.

    Args:
        config: the config, which may be changed.
    """
    _move_positions(config)
    return keras.saving.deserialize_keras_object(config)


def _move_positions(config: Any) -> None:
    """Moves the positions of calls in a config, and in those within it, past the calls that layers have recorded."""
    if isinstance(config, dict):
        layers = config.get("layers")
        if layers and "output_layers" in config:
            # An input is no call: all models that share it share its tensor.
            called = [layer for layer in layers if layer.get("inbound_nodes")]
            moves = {layer["name"]: _keras.num_calls_of_shared(layer) for layer in called}
            _move_tensors([config["output_layers"], [layer["inbound_nodes"] for layer in called]], moves)
        for value in config.values():
            _move_positions(value)
    elif isinstance(config, list | tuple):
        for value in config:
            _move_positions(value)


def _move_tensors(tensors: Any, moves: dict[str, int]) -> None:
    """Moves the positions in references to tensors: lists of the name of a layer, a position and an index."""
    if isinstance(tensors, list) and len(tensors) == 3 and isinstance(tensors[0], str) and isinstance(tensors[1], int):
        tensors[1] += moves.get(tensors[0], 0)
    elif isinstance(tensors, dict | list | tuple):
        for value in tensors.values() if isinstance(tensors, dict) else tensors:
            _move_tensors(value, moves)
