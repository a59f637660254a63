"""Learning rates of row optimizers, which follow the callbacks that set that of the optimizer of `compile`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding

# Callbacks of Keras that set the learning rate of the optimizer.
SETTING_RATES = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)


class FollowLearningRate(keras.callbacks.Callback):  # type: ignore[misc]
    """Multiplies the learning rate of each row optimizer by the factor by which the optimizer's rate has changed.

    The factor counts from the rates at the start of `fit`. If a callback sets the rate of a row optimizer, or restores
    it from a backup, it counts from then on.

    Args:
        tables: the tables that are trained.
    """

    def __init__(self, tables: list[RowSparseEmbedding]) -> None:
        super().__init__()
        self.tables = tables
        # The rates at the last look: of the optimizers, and of each table.
        self._rates: list[float] | None = None
        self._row_rates: list[float] = []
        self._trained: keras.Model | None = None

    def set_model(self, model: keras.Model) -> None:
        """Follows the optimizer of a model."""
        super().set_model(model)
        # `self.model` would put the state of the step back into the variables, and wait for it before each batch. Only
        # a callback that has used it can have changed a rate.
        self._trained = model

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Follows the optimizer."""
        self._follow()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Follows the optimizer."""
        self._follow()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Follows the optimizer."""
        self._follow()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Follows the optimizer."""
        self._follow()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Follows the optimizer, also if `EarlyStopping` has restored the weights, and so the rates, of an epoch."""
        self._follow(is_over=True)

    def _follow(self, is_over: bool = False) -> None:
        assert self._trained is not None
        rates = _rates_of(self._trained.optimizer)
        if rates is None:
            return
        if self._rates is None:
            for table in self.tables:
                _set_reference(table, rates)
        else:
            for table, last in zip(self.tables, self._row_rates, strict=True):
                is_assigned = _row_rate(table) != last
                if is_assigned and not is_over:
                    _set_reference(table, rates)
                elif rates != self._rates or (is_assigned and table.reference_rates is not None):
                    _set_row_rate(table, self._rates, rates)
        self._rates = rates
        self._row_rates = [_row_rate(table) for table in self.tables]


def with_row_rates(model: keras.Model, callbacks: Any) -> Any:
    """Returns the `callbacks` of `fit`, in any form, with one that lets the row optimizers of a model follow them.

    It is called after each of them: a callback that saves the model then saves rates that agree.

    Raises:
        ValueError: if a callback of Keras sets the learning rate, and a row optimizer has a schedule.
    """
    layers = [layer for layer in _keras.sublayers(model) if isinstance(layer, RowSparseEmbedding)]
    tables = [layer for layer in layers if layer.trainable]
    if not tables or callbacks is None:
        return callbacks
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    callbacks = keras.tree.flatten(callbacks)
    _check_can_follow(tables, callbacks)
    follow = FollowLearningRate(tables)
    return [follow, *(each for callback in callbacks for each in (callback, follow))]


def _check_can_follow(tables: list[RowSparseEmbedding], callbacks: Iterable[keras.callbacks.Callback]) -> None:
    for callback in callbacks:
        for table in tables:
            if isinstance(callback, SETTING_RATES) and not isinstance(table.optimizer.learning_rate, float):
                raise ValueError(_cannot_follow(table, f"`{type(callback).__name__}`"))


def _cannot_follow(table: RowSparseEmbedding, received: str) -> str:
    schedule = type(table.optimizer.learning_rate).__name__
    return (
        "A row optimizer with a learning rate schedule does not follow callbacks that set the learning rate. Received: "
        f"{received}, and the row optimizer of {table.name!r} with a `{schedule}`. Pass a float as the learning rate "
        "of the row optimizer, or a schedule to both optimizers and no such callback."
    )


def _rates_of(optimizer: keras.optimizers.Optimizer) -> list[float] | None:
    """Returns the learning rates that callbacks can set, or `None` if they cannot, or if the step holds them."""
    optimizers = getattr(optimizer, "optimizers", [optimizer])
    if not all(_keras.has_value(each.iterations) for each in optimizers):
        return None
    variables = [each.learning_rate for each in optimizers]
    if not all(isinstance(variable, keras.Variable) for variable in variables):
        return None
    return [float(ops.convert_to_numpy(variable)) for variable in variables]


def _row_rate(table: RowSparseEmbedding) -> float:
    """Returns the learning rate of a row optimizer; 0 for a schedule."""
    if not isinstance(table.optimizer.learning_rate, float):
        return 0.0
    return float(ops.convert_to_numpy(table.learning_rate))


def _set_reference(table: RowSparseEmbedding, rates: list[float]) -> None:
    # After a fit that has ended at 0, the reference of that fit remains.
    if rates[0] > 0:
        table.reference_rates = (rates[0], _row_rate(table))


def _set_row_rate(table: RowSparseEmbedding, last_rates: list[float], rates: list[float]) -> None:
    if not isinstance(table.optimizer.learning_rate, float):
        raise ValueError(_cannot_follow(table, f"a learning rate of {rates[0]:g} instead of {last_rates[0]:g}"))
    if len(rates) > 1:
        raise ValueError(
            "Row optimizers follow the learning rate of one optimizer. Received: callbacks that set the rates of "
            f"{len(rates)} optimizers, and the row optimizer of {table.name!r}. Compile with one optimizer, or set "
            "`learning_rate` of the layer in the same callback."
        )
    if table.reference_rates is None:
        raise ValueError(
            "The learning rate of the optimizer must be positive at the start of `fit` if callbacks change it, because "
            f"row optimizers change theirs by the same factor. Received: a rate of {last_rates[0]} at the start, then "
            f"{rates[0]:g}, and the row optimizer of {table.name!r}. Compile with the full learning rate, and let the "
            "callback begin at 0."
        )
    rate, row_rate = table.reference_rates
    table.learning_rate.assign(row_rate * rates[0] / rate)
