"""Stops training when the loss is not finite, and says what is wrong with the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import on_host


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


def row_not_finite(tower: keras.layers.Layer, inputs: Any, sample_weight: Any) -> int | None:
    """Returns the first row whose embedding is not finite, whatever the weights of the tower are, or `None`.

    Args:
        tower: a built tower. Weights that are not finite are replaced for the time of the call.
        inputs: its features, as arrays.
        sample_weight: `[batch]`; rows of weight 0 are padding.
    """
    generator = np.random.default_rng(0)

    def finite(variable: keras.Variable) -> Any:
        values = on_host(variable)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            return variable.value
        # Random, because a tower may divide by a norm.
        values = np.where(np.isfinite(values), values, generator.normal(0, 0.05, values.shape)).astype(values.dtype)
        return ops.convert_to_tensor(values)

    mapping = [(variable, finite(variable)) for variable in tower.variables]
    with keras.StatelessScope(state_mapping=mapping):
        outputs = tower(inputs, training=False)
    is_finite = np.isfinite(on_host(outputs).astype("float32")).reshape(len(sample_weight), -1).all(axis=1)
    rows = np.flatnonzero(~is_finite & (np.asarray(sample_weight) != 0))
    return int(rows[0]) if rows.size else None


def no_embedding(kind: str, row: str, features: dict[str, Any], seen: str = "") -> str:
    """Returns the error message for an embedding that is not finite.

    Args:
        kind: `"query"` or `"candidate"`.
        row: which row it is.
        features: the features of the row.
        seen: what has shown it, such as `"loss=nan, "`.
    """
    listed = ", ".join(f"{name}={np.array2string(np.asarray(x), threshold=8)}" for name, x in features.items())
    return (
        f"The embedding of each {kind} must be finite. Received: {seen}NaN or infinity for {row}, with the features "
        f"{listed}. Leave such rows out, or let the tower handle them: an average over an empty history, for instance, "
        "divides by 0."
    )


def not_finite(variables: Iterable[keras.Variable], where: str) -> str:
    """Returns the error message for a loss that is not finite although all embeddings could be.

    Args:
        variables: the trainable weights.
        where: the loss, and in which epoch.
    """
    for variable in variables:
        values = on_host(variable)
        finite = np.isfinite(values).reshape(len(values) if values.ndim else 1, -1).all(axis=1)
        if not finite.all():
            rows = np.flatnonzero(~finite)
            place = f"{len(rows)} of {len(finite)} rows of {variable.path!r}, such as row {rows[0]}, are not finite"
            break
    else:
        place = "all weights are finite"
    return (
        f"The loss must be finite. Received: {where}; {place}. Lower the learning rate, and look "
        "for NaN and infinity in the features, the labels and the sample weights, and for ids without a row."
    )
