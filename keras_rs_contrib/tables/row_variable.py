"""Variables that Keras optimizers overwrite with their gradient, and checks that each gradient is a valid update."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import jax.extend.core
import keras

from keras_rs_contrib.tables.row_update import constant

# JAX 0.9 and older have it in `jax.core`.
_TRACE_MODULE: Any = jax.extend.core if hasattr(jax.extend.core, "get_opaque_trace_state") else jax.core


class RowUpdate:
    """The update of one table in a training step, shared by the table and its slots.

    Keras optimizers overwrite these variables with their gradient. If the loss does not depend on a lookup, that
    gradient is zero, and would erase the table. A lookup therefore records each update that it computes, and a variable
    accepts each update once.

    Attributes:
        trace: the JAX trace that computes the update, or `None`.
        assigned: `id` of each variable that has received the update.
    """

    def __init__(self) -> None:
        self.trace: Any = None
        self.assigned: set[int] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> RowUpdate:
        return RowUpdate()

    def note(self) -> None:
        """Records that the current JAX trace computes an update."""
        self.trace, self.assigned = _current_trace(), set()

    def take(self, variable: keras.Variable) -> None:
        """Marks the update of a variable as assigned.

        Args:
            variable: the table or one of its slots.

        Raises:
            ValueError: if no lookup in the current trace has computed an update, or if `variable` already has it.
        """
        if self.trace is None or self.trace != _current_trace() or id(variable) in self.assigned:
            raise ValueError(
                "The loss of a training step must depend on a lookup in each trainable `RowSparseEmbedding`, and "
                "gradients must be applied in the same (compiled) function that computes them. Received: a new value "
                f"for {variable.path!r} that no lookup has computed. The loss does not depend on a lookup in this "
                "table, or the lookup is inside `jax.vmap` or `keras.ops.vectorized_map`. Look up all ids in one call. "
                "If the model does not train the table, set `trainable = False` and compile the model again."
            )
        self.assigned.add(id(variable))


class RowSparseVariable(keras.Variable):  # type: ignore[misc]
    """A variable that only lookups update: a table, or a slot of its row optimizer.

    The gradient is the next value, which `row_update.look_up` computes. Any other gradient is an error.

    Attributes:
        update: the `RowUpdate` that the table and its slots share.
        tied: the table and its slots.
    """

    update: RowUpdate
    tied: tuple[keras.Variable, ...] = ()

    @property
    def overwrite_with_gradient(self) -> bool:
        """`True`: optimizers assign the gradient. Each optimizer that reads this property is checked."""
        for optimizer in _optimizers_on_the_stack():
            check_optimizer(optimizer, self.path)
        return True

    def assign(self, value: Any) -> Any:
        """Assigns a value. An optimizer must assign the update that a lookup has computed."""
        if _is_called_by_an_optimizer():
            self.update.take(self)
        return super().assign(value)

    @property
    def trainable(self) -> bool:
        """Whether the rows are trained. Setting it sets the table and all its slots."""
        return bool(super().trainable)

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        for variable in self.tied or (self,):
            keras.Variable.trainable.fset(variable, trainable)


class RowSparseTable(RowSparseVariable):
    """The embedding table.

    Attributes:
        slots: the slots of the row optimizer, each with one row for each row of the table.
    """

    slots: tuple[keras.Variable, ...] = ()

    @property
    def value(self) -> Any:
        """The tensor. In a JAX trace, a gradient through it is an error."""
        value = super().value
        if isinstance(value, jax.core.Tracer):
            return constant(value, self.path)
        # `fit` takes the values out of the variables, and only then some optimizers read `overwrite_with_gradient`: an
        # error would come too late to keep the values.
        for optimizer in _optimizers_of_fit():
            check_optimizer(optimizer, self.path)
        return value

    @property
    def value_for_lookup(self) -> Any:
        """The tensor as the trainer passes it, for lookups only."""
        return super().value


def tie(table: RowSparseTable, slots: tuple[RowSparseVariable, ...]) -> None:
    """Links a table and its slots, so that they share their updates and `trainable`."""
    update = RowUpdate()
    for variable in (table, *slots):
        variable.update, variable.tied = update, (table, *slots)
    table.slots = slots


def check_optimizer(optimizer: keras.optimizers.Optimizer, table: str) -> None:
    """Raises `ValueError` if an optimizer accumulates or scales gradients, or averages weights.

    Args:
        optimizer: the optimizer of a model.
        table: path of a row-sparse table of the model, for error messages.
    """
    fixes = {
        "gradient_accumulation_steps": "Train with larger batches: the cost of a step depends only on the batch.",
        "use_ema": "Leave it out: a moving average would process the whole table in each step.",
        "loss_scale_factor": 'Leave it out. The dtype policy "mixed_bfloat16" does not need loss scaling.',
    }
    for name, fix in fixes.items():
        if getattr(optimizer, name, None):
            raise ValueError(
                "The optimizer of a model with a `RowSparseEmbedding`, whose rows have their own optimizer, must not "
                "accumulate or scale gradients, or average weights. "
                f"Received: {name}={getattr(optimizer, name)!r} for {table!r}. {fix}"
            )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "The optimizer of a model with a `RowSparseEmbedding` must not scale the loss: the rows would be trained "
            f"on scaled gradients. Received: a `LossScaleOptimizer` for {table!r}, which Keras creates under "
            '"mixed_float16". Use the dtype policy "mixed_bfloat16", or `compile(auto_scale_loss=False)`.'
        )


def _current_trace() -> Any:
    return _TRACE_MODULE.get_opaque_trace_state(convention="flax")


# Keras has no hook for a variable to reject an optimizer, and `assign` does not know its caller. Values that users
# assign need no check, so the functions below inspect the call stack.


def _is_called_by_an_optimizer() -> bool:
    callers = _callers(sys._getframe(1))
    next(callers)  # Skips `assign`, which calls this function.
    caller = next(callers, None)
    return caller is not None and isinstance(caller.f_locals.get("self"), keras.optimizers.Optimizer)


def _optimizers_on_the_stack() -> list[keras.optimizers.Optimizer]:
    callers = (frame.f_locals.get("self") for frame in _callers(sys._getframe(1)))
    return [caller for caller in callers if isinstance(caller, keras.optimizers.Optimizer)]


def _optimizers_of_fit() -> list[keras.optimizers.Optimizer]:
    # `fit` reads the values through at most two other functions.
    callers = [frame for frame, _ in zip(_callers(sys._getframe(2)), range(4), strict=False)]
    models = [frame.f_locals.get("self") for frame in callers if frame.f_code.co_name == "fit"]
    optimizers = [getattr(model, "optimizer", None) for model in models]
    return [optimizer for optimizer in optimizers if isinstance(optimizer, keras.optimizers.Optimizer)]


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
