"""Keeps a model's weights if `fit`, `evaluate` or `predict` fails."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rs_contrib import _keras


def own_values(model: keras.Model) -> list[keras.Variable]:
    """Returns all variables of a model and its optimizer, after giving each an array of its own.

    At the end of `fit`, an optimizer with `use_ema=True` assigns one array to a weight and to its average. A step
    donates the arrays of all variables, which fails if it is given one array twice.

    Args:
        model: a model.
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *model.metrics_variables, *(optimizer.variables if optimizer else [])]
    seen: dict[int, int] = {}
    for variable in variables:
        if _keras.has_value(variable) and seen.setdefault(id(variable.value), id(variable)) != id(variable):
            variable.assign(ops.copy(variable.value))
    return variables


class WeightGuard(keras.callbacks.Callback):  # type: ignore[misc]
    """Restores a model's weights, within `with`, if an error occurs before the first step of an epoch is done.

    Keras on JAX takes the values out of the variables before it asks for the first batch and compiles the step, and
    does not put them back if that fails.

    Args:
        model: the model.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.set_model(model)
        self._values: list[tuple[keras.Variable, Any]] = []

    def __enter__(self) -> WeightGuard:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or keras.backend.backend() != "jax":
            return
        self.model.jax_state_sync()
        for variable, value in self._values:
            if not _keras.has_value(variable) and not value.is_deleted():
                variable.assign(value)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the values, which the variables still have now."""
        variables = own_values(self.model)
        self._values = [(variable, variable.value) for variable in variables if _keras.has_value(variable)]

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Notes the values."""
        self.on_epoch_begin(0)

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Notes the values."""
        self.on_epoch_begin(0)
