"""Variables that a Keras optimizer overwrites with their gradient, and what must not be done to them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import keras

from keras_rs_contrib.tables.row_update import constant

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # JAX 0.9 and older.
    from jax.core import get_opaque_trace_state


class RowUpdate:
    """The update of one table that a training step computes, shared by the table and its slots.

    Keras's optimizers assign the gradient of these variables in place of their value. If the loss does not depend on a
    lookup, that gradient is zeros. So each update is noted when a lookup computes it, and is assigned once.

    Attributes:
        trace: the JAX trace that computes the update, or `None`.
        assigned: ids of the variables that have their update.
    """

    def __init__(self) -> None:
        self.trace: Any = None
        self.assigned: set[int] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> RowUpdate:
        return RowUpdate()

    def note(self) -> None:
        """Notes that the current JAX trace computes an update."""
        self.trace, self.assigned = _current_trace(), set()

    def take(self, variable: keras.Variable) -> None:
        """Raises `ValueError` if no lookup in this trace has computed an update for `variable`."""
        if self.trace is None or self.trace != _current_trace() or id(variable) in self.assigned:
            raise ValueError(
                "The loss of a training step must depend on a lookup in each trainable `RowSparseEmbedding`, and "
                "gradients must be applied in the same (compiled) function that computes them. Received: a new value "
                f"for {variable.path!r} from a step whose loss depends on no lookup of it, or on one within `jax.vmap` "
                "or `keras.ops.vectorized_map`. Look up all ids at once; set `trainable = False` if a model does not "
                "train the table, and compile the model again."
            )
        self.assigned.add(id(variable))


class RowSparseVariable(keras.Variable):  # type: ignore[misc]
    """A variable whose rows change by lookups alone: a table, or a slot of its row optimizer.

    Its gradient is its next value, as a lookup computes it (`row_update.look_up`). Whatever would compute another
    gradient is an error.

    Attributes:
        update: the update that the table and its slots share.
    """

    update: RowUpdate

    @property
    def overwrite_with_gradient(self) -> bool:
        """`True`: optimizers assign the gradient. They read this property, which is the place to check them."""
        for optimizer in _optimizers_on_the_stack():
            check_optimizer(optimizer, self.path)
        return True

    def assign(self, value: Any) -> Any:
        """Assigns a value. What an optimizer assigns must be the update of a lookup."""
        if _is_called_by_an_optimizer():
            self.update.take(self)
        return super().assign(value)


class RowSparseTable(RowSparseVariable):
    """The table itself.

    Attributes:
        slots: what its optimizer keeps for each row.
    """

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
        """Whether rows are trained. The slots follow."""
        return bool(super().trainable)

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        for variable in (self, *self.slots):
            keras.Variable.trainable.fset(variable, trainable)


def tie(table: RowSparseTable, slots: tuple[RowSparseVariable, ...]) -> None:
    """Ties a table to its slots: they share updates, and are trainable together."""
    update = RowUpdate()
    for variable in (table, *slots):
        variable.update = update
    table.slots = slots


def check_optimizer(optimizer: keras.optimizers.Optimizer, table: str) -> None:
    """Raises `ValueError` if an optimizer does to gradients what next values do not survive.

    Args:
        optimizer: the optimizer of a model.
        table: path of a row-sparse table of the model.
    """
    fixes = {
        "gradient_accumulation_steps": "Train with larger batches: the cost of a step follows its batch.",
        "use_ema": "Leave it out: a moving average would process the whole table in each step.",
        "loss_scale_factor": 'Leave it out; the dtype policy "mixed_bfloat16" needs none.',
    }
    for name, fix in fixes.items():
        if getattr(optimizer, name, None):
            raise ValueError(
                "The optimizer of a model with a `RowSparseEmbedding`, whose rows have their own optimizer, must "
                f"leave gradients as they are. Received: {name}={getattr(optimizer, name)!r} for {table!r}. {fix}"
            )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "The optimizer of a model with a `RowSparseEmbedding` must not scale the loss: the rows would be trained "
            f"on scaled gradients. Received: a `LossScaleOptimizer` for {table!r}, which Keras creates under "
            '"mixed_float16". Use the dtype policy "mixed_bfloat16", or `compile(auto_scale_loss=False)`.'
        )


def _current_trace() -> Any:
    return get_opaque_trace_state(convention="flax")


# Keras has no hook by which a variable could refuse an optimizer, and an assignment does not say who makes it. A value
# that a user assigns is not to be checked, and so the callers are looked at.


def _is_called_by_an_optimizer() -> bool:
    callers = _callers(sys._getframe(1))
    next(callers)  # What has called this function.
    caller = next(callers, None)
    return caller is not None and isinstance(caller.f_locals.get("self"), keras.optimizers.Optimizer)


def _optimizers_on_the_stack() -> list[keras.optimizers.Optimizer]:
    callers = (frame.f_locals.get("self") for frame in _callers(sys._getframe(1)))
    return [caller for caller in callers if isinstance(caller, keras.optimizers.Optimizer)]


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
