"""Padding rows, which make the number of rows of a table divisible by common mesh sizes."""

from __future__ import annotations

from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import on_host
from keras_rs_contrib.distribution import axis_size, check_layout
from keras_rs_contrib.tables import layout

# Divisible by 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96 and 192.
DEFAULT_ROW_MULTIPLE = 192


def padded_rows(num_rows: int, row_multiple: int) -> int:
    """Returns `ceil(num_rows / row_multiple) * row_multiple`."""
    return -(-num_rows // row_multiple) * row_multiple


class TableInitializer:
    """Initializes a table, with zeros in the padding rows.

    Args:
        initializer: a Keras initializer of the rows without padding.
        num_rows: number of rows without padding.
    """

    def __init__(self, initializer: Any, num_rows: int) -> None:
        self.initializer = keras.initializers.get(initializer)
        self.num_rows = num_rows

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Returns `[shape[0], ...]` values. The first `num_rows` rows do not depend on the padding.

        Raises:
            ValueError: if the initializer returns another shape.
        """
        if not _keras.is_in_stateless_scope():
            # Keras is initializing the variables of a trace. If that fails from here on, it would try them again at
            # the end of each later trace.
            _keras.forget_uninitialized_variables(_keras.uninitialized_variables())
        unpadded = (self.num_rows, *shape[1:])
        values = ops.convert_to_tensor(self.initializer(unpadded, dtype=dtype), dtype=dtype)
        if tuple(values.shape) != unpadded:
            raise ValueError(
                "An initializer must return the shape that it is called with. Received: "
                f"shape {tuple(values.shape)} for {unpadded} from {self.initializer!r}. Return one row for each id, "
                "without padding rows."
            )
        return _with_zero_rows(values, shape[0])


class PaddedRegularizer(keras.regularizers.Regularizer):  # type: ignore[misc]
    """Applies a regularizer to the rows without padding.

    Args:
        regularizer: a Keras regularizer.
        num_rows: number of rows without padding.
    """

    def __init__(self, regularizer: Any, num_rows: int) -> None:
        self.regularizer = keras.regularizers.get(regularizer)
        self.num_rows = num_rows

    def __call__(self, x: Any) -> Any:
        """Returns the penalty of the first `num_rows` rows."""
        # Zeros do not change these penalties, and slicing a split table would move data between devices.
        if type(self.regularizer) in (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2):
            return self.regularizer(x)
        return self.regularizer(ops.convert_to_tensor(x)[: self.num_rows])


class PaddedConstraint(keras.constraints.Constraint):  # type: ignore[misc]
    """Applies a constraint to the rows without padding.

    Args:
        constraint: a Keras constraint.
        num_rows: number of rows without padding.
    """

    def __init__(self, constraint: Any, num_rows: int) -> None:
        self.constraint = keras.constraints.get(constraint)
        self.num_rows = num_rows

    def __call__(self, w: Any) -> Any:
        """Returns the constrained table, with zeros in the padding rows."""
        w = ops.convert_to_tensor(w)
        return _with_zero_rows(self.constraint(w[: self.num_rows]), w.shape[0])


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
    follows_layout_map: bool = True,
) -> keras.Variable:
    """Creates a padded table for a layer, laid out on the mesh in force.

    Keras tracks the variable once it is assigned to an attribute of the layer.

    Args:
        layer: the layer that owns the table.
        name: name of the variable.
        shape: `(num_rows, width)`, without padding.
        initializer: a Keras initializer of the rows without padding.
        row_multiple: the number of rows is rounded up to a multiple of this.
        mesh_axis: axis of the mesh in force that splits the rows.
        variable_class: class of the variable; `keras.Variable` by default.
        dtype: dtype of the variable; by default that of the layer's variables.
        trainable: whether the table is trained.
        autocast: whether the table is cast to the layer's compute dtype.
        regularizer: regularizer of the rows without padding, or `None`.
        constraint: constraint of the table, or `None`.
        follows_layout_map: whether a layout map splits the table if the mesh has no axis `mesh_axis`.

    Returns:
        The `[num_padded_rows, width]` variable.

    Raises:
        ValueError: if the layout does not fit the padded table.
    """
    num_rows = shape[0]
    num_padded_rows = padded_rows(num_rows, row_multiple)
    path = f"{layer.path or layer.name}/{name}"
    laid_out = {}
    if follows_layout_map:
        check_table_layout((num_padded_rows, *shape[1:]), row_multiple, mesh_axis, path)
    if not follows_layout_map or layout.has_axis(mesh_axis):
        # Otherwise, Keras applies its layout map.
        laid_out = layout.row_layout(mesh_axis)
    if num_padded_rows != num_rows:
        if regularizer is not None:
            regularizer = PaddedRegularizer(regularizer, num_rows)
        if constraint is not None:
            constraint = PaddedConstraint(constraint, num_rows)
    with keras.name_scope(layer.name, caller=layer):
        variable = (variable_class or keras.Variable)(
            TableInitializer(initializer, num_rows),
            shape=(num_padded_rows, *shape[1:]),
            dtype=dtype or layer.variable_dtype,
            trainable=trainable,
            autocast=autocast,
            name=name,
            **laid_out,
        )
    if keras.backend.backend() == "jax" and _keras.has_value(variable):
        # JAX reports some errors, such as a lack of memory, only when it waits for the values.
        jax.block_until_ready(variable.value)
    variable.regularizer = regularizer
    variable.constraint = keras.constraints.get(constraint)
    return variable


def pad_rows(value: Any, num_rows: int) -> np.ndarray[Any, Any]:
    """Returns `[n, ...]` values as a NumPy array of `num_rows` rows, with zeros in the added rows."""
    value = on_host(value)
    return np.pad(value, ((0, num_rows - value.shape[0]), *[(0, 0)] * (value.ndim - 1)))


class UnpaddedStore:
    """A weight store that saves and loads tables without their padding rows.

    Files therefore do not depend on `row_multiple`, and a plain `keras.layers.Embedding` can load them.

    Args:
        store: the store that Keras passes to `save_own_variables` or `load_own_variables`.
        num_rows: number of rows of a table without padding.
        num_padded_rows: number of rows of a table with padding.
        name: name of the layer, for error messages.
    """

    def __init__(self, store: Any, num_rows: int, num_padded_rows: int, name: str) -> None:
        self.store = store
        self.num_rows = num_rows
        self.num_padded_rows = num_padded_rows
        self.name = name

    def __setitem__(self, key: str, value: Any) -> None:
        value = on_host(value)
        self.store[key] = value[: self.num_rows] if value.shape[:1] == (self.num_padded_rows,) else value

    def __getitem__(self, key: str) -> Any:
        value = self.store[key]
        if len(value.shape) == 0:
            return value
        if value.shape[0] != self.num_rows:
            raise ValueError(
                f"The saved weights of {self.name!r} must have one row for each id. Received: shape "
                f"{tuple(value.shape)} for {self.num_rows} rows. Build the layer with the saved sizes."
            )
        return pad_rows(value, self.num_padded_rows)

    def __len__(self) -> int:
        return len(self.store.keys())

    def keys(self) -> Any:
        """Returns the names of the weights."""
        return self.store.keys()


def _with_zero_rows(values: Any, num_rows: int) -> Any:
    """Returns a tensor of `num_rows` rows: `values`, and zeros."""
    if values.shape[0] == num_rows:
        return values
    return ops.pad(values, ((0, num_rows - values.shape[0]), *[(0, 0)] * (len(values.shape) - 1)))


def check_table_layout(shape: tuple[int, ...], row_multiple: int, mesh_axis: str | None, path: str) -> None:
    """Raises `ValueError` if the mesh in force, or its layout map, does not fit a padded table.

    Args:
        shape: shape of the table, including padding rows.
        row_multiple: the number of rows has been rounded up to a multiple of this.
        mesh_axis: axis of the mesh that splits the rows. If it is `None`, or not an axis of the mesh, the layout map
            decides.
        path: path of the variable, for the layout map.
    """
    num_padded_rows = shape[0]
    axis = layout.axis_of_rows(mesh_axis, path)
    num_shards = axis_size(axis)
    if num_padded_rows % num_shards == 0:
        if not layout.has_axis(mesh_axis):
            check_layout(path, shape)
        return
    if row_multiple == 1:
        raise ValueError(
            "The number of rows of a table must be divisible by the size of the mesh axis that splits them. Received: "
            f"{num_padded_rows} rows of {path!r} without padding for {num_shards} devices on mesh axis {axis!r}, as in "
            "files of version 0.1. Load the file without a distribution. Or build the model again, with padding, and "
            "call `load_weights` before `compile`."
        )
    raise ValueError(
        "The number of rows of a table, rounded up to a multiple of `row_multiple`, must be divisible by the size of "
        f"the mesh axis that splits them. Received: row_multiple={row_multiple} of {path!r} for {num_shards} devices "
        f"on mesh axis {axis!r}. Pass a `row_multiple` divisible by {num_shards}, or split the rows over another axis."
    )
