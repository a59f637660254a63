"""What watches over `fit`, `evaluate` and `predict`: losses that are no numbers, and weights that would be lost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops


class StopWhereNoNumber(keras.callbacks.Callback):  # type: ignore[misc]
    """Stops training after an epoch with a loss that is no number.

    Attributes:
        found: name and value of the loss and the epoch, or `None`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: tuple[str, float, int] | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks at the losses."""
        for name in ("loss", "val_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value) and self.model.check_inputs:
                self.found = (name, float(value), epoch)
                self.model.stop_training = True
                return


class WeightsKept(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps a model's weights, within `with`, where reading the data fails.

    Keras on JAX takes the values out of the variables before it asks for the first batch, and does not put them back
    where there is none.

    Args:
        model: the model.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.set_model(model)
        self._values: list[tuple[keras.Variable, Any]] = []

    def __enter__(self) -> WeightsKept:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        self.model.jax_state_sync()
        for variable, value in self._values:
            if variable._value is None and not value.is_deleted():
                variable._value = value

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the values, which the variables have now."""
        optimizer = getattr(self.model, "optimizer", None)
        variables = [*self.model.variables, *self.model.metrics_variables, *(optimizer.variables if optimizer else [])]
        self._values = [(variable, variable._value) for variable in variables if variable._value is not None]

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Does as for an epoch."""
        self.on_epoch_begin(0)

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Does as for an epoch."""
        self.on_epoch_begin(0)


def with_callbacks(callbacks: Any, *added: keras.callbacks.Callback) -> Any:
    """Returns the `callbacks` of `fit`, in whatever form, and those added."""
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [*([] if callbacks is None else keras.tree.flatten(callbacks)), *added]
    for callback in added:
        callbacks.append(callback)
    return callbacks


def no_number(variables: Iterable[keras.Variable], name: str, value: float, epoch: int | None = None) -> str:
    """Returns what to say where a loss is no number.

    Args:
        variables: the weights that are trained.
        name: name of the loss.
        value: the loss.
        epoch: where it was, from 0.
    """
    where = "" if epoch is None else f" in epoch {epoch + 1}"
    for variable in variables:
        values = ops.convert_to_numpy(variable.value)
        finite = np.isfinite(values).reshape(len(values) if values.ndim else 1, -1).all(axis=1)
        if not finite.all():
            rows = np.flatnonzero(~finite)
            place = f"{len(rows)} of {len(finite)} rows of {variable.path!r}, such as row {rows[0]}, are no numbers"
            break
    else:
        place = "all weights are numbers"
    return (
        f"The loss must be a number. Received: {name}={value}{where}; {place}. Lower the learning rate, and look "
        "for NaN and infinity in the features, the labels and the sample weights, and for ids without a row."
    )
