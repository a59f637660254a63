"""Tables with padding rows, so that their rows divide over the mesh axes in common use."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.tables import layout

# Divisible by 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96 and 192.
DEFAULT_ROW_MULTIPLE = 192


def padded_rows(num_rows: int, row_multiple: int) -> int:
    """Returns `ceil(num_rows / row_multiple) * row_multiple`."""
    return -(-num_rows // row_multiple) * row_multiple


class PaddedInitializer:
    """Initial values of a table, with zeros in the padding rows.

    Args:
        initializer: a Keras initializer.
        num_rows: rows without padding.
    """

    def __init__(self, initializer: Any, num_rows: int) -> None:
        self.initializer = keras.initializers.get(initializer)
        self.num_rows = num_rows

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Returns `[shape[0], ...]` values, the same in the first `num_rows` rows as without padding."""
        values = self.initializer((self.num_rows, *shape[1:]), dtype=dtype)
        return ops.pad(values, ((0, shape[0] - self.num_rows), *[(0, 0)] * (len(shape) - 1)))


class PaddedRegularizer(keras.regularizers.Regularizer):  # type: ignore[misc]
    """A regularizer of the rows without padding.

    Args:
        regularizer: a Keras regularizer.
        num_rows: rows without padding.
    """

    def __init__(self, regularizer: Any, num_rows: int) -> None:
        self.regularizer = keras.regularizers.get(regularizer)
        self.num_rows = num_rows

    def __call__(self, x: Any) -> Any:
        """Returns the penalty of the first `num_rows` rows."""
        # Zeros add nothing to these, and slicing a split table moves data between devices.
        if type(self.regularizer) in (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2):
            return self.regularizer(x)
        return self.regularizer(ops.convert_to_tensor(x)[: self.num_rows])


def add_table(
    layer: keras.layers.Layer,
    name: str,
    shape: tuple[int, int],
    initializer: Any,
    row_multiple: int,
    mesh_axis: str | None,
    variable_class: type[keras.Variable] | None = None,
    dtype: Any = None,
    trainable: bool = True,
    autocast: bool = True,
    regularizer: Any = None,
    constraint: Any = None,
) -> keras.Variable:
    """Returns a new table for a layer, padded and laid out. The layer tracks it once it is an attribute.

    Args:
        layer: the layer that the table belongs to.
        name: name of the variable.
        shape: `(num_rows, width)`, without padding.
        initializer: a Keras initializer.
        row_multiple: the number of rows is rounded up to a multiple of it.
        mesh_axis: the axis of the mesh in force that splits the rows, or `None` to follow the layout map.
        variable_class: class of the variable; `keras.Variable` by default.
        dtype: as in `keras.layers.Layer.add_weight`, like all arguments that follow.
        trainable: whether the table is trained.
        autocast: whether the table is cast to the layer's compute dtype.
        regularizer: penalty of the rows without padding.
        constraint: constraint of the table.

    Raises:
        ValueError: if the padded rows do not divide over the axis.
    """
    num_rows = shape[0]
    num_padded_rows = padded_rows(num_rows, row_multiple)
    path = f"{layer.path or layer.name}/{name}"
    axis = layout.axis_of_rows(mesh_axis, path)
    _check_padding_divides(num_padded_rows, row_multiple, axis, path)
    if num_padded_rows != num_rows:
        initializer = PaddedInitializer(initializer, num_rows)
        if regularizer is not None:
            regularizer = PaddedRegularizer(regularizer, num_rows)
    # Keras lays out by its layout map, unless it is told how.
    laid_out = {"layout": layout.row_sharding(axis)} if axis is not None and axis == mesh_axis else {}
    with keras.name_scope(layer.name, caller=layer):
        variable = (variable_class or keras.Variable)(
            keras.initializers.get(initializer),
            shape=(num_padded_rows, *shape[1:]),
            dtype=dtype or layer.variable_dtype,
            trainable=trainable,
            autocast=autocast,
            name=name,
            **laid_out,
        )
    variable.regularizer = regularizer
    variable.constraint = keras.constraints.get(constraint)
    return variable


def pad_rows(value: Any, num_rows: int) -> np.ndarray[Any, Any]:
    """Returns `[n, ...]` values as an array of `num_rows` rows, with zeros in the rows that are added."""
    value = ops.convert_to_numpy(value) if ops.is_tensor(value) else np.asarray(value)
    return np.pad(value, ((0, num_rows - value.shape[0]), *[(0, 0)] * (value.ndim - 1)))


class UnpaddedStore:
    """A store of a layer's weights that holds tables without their padding rows.

    Files then do not depend on `row_multiple`, and a plain `keras.layers.Embedding` loads them.

    Args:
        store: what Keras passes to `save_own_variables` or `load_own_variables`.
        num_rows: rows of a table without padding.
        num_padded_rows: rows of a table with padding.
        name: name of the layer, for errors.
    """

    def __init__(self, store: Any, num_rows: int, num_padded_rows: int, name: str) -> None:
        self.store = store
        self.num_rows = num_rows
        self.num_padded_rows = num_padded_rows
        self.name = name

    def __setitem__(self, key: str, value: Any) -> None:
        value = np.asarray(ops.convert_to_numpy(value))
        self.store[key] = value[: self.num_rows] if value.shape[:1] == (self.num_padded_rows,) else value

    def __getitem__(self, key: str) -> Any:
        value = self.store[key]
        if len(value.shape) == 0:
            return value
        if value.shape[0] != self.num_rows:
            raise ValueError(
                f"The saved weights of {self.name!r} must have one row for each id. Received: shape "
                f"{tuple(value.shape)} for {self.num_rows} rows. Build the layer with the sizes that were saved."
            )
        return pad_rows(value, self.num_padded_rows)

    def __len__(self) -> int:
        return len(self.store.keys())

    def keys(self) -> Any:
        """Returns the names of the weights."""
        return self.store.keys()


def _check_padding_divides(num_padded_rows: int, row_multiple: int, axis: str | None, path: str) -> None:
    num_shards = layout.axis_size(axis)
    if num_padded_rows % num_shards == 0:
        return
    if row_multiple == 1:
        raise ValueError(
            "The rows of a table must divide over the mesh axis that splits them. Received: "
            f"{num_padded_rows} rows of {path!r} without padding for {num_shards} devices on mesh axis {axis!r}, as in "
            "files of version 0.1. Load such a file without a distribution; or build the model anew, with padding, and "
            "call `load_weights` before `compile`."
        )
    raise ValueError(
        "The rows of a table, padded to a multiple of `row_multiple`, must divide over the mesh axis that splits them. "
        f"Received: row_multiple={row_multiple} of {path!r} for {num_shards} devices on mesh axis {axis!r}. "
        f"Pass a `row_multiple` that {num_shards} divides, or split over another axis."
    )
