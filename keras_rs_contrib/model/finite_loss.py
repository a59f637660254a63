"""Stops training when the loss is not finite, and says what is wrong with the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops


class StopIfNotFinite(keras.callbacks.Callback):  # type: ignore[misc]
    """Stops training after an epoch whose loss is NaN or infinite.

    Attributes:
        found: name and value of the loss and the epoch, or `None`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: tuple[str, float, int] | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Checks the losses."""
        for name in ("loss", "val_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value) and self.model.check_inputs:
                self.found = (name, float(value), epoch)
                self.model.stop_training = True
                return


def not_finite(variables: Iterable[keras.Variable], name: str, value: float, epoch: int | None = None) -> str:
    """Returns the error message for a loss that is not finite.

    Args:
        variables: the trainable weights.
        name: name of the loss.
        value: the loss.
        epoch: the epoch, from 0, or `None`.
    """
    where = "" if epoch is None else f" in epoch {epoch + 1}"
    for variable in variables:
        values = ops.convert_to_numpy(variable.value)
        finite = np.isfinite(values).reshape(len(values) if values.ndim else 1, -1).all(axis=1)
        if not finite.all():
            rows = np.flatnonzero(~finite)
            place = f"{len(rows)} of {len(finite)} rows of {variable.path!r}, such as row {rows[0]}, are not finite"
            break
    else:
        place = "all weights are finite"
    return (
        f"The loss must be finite. Received: {name}={value}{where}; {place}. Lower the learning rate, and look "
        "for NaN and infinity in the features, the labels and the sample weights, and for ids without a row."
    )
