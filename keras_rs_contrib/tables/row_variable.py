"""Variables that Keras optimizers overwrite with their gradient, and checks that each gradient is a valid update."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import keras

from keras_rs_contrib.arguments import check_can_train
from keras_rs_contrib.tables.row_update import Table, constant

# Name of the variable that holds the table.
TABLE_NAME = "embeddings"


class RowUpdates:
    """The updates of one table that lookups have computed, shared by the table and its slots.

    Keras optimizers overwrite these variables with their gradients. A gradient is the next value of a variable only if
    it is the very value that a lookup has computed. If the loss does not depend on a lookup, it is 0 and would erase
    the table; the sum of two gradients would double it.
    """

    def __init__(self) -> None:
        self._computed: list[_Update] = []
        # Counts the changes of the table.
        self._version = 0
        # The update that an optimizer is assigning, and what it has replaced so far.
        self._assigned: _Update | None = None
        self._replaced: list[tuple[RowSparseVariable, Any]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> RowUpdates:
        return RowUpdates()

    def note(self, table: Table, updated: Table) -> None:
        """Records the update that a lookup has computed.

        Args:
            table: the values of the table and its slots.
            updated: their values after the step.
        """
        values = {TABLE_NAME: updated.embeddings, **updated.slots}
        # Weak references, so that a gradient that is not applied does not keep its memory.
        references = {name: weakref.ref(value) for name, value in values.items()}
        self._computed = [update for update in self._computed if update.is_alive]
        self._computed.append(_Update(weakref.ref(table.embeddings), self._version, references))

    def note_assignment(self) -> None:
        """Records that the table has been changed by something else than an optimizer."""
        self._version += 1

    def take(self, variable: RowSparseVariable, value: Any) -> None:
        """Marks the update of a variable as assigned.

        Args:
            variable: the table or one of its slots.
            value: the value that an optimizer assigns to it.

        Raises:
            ValueError: if no lookup has computed this value, if it has been assigned before, or if the table has
                changed since. The variables of the same table that the optimizer has assigned already are restored.
        """
        update = next((each for each in self._computed if each.holds(variable.name, value)), None)
        if update is None:
            self._restore()
            raise ValueError(
                "The loss of a training step must depend on a lookup in each trainable `RowSparseEmbedding`, and "
                "gradients must be applied as they are, in the same (compiled) function that computes them. Received: "
                f"a new value for {variable.path!r} that no lookup has computed. The loss does not depend on a lookup "
                "in this table, or the lookup is inside `jax.vmap` or `keras.ops.vectorized_map`, or its gradient has "
                "been summed, scaled or clipped. Look up all ids in one call. If the model does not train the table, "
                "set `trainable = False` and compile the model again."
            )
        if update is not self._assigned:
            # Of a function of values, only the values count; of variables, also a copy of their values is current.
            if update.version != self._version and update.table() is not variable.tied[0].value_for_lookup:
                self._restore()
                raise ValueError(
                    "A gradient of a `RowSparseEmbedding` is the table after the step, so it must come from the latest "
                    f"table. Received: an update of {variable.path!r} that was computed before the table changed. "
                    "Compute the gradient again, after the last one has been applied."
                )
            self._assigned, self._replaced = update, []
            self._version += 1
        del update.values[variable.name]
        self._replaced.append((variable, variable.value_for_lookup))
        if not update.values:
            self._replaced = []

    def _restore(self) -> None:
        for variable, value in self._replaced:
            keras.Variable.assign(variable, value)
        self._replaced = []


@dataclasses.dataclass(eq=False)
class _Update:
    """An update that a lookup has computed.

    Attributes:
        table: weak reference to the table that was looked up.
        version: the number of changes of the table before the update.
        values: weak references to the values after the step that are not assigned yet, by the names of the variables.
    """

    table: weakref.ref[Any]
    version: int
    values: dict[str, weakref.ref[Any]]

    @property
    def is_alive(self) -> bool:
        """Whether a value can still be assigned."""
        return any(value() is not None for value in self.values.values())

    def holds(self, name: str, value: Any) -> bool:
        """Returns whether `value` is the next value of a variable."""
        return name in self.values and self.values[name]() is value


class RowSparseVariable(keras.Variable):  # type: ignore[misc]
    """A variable that only lookups update: a table, or a slot of its row optimizer.

    The gradient is the next value, which `row_update.look_up` computes. Any other gradient is an error.

    Attributes:
        updates: the `RowUpdates` that the table and its slots share.
        tied: the table and its slots.
    """

    updates: RowUpdates
    tied: tuple[RowSparseVariable, ...] = ()

    @property
    def overwrite_with_gradient(self) -> bool:
        """`True`: optimizers assign the gradient. Each optimizer that reads this property is checked."""
        for optimizer in _optimizers_on_the_stack():
            check_optimizer(optimizer, self.path)
        return True

    def assign(self, value: Any) -> Any:
        """Assigns a value. An optimizer must assign the update that a lookup has computed."""
        if _is_called_by_an_optimizer():
            check_can_train(f"an optimizer step of {self.path!r}")
            self.updates.take(self, value)
        else:
            self.updates.note_assignment()
        return super().assign(value)

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

    slots: tuple[RowSparseVariable, ...] = ()


def tie(table: RowSparseTable, slots: tuple[RowSparseVariable, ...]) -> None:
    """Links a table and its slots, so that they share their updates and `trainable`."""
    updates = RowUpdates()
    for variable in (table, *slots):
        variable.updates, variable.tied = updates, (table, *slots)
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
