"""Tables whose rows do not divide over the devices: variables that are rounded up on the mesh and nowhere else."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib import distribution


class PaddedVariable(keras.Variable):  # type: ignore[misc]
    """A variable with more rows on the mesh than it shows, as JAX splits only what divides.

    `shape`, `numpy()`, files and `assign` know the rows that were asked for. `value`, and with it every operation, has
    those of the mesh too, which are zeros at first. The slots that an optimizer makes for it are of this kind as well.

    Attributes:
        num_rows_on_mesh: rows of `value`.
    """

    num_rows_on_mesh: int
    _shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape without padding."""
        return PaddedShape(self._shape, self.num_rows_on_mesh)

    @property
    def value(self) -> Any:
        """The `[num_rows_on_mesh, ...]` tensor."""
        with self._as_laid_out():
            return super().value

    def assign(self, value: Any) -> Any:
        """Assigns rows without padding, or, as an optimizer does, a tensor with it."""
        from_host = not ops.is_tensor(value) and not isinstance(value, keras.Variable)
        value = self._convert_to_tensor(value, dtype=self._dtype)
        if from_host and tuple(value.shape) != self._shape:
            raise ValueError(
                f"The value of {self.path!r} must match its shape without padding, which is {self._shape}. Received: "
                f"shape {tuple(value.shape)}. Pass {self._shape[0]} rows."
            )
        if tuple(value.shape) == self._shape:
            padding = (0, self.num_rows_on_mesh - self._shape[0])
            value = ops.pad(value, (padding, *[(0, 0)] * (len(self._shape) - 1)))
        with self._as_laid_out():
            return super().assign(value)

    def __array__(self, dtype: Any = None) -> np.ndarray[Any, Any]:
        return np.asarray(ops.convert_to_numpy(self.value)[: self._shape[0]], dtype=dtype)

    def __repr__(self) -> str:
        value = "" if self._value is None else f", value={np.asarray(self)}"
        return f"<Variable path={self.path}, shape={tuple(self._shape)}, dtype={self.dtype}{value}>"

    def _initialize_with_initializer(self, initializer: Any) -> None:
        with self._as_laid_out():
            super()._initialize_with_initializer(initializer)

    @contextlib.contextmanager
    def _as_laid_out(self) -> Iterator[None]:
        """Lets Keras, whose variables have one shape, see that of the value."""
        shape = self._shape
        self._shape = (self.num_rows_on_mesh, *shape[1:])
        try:
            yield
        finally:
            self._shape = shape


class PaddedSlot(PaddedVariable):
    """A slot of an optimizer, which computes with shapes: `shape` is that of `value`, files have the rows shown."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with padding."""
        return (self.num_rows_on_mesh, *self._shape[1:])


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
        """Returns the penalty of the rows without padding."""
        # Zeros add nothing to these, and to slice a table that is split is traffic.
        if type(self.regularizer) in (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2):
            return self.regularizer(x)
        return self.regularizer(ops.convert_to_tensor(x)[: self.num_rows])


class PaddedShape(tuple[int, ...]):
    """A shape that also equals that of the value on the mesh, with which Keras compares it.

    Args:
        shape: the shape without padding.
        num_rows_on_mesh: rows with padding.
    """

    with_padding: tuple[int, ...]

    def __new__(cls, shape: tuple[int, ...], num_rows_on_mesh: int) -> PaddedShape:
        """Returns the shape."""
        self = super().__new__(cls, shape)
        self.with_padding = (num_rows_on_mesh, *shape[1:])
        return self

    def __eq__(self, other: object) -> bool:
        return tuple(self) == other or self.with_padding == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self))


class PaddedInitializer:
    """Initial values of a variable as without padding, and zeros below.

    Args:
        initializer: a Keras initializer.
        num_rows: rows without padding.
    """

    def __init__(self, initializer: Any, num_rows: int) -> None:
        self.initializer = keras.initializers.get(initializer)
        self.num_rows = num_rows

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Returns the values, of shape `shape`."""
        values = self.initializer((self.num_rows, *shape[1:]), dtype=dtype)
        return ops.pad(values, ((0, shape[0] - self.num_rows), *[(0, 0)] * (len(shape) - 1)))


def add_table(
    add_weight: Callable[..., keras.Variable],
    path: str,
    shape: tuple[int, int],
    initializer: Any,
    mesh_axis: str | None,
    **kwargs: Any,
) -> keras.Variable:
    """Adds a weight whose rows may be split, and need not divide.

    Args:
        add_weight: a layer's method.
        path: what the path of the variable will be, by which a layout map knows it.
        shape: `(num_rows, embedding_dim)`.
        initializer: a Keras initializer.
        mesh_axis: the axis of the mesh in force that splits the rows, or `None` to follow the layout map.
        **kwargs: further arguments of `add_weight`.
    """
    num_rows_on_mesh = distribution.rows_on_mesh(shape[0], mesh_axis, path)
    if num_rows_on_mesh == shape[0]:
        variable = add_weight(shape=shape, initializer=initializer, **kwargs)
    else:
        initializer = PaddedInitializer(initializer, shape[0])
        if kwargs.get("regularizer") is not None:
            kwargs["regularizer"] = PaddedRegularizer(kwargs["regularizer"], shape[0])
        variable = add_weight(shape=(num_rows_on_mesh, shape[1]), initializer=initializer, **kwargs)
        _show_rows(variable, shape[0])
    if mesh_axis is not None:
        distribution.split_rows(variable, mesh_axis)
    return variable


def replace_rows(variable: keras.Variable, value: Any, mesh_axis: str | None) -> None:
    """Assigns a value that may have another number of rows than before.

    Args:
        variable: `[old_num_rows, ...]`; if split, by `mesh_axis` or a layout map.
        value: `[num_rows, ...]`.
        mesh_axis: as for `add_table`.
    """
    num_rows = value.shape[0]
    if num_rows != variable.shape[0]:
        # Whatever can fail, fails before the variable changes.
        value = ops.convert_to_tensor(value, dtype=variable.dtype)
        num_rows_on_mesh = distribution.rows_on_mesh(num_rows, mesh_axis, variable.path)
        variable.__class__ = keras.Variable
        variable.__dict__.pop("num_rows_on_mesh", None)
        variable._shape = (num_rows_on_mesh, *variable.shape[1:])
        if num_rows_on_mesh != num_rows:
            _show_rows(variable, num_rows)
    variable.assign(value)


def _show_rows(variable: keras.Variable, num_rows: int, kind: type[PaddedVariable] = PaddedVariable) -> None:
    """Makes a variable that was laid out with padding show the first rows alone."""
    # Keras chooses the class where it makes a variable, and offers no other.
    variable.__class__ = kind
    variable.num_rows_on_mesh = variable._shape[0]
    variable._shape = (num_rows, *variable._shape[1:])


def _pad_slots(add_variable_from_reference: Callable[..., keras.Variable]) -> Callable[..., keras.Variable]:
    """Returns the optimizers' method, with slots of the padded kind for variables of that kind."""

    def add_slot(
        self: keras.optimizers.Optimizer, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> keras.Variable:
        if not isinstance(reference_variable, PaddedVariable):
            return add_variable_from_reference(self, reference_variable, name=name, initializer=initializer)
        laid_out = types.SimpleNamespace(
            path=reference_variable.path,
            shape=tuple(reference_variable.value.shape),
            dtype=reference_variable.dtype,
            _layout=reference_variable._layout,
        )
        slot = add_variable_from_reference(self, laid_out, name=name, initializer=initializer)
        _show_rows(slot, reference_variable._shape[0], PaddedSlot)
        return slot

    return add_slot


# Keras has no hook here: an optimizer makes a slot from the shape of a variable, and its layout, which would not fit.
keras.optimizers.Optimizer.add_variable_from_reference = _pad_slots(
    keras.optimizers.Optimizer.add_variable_from_reference
)
