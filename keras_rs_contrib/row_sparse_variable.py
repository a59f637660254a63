"""Variables that an optimizer of Keras overwrites with their gradient, and what may not be done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import keras
from jax.extend.core import get_opaque_trace_state

from keras_rs_contrib.padded_variable import PaddedVariable
from keras_rs_contrib.row_update import constant


class RowSparseVariable(keras.Variable):  # type: ignore[misc]
    """A table that changes row by row, by lookups alone.

    Its gradient is its next value, as a lookup computes it (`row_update.look_up`), and so all that would make another
    gradient of it, or none, is an error.

    Attributes:
        updated_in: the JAX trace in which its next value is computed, or `None`.
        slots: what its optimizer keeps for each row.
    """

    updated_in: Any = None
    slots: tuple[keras.Variable, ...] = ()

    @property
    def value(self) -> Any:
        """The tensor, through which no gradient may flow."""
        value = super().value
        return constant(value, self.path) if isinstance(value, jax.core.Tracer) else value

    @property
    def value_for_lookup(self) -> Any:
        """The tensor, as the trainer passes it in."""
        return super().value

    @property
    def trainable(self) -> bool:
        """Whether rows are trained; what is kept for them follows."""
        return bool(self._trainable)

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        for variable in (self, *self.slots):
            variable._trainable = bool(trainable)

    def note_update(self) -> None:
        """Notes that this trace computes the next value."""
        self.updated_in = _trace()


class PaddedRowSparseVariable(RowSparseVariable, PaddedVariable):
    """Such a table with padding on the mesh."""


def make_row_sparse(variable: keras.Variable, *slots: keras.Variable) -> None:
    """Makes a table and its slots variables that Keras's optimizers overwrite with their gradients."""
    # Keras chooses the class where it makes a variable, and offers no other.
    is_padded = isinstance(variable, PaddedVariable)
    variable.__class__ = PaddedRowSparseVariable if is_padded else RowSparseVariable
    variable.slots = slots
    for each in (variable, *slots):
        each.overwrite_with_gradient = True
        # Within a layer of mixed precision the next value would be rounded, and the table a new tensor in each lookup.
        each._autocast = False


def _trace() -> Any:
    return get_opaque_trace_state(convention="flax")


def _with_check_of_settings(build: Callable[..., None]) -> Callable[..., None]:
    """Returns the optimizers' method, with an error where they would do what rows cannot bear."""

    def build_checked(self: keras.optimizers.Optimizer, variables: Any) -> None:
        tables = [variable.path for variable in variables if isinstance(variable, RowSparseVariable)]
        if tables:
            _check_settings(self, tables[0])
        build(self, variables)

    return build_checked


def _with_check_of_updates(apply: Callable[..., None]) -> Callable[..., None]:
    """Returns the optimizers' method, with an error where a gradient is not the next value of its table."""

    def apply_checked(self: keras.optimizers.Optimizer, grads: Any, trainable_variables: Any = None) -> None:
        variables = getattr(self, "_trainable_variables", ()) if trainable_variables is None else trainable_variables
        tables = [variable for variable in variables if isinstance(variable, RowSparseVariable)]
        for table in tables:
            # Where no lookup has a part in the loss the gradient is 0, and would take the table's place.
            if table.updated_in != _trace():
                raise ValueError(
                    "The loss of a training step must depend on a lookup in each `RowSparseEmbedding` that is "
                    "trainable, and gradients be applied in the same (compiled) function in which they are taken. "
                    f"Received: a new value for {table.path!r} from a step in which the loss depends on no lookup of "
                    "it, or on one within `jax.vmap` or `keras.ops.vectorized_map`. Look up all ids at once; set "
                    "`trainable = False` where a model does not train the table, and compile the model again."
                )
        for table in tables:
            table.updated_in = None
        apply(self, grads, trainable_variables)

    return apply_checked


def _check_settings(optimizer: keras.optimizers.Optimizer, table: str) -> None:
    cures = {
        "gradient_accumulation_steps": "Train with larger batches: a step costs what its batch does.",
        "use_ema": "Leave it out: a moving average would be as large as the table in each step.",
        "loss_scale_factor": 'Leave it out; the dtype policy "mixed_bfloat16" needs none.',
    }
    for name, cure in cures.items():
        if getattr(optimizer, name, None):
            raise ValueError(
                "The optimizer of a model with a `RowSparseEmbedding`, whose rows have an optimizer of their own, must "
                f"leave gradients as they are. Received: {name}={getattr(optimizer, name)!r} for {table!r}. {cure}"
            )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "The optimizer of a model with a `RowSparseEmbedding` must not scale the loss: the rows would be trained "
            f"on scaled gradients. Received: a `LossScaleOptimizer` for {table!r}, as Keras makes it under "
            '"mixed_float16". Use the dtype policy "mixed_bfloat16", or `compile(auto_scale_loss=False)`.'
        )


# Keras has no hook by which a variable could refuse an optimizer, or a gradient.
keras.optimizers.Optimizer.build = _with_check_of_settings(keras.optimizers.Optimizer.build)
keras.optimizers.Optimizer.apply = _with_check_of_updates(keras.optimizers.Optimizer.apply)
