"""Optimizers of the rows of a table that a batch has looked up: what they keep, and pure functions of arrays."""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_rs_contrib import _keras

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


class RowOptimizer:
    """An optimizer of those rows of a table that are in a batch; all others stay as they are.

    A subclass says what is kept for each row, in `slots`, and how rows change, in `update`.

    Args:
        learning_rate: positive float, or a `keras.optimizers.schedules.LearningRateSchedule` of the number of steps.
        clipnorm: positive float; the gradient of a row, summed over the places of the row in the batch, is scaled down
            to this L2 norm where it is longer. `None` for no clipping.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if an argument is out of range.
    """

    def __init__(self, learning_rate: LearningRate, clipnorm: float | None = None) -> None:
        if not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            learning_rate = positive_number("learning_rate", learning_rate)
        self.learning_rate = learning_rate
        self.clipnorm = None if clipnorm is None else positive_number("clipnorm", clipnorm)

    def slots(self, output_dim: int) -> dict[str, tuple[int, float]]:
        """Returns the width and the initial value of each table that is kept beside that of `output_dim`."""
        return {}

    def update(
        self, rows: Any, slots: dict[str, Any], gradients: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the rows and their slots after a step.

        Args:
            rows: `[num_rows, output_dim]` float32, each row of the batch once.
            slots: `[num_rows, width]` float32 each.
            gradients: `[num_rows, output_dim]` float32, clipped.
            learning_rate: float32 scalar.
            step: float32 scalar, the number of the step, from 1 on.
        """
        raise NotImplementedError

    def clip(self, gradients: Any) -> Any:
        """Returns `[num_rows, output_dim]` gradients, none longer than `clipnorm`."""
        if self.clipnorm is None:
            return gradients
        squared_norm = ops.sum(ops.square(gradients), axis=1, keepdims=True)
        is_long = ops.greater(squared_norm, self.clipnorm**2)
        return ops.multiply(
            gradients, ops.where(is_long, ops.multiply(ops.rsqrt(ops.maximum(squared_norm, 1e-37)), self.clipnorm), 1.0)
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        learning_rate = self.learning_rate
        if not isinstance(learning_rate, float):
            learning_rate = keras.saving.serialize_keras_object(learning_rate)
        return {"learning_rate": learning_rate, "clipnorm": self.clipnorm}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RowOptimizer:
        """Returns the optimizer that `get_config` describes."""
        learning_rate = config["learning_rate"]
        if isinstance(learning_rate, dict):
            learning_rate = keras.saving.deserialize_keras_object(learning_rate)
        return cls(**{**config, "learning_rate": learning_rate})


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RowSGD(RowOptimizer):
    """Stochastic gradient descent, as `keras.optimizers.SGD` without momentum does it to a whole table.

    Args:
        learning_rate: see `RowOptimizer`, as `clipnorm`.
        clipnorm: by row.
    """

    def __init__(self, learning_rate: LearningRate = 0.01, clipnorm: float | None = None) -> None:
        super().__init__(learning_rate, clipnorm)

    def update(
        self, rows: Any, slots: dict[str, Any], gradients: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the rows after a step: see `RowOptimizer`."""
        return ops.subtract(rows, ops.multiply(learning_rate, gradients)), slots


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RowAdagrad(RowOptimizer):
    """Adagrad, as `keras.optimizers.Adagrad` does it to a whole table: a row without gradient stays as it is there too.

    It keeps one accumulator for each number of the table.

    Args:
        learning_rate: see `RowOptimizer`, as `clipnorm`.
        initial_accumulator_value: float, at least 0.
        epsilon: positive float, added to the accumulator under the root.
        clipnorm: by row.

    Reference: Duchi et al., "Adaptive subgradient methods for online learning and stochastic optimization", JMLR 2011.
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        clipnorm: float | None = None,
    ) -> None:
        super().__init__(learning_rate, clipnorm)
        self.initial_accumulator_value = _not_negative("initial_accumulator_value", initial_accumulator_value)
        self.epsilon = positive_number("epsilon", epsilon)

    def slots(self, output_dim: int) -> dict[str, tuple[int, float]]:
        """Returns what is kept: see `RowOptimizer`."""
        return {"accumulator": (output_dim, self.initial_accumulator_value)}

    def update(
        self, rows: Any, slots: dict[str, Any], gradients: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the rows and the accumulators after a step: see `RowOptimizer`."""
        accumulator = ops.add(slots["accumulator"], self._squared(gradients))
        change = ops.divide(ops.multiply(learning_rate, gradients), ops.sqrt(ops.add(accumulator, self.epsilon)))
        return ops.subtract(rows, change), {"accumulator": accumulator}

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        own = {"initial_accumulator_value": self.initial_accumulator_value, "epsilon": self.epsilon}
        return {**super().get_config(), **own}

    def _squared(self, gradients: Any) -> Any:
        return ops.square(gradients)


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RowWiseAdagrad(RowAdagrad):
    """Adagrad with one accumulator a row, which adds up the mean of the squares of the row's gradient.

    All numbers of a row share a learning rate, so it learns otherwise than `RowAdagrad`, and what it keeps is smaller
    by `output_dim`.

    Args:
        learning_rate: see `RowOptimizer`, as `clipnorm`.
        initial_accumulator_value: float, at least 0.
        epsilon: positive float, added to the accumulator under the root.
        clipnorm: by row.

    Reference: Mudigere et al., "Software-hardware co-design for fast and scalable training of deep learning
    recommendation models", ISCA 2022, arXiv 2104.05158.
    """

    def slots(self, output_dim: int) -> dict[str, tuple[int, float]]:
        """Returns what is kept: see `RowOptimizer`."""
        return {"accumulator": (1, self.initial_accumulator_value)}

    def _squared(self, gradients: Any) -> Any:
        return ops.mean(ops.square(gradients), axis=1, keepdims=True)


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class LazyAdam(RowOptimizer):
    """Adam in which only the rows of the batch move, and only their moments decay.

    `keras.optimizers.Adam` moves every row in every step, by what is left of its momentum. Here a row waits with its
    moments as they are until it is next in a batch; the bias correction counts all steps of the table. It keeps two
    numbers for each of the table.

    Args:
        learning_rate: see `RowOptimizer`, as `clipnorm`.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: positive float, added to the root of the second moment before its bias is corrected, as in Keras.
        clipnorm: by row.

    Reference: Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015. The name is that of
    `tfa.optimizers.LazyAdam` of TensorFlow Addons, which does the same.
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        clipnorm: float | None = None,
    ) -> None:
        super().__init__(learning_rate, clipnorm)
        self.beta_1 = _below_one("beta_1", beta_1)
        self.beta_2 = _below_one("beta_2", beta_2)
        self.epsilon = positive_number("epsilon", epsilon)

    def slots(self, output_dim: int) -> dict[str, tuple[int, float]]:
        """Returns what is kept: see `RowOptimizer`."""
        return {"momentum": (output_dim, 0.0), "velocity": (output_dim, 0.0)}

    def update(
        self, rows: Any, slots: dict[str, Any], gradients: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the rows and their moments after a step: see `RowOptimizer`."""
        momentum = ops.add(slots["momentum"], (gradients - slots["momentum"]) * (1.0 - self.beta_1))
        velocity = ops.add(slots["velocity"], (ops.square(gradients) - slots["velocity"]) * (1.0 - self.beta_2))
        correction = ops.sqrt(1.0 - ops.power(self.beta_2, step)) / (1.0 - ops.power(self.beta_1, step))
        change = learning_rate * correction * momentum / (ops.sqrt(velocity) + self.epsilon)
        return ops.subtract(rows, change), {"momentum": momentum, "velocity": velocity}

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}


NAMES: dict[str, type[RowSGD | RowAdagrad | LazyAdam]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "lazy_adam": LazyAdam,
}


# Keras's dense optimizers that are taken over, with these settings.
COPIED_SETTINGS: dict[type, tuple[type[RowSGD | RowAdagrad], list[str]]] = {
    keras.optimizers.SGD: (RowSGD, []),
    keras.optimizers.Adagrad: (RowAdagrad, ["initial_accumulator_value", "epsilon"]),
}
# Their other settings must be these.
UNUSED_SETTINGS: dict[str, Any] = {
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}


def get(optimizer: str | dict[str, Any] | RowOptimizer | keras.optimizers.Optimizer) -> RowOptimizer:
    """Returns a row optimizer.

    Args:
        optimizer: one of `NAMES`, a `RowOptimizer`, what `keras.saving.serialize_keras_object` made of one, or a
            `keras.optimizers.SGD` or `Adagrad`, whose settings are taken over.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it has no name of these, or a setting of Keras's that cannot be kept.
    """
    if isinstance(optimizer, dict):
        optimizer = keras.saving.deserialize_keras_object(optimizer)
    if isinstance(optimizer, RowOptimizer):
        return optimizer
    if isinstance(optimizer, str):
        if optimizer not in NAMES:
            raise ValueError(
                f"`optimizer` must be one of {sorted(NAMES)}. Received: optimizer={optimizer!r}. Each is a class too: "
                f"{', '.join(f'`{kind.__name__}`' for kind in NAMES.values())}. Adam moves every row in every step; "
                '"lazy_adam" moves those of the batch.'
            )
        return NAMES[optimizer]()
    if type(optimizer) in COPIED_SETTINGS:
        return _from_keras(optimizer)
    raise TypeError(
        f"`optimizer` must be a name, a row optimizer, or a `keras.optimizers.SGD` or `Adagrad`. Received: "
        f"{optimizer!r} (of type {type(optimizer).__name__}). Pass one of {sorted(NAMES)}, or "
        f"{', '.join(f'`{kind.__name__}(...)`' for kind in NAMES.values())}."
    )


def _from_keras(optimizer: keras.optimizers.Optimizer) -> RowOptimizer:
    learning_rate = _keras.get_learning_rate(optimizer)
    if not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule | keras.Variable):
        raise ValueError(
            "The learning rate must be a number or a schedule. Received: "
            f"{learning_rate!r}. Make it a `keras.optimizers.schedules.LearningRateSchedule`."
        )
    kind, copied = COPIED_SETTINGS[type(optimizer)]
    config = optimizer.get_config()
    for name, unused in UNUSED_SETTINGS.items():
        if config.get(name, unused) != unused:
            raise ValueError(
                f"Of {type(optimizer).__name__}, rows can do without `{name}` alone. "
                f"Received: {name}={config[name]!r}. Leave it out; `clipnorm` by row is an argument of "
                f"`{kind.__name__}`."
            )
    if isinstance(learning_rate, keras.Variable):
        learning_rate = float(config["learning_rate"])
    return kind(learning_rate, **{name: config[name] for name in copied})


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r} (of type {type(value).__name__}). Pass a float."
        )
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Returns `value` as a float, or raises where it is none (`TypeError`), or not positive (`ValueError`)."""
    number = _number(name, value)
    if not 0.0 < number < math.inf:
        raise ValueError(f"`{name}` must be positive and finite. Received: {name}={value!r}. Pass a small number.")
    return number


def _not_negative(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"`{name}` must be finite, and at least 0. Received: {name}={value!r}. Pass 0 or more.")
    return number


def _below_one(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"`{name}` must lie in [0, 1). Received: {name}={value!r}. Pass a number such as 0.9.")
    return number
