"""Row optimizers: they update only the rows of a table that are in the batch."""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_rs_contrib import _keras

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


class RowOptimizer:
    """Base class of optimizers that update only the rows of a table that are in the batch.

    A subclass defines the state of each row in `slots`, and the update of the rows in `update`.

    Args:
        learning_rate: positive float, or a `keras.optimizers.schedules.LearningRateSchedule` of the number of steps.
            In `TwoTowerModel.fit`, a float changes by the same factor as the learning rate of the optimizer of
            `compile`, which callbacks set: see `RowSparseEmbedding`. With a schedule, such callbacks are an error.
        clipnorm: positive float, or `None` for no clipping. The gradients of a row are summed over the batch. If the
            L2 norm of the sum is larger than `clipnorm`, the sum is scaled down to it.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of range.
    """

    def __init__(self, learning_rate: LearningRate, clipnorm: float | None = None) -> None:
        if not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            learning_rate = positive_number("learning_rate", learning_rate)
        self.learning_rate = learning_rate
        self.clipnorm = None if clipnorm is None else positive_number("clipnorm", clipnorm)

    def slots(self, output_dim: int) -> dict[str, tuple[int, float]]:
        """Returns the width and the initial value of each slot, by name.

        A slot is a table of optimizer state, with one row for each row of the embedding table.

        Args:
            output_dim: size of an embedding.
        """
        return {}

    def update(
        self, rows: Any, slots: dict[str, Any], gradients: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the rows and their slots after a step.

        Args:
            rows: `[num_rows, output_dim]` float32, the unique rows of the batch.
            slots: `[num_rows, width]` float32 each, by name.
            gradients: `[num_rows, output_dim]` float32, summed over the batch and clipped.
            learning_rate: float32 scalar.
            step: float32 scalar, the number of the step, starting at 1.

        Returns:
            The new rows and slots, shapes and dtypes of `rows` and `slots`.
        """
        raise NotImplementedError

    def clip(self, gradients: Any) -> Any:
        """Returns `[num_rows, output_dim]` gradients, each with an L2 norm of at most `clipnorm`.

        Formula: `g = g * min(1, clipnorm / ||g||)`, for each row.
        """
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
        """Creates a row optimizer from its config."""
        learning_rate = config["learning_rate"]
        if isinstance(learning_rate, dict):
            learning_rate = keras.saving.deserialize_keras_object(learning_rate)
        return cls(**{**config, "learning_rate": learning_rate})


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RowSGD(RowOptimizer):
    """Stochastic gradient descent, with the same result as `keras.optimizers.SGD` without momentum.

    Formula: `w = w - lr * g`.

    Args:
        learning_rate: positive float or schedule: see `RowOptimizer`.
        clipnorm: positive float, the largest L2 norm of the gradient of a row, or `None`: see `RowOptimizer`.
    """

    def __init__(self, learning_rate: LearningRate = 0.01, clipnorm: float | None = None) -> None:
        super().__init__(learning_rate, clipnorm)

    def update(
        self, rows: Any, slots: dict[str, Any], gradients: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the rows after a step: see `RowOptimizer.update`."""
        return ops.subtract(rows, ops.multiply(learning_rate, gradients)), slots


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RowAdagrad(RowOptimizer):
    """Adagrad, with the same result as `keras.optimizers.Adagrad`.

    Formula: `a = a + g^2; w = w - lr * g / sqrt(a + epsilon)`, with one accumulator `a` for each element of the table.

    Args:
        learning_rate: positive float or schedule: see `RowOptimizer`.
        initial_accumulator_value: float, at least 0.
        epsilon: positive float, added to the accumulator inside the square root.
        clipnorm: positive float, the largest L2 norm of the gradient of a row, or `None`: see `RowOptimizer`.

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
        """Returns the width and the initial value of each slot: see `RowOptimizer.slots`."""
        return {"accumulator": (output_dim, self.initial_accumulator_value)}

    def update(
        self, rows: Any, slots: dict[str, Any], gradients: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the rows and the accumulators after a step: see `RowOptimizer.update`."""
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
    """Adagrad with one accumulator for each row.

    Formula: `a = a + mean(g^2); w = w - lr * g / sqrt(a + epsilon)`, with the mean over the elements of the row.

    All elements of a row share one effective learning rate, so the result differs from `RowAdagrad`. The accumulators
    need `output_dim` times less memory.

    Args:
        learning_rate: positive float or schedule: see `RowOptimizer`.
        initial_accumulator_value: float, at least 0.
        epsilon: positive float, added to the accumulator inside the square root.
        clipnorm: positive float, the largest L2 norm of the gradient of a row, or `None`: see `RowOptimizer`.

    Reference: Mudigere et al., "Software-hardware co-design for fast and scalable training of deep learning
    recommendation models", ISCA 2022, arXiv 2104.05158.
    """

    def slots(self, output_dim: int) -> dict[str, tuple[int, float]]:
        """Returns the width and the initial value of each slot: see `RowOptimizer.slots`."""
        return {"accumulator": (1, self.initial_accumulator_value)}

    def _squared(self, gradients: Any) -> Any:
        return ops.mean(ops.square(gradients), axis=1, keepdims=True)


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class LazyAdam(RowOptimizer):
    """Adam that updates only the rows of the batch and their moments.

    Formula: `m = beta_1 * m + (1 - beta_1) * g; v = beta_2 * v + (1 - beta_2) * g^2;
    w = w - lr * sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)`, where `t` is the number of the step.

    `keras.optimizers.Adam` updates every row in every step, because the momentum of a row decays slowly. Here, rows
    outside the batch and their moments do not change. The bias correction counts all steps of the table. The moments
    are two values for each element of the table.

    Args:
        learning_rate: positive float or schedule: see `RowOptimizer`.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: positive float, added to the square root of the second moment before bias correction, as in Keras.
        clipnorm: positive float, the largest L2 norm of the gradient of a row, or `None`: see `RowOptimizer`.

    Reference: Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015. The name and the update of sparse
    rows follow `tfa.optimizers.LazyAdam` of TensorFlow Addons.
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
        """Returns the width and the initial value of each slot: see `RowOptimizer.slots`."""
        return {"momentum": (output_dim, 0.0), "velocity": (output_dim, 0.0)}

    def update(
        self, rows: Any, slots: dict[str, Any], gradients: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the rows and their moments after a step: see `RowOptimizer.update`."""
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


# Keras optimizers that convert to a row optimizer, and the settings that are copied.
COPIED_SETTINGS: dict[type, tuple[type[RowSGD | RowAdagrad], list[str]]] = {
    keras.optimizers.SGD: (RowSGD, []),
    keras.optimizers.Adagrad: (RowAdagrad, ["initial_accumulator_value", "epsilon"]),
}
# The other settings must have these values.
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
        optimizer: a name in `NAMES`, a `RowOptimizer`, the result of `keras.saving.serialize_keras_object` for one, or
            a `keras.optimizers.SGD` or `Adagrad`, whose settings are copied.

    Raises:
        TypeError: if the type of `optimizer` is not supported.
        ValueError: if the name is unknown, or if a setting of a Keras optimizer is not supported.
    """
    if isinstance(optimizer, dict):
        optimizer = keras.saving.deserialize_keras_object(optimizer)
    if isinstance(optimizer, RowOptimizer):
        return optimizer
    if isinstance(optimizer, str):
        if optimizer not in NAMES:
            raise ValueError(
                f"`optimizer` must be one of {sorted(NAMES)}. Received: optimizer={optimizer!r}. Pass one of these "
                f"names or an instance of {', '.join(f'`{kind.__name__}`' for kind in NAMES.values())}. Use "
                '"lazy_adam" instead of Adam, which updates every row in every step.'
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
            f"{learning_rate!r}. Pass a float or a `keras.optimizers.schedules.LearningRateSchedule`."
        )
    kind, copied = COPIED_SETTINGS[type(optimizer)]
    config = optimizer.get_config()
    for name, unused in UNUSED_SETTINGS.items():
        if config.get(name, unused) != unused:
            raise ValueError(
                f"`{name}` of `keras.optimizers.{type(optimizer).__name__}` is not supported for row updates, and must "
                f"be {unused!r}. Received: {name}={config[name]!r}. Remove it. To clip the gradient of each row, pass "
                f"`{kind.__name__}(clipnorm=...)`."
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
    """Returns `value` as a float.

    Args:
        name: name of the argument, for error messages.
        value: value of the argument.

    Raises:
        TypeError: if `value` is not a number.
        ValueError: if `value` is not positive or not finite.
    """
    number = _number(name, value)
    if not 0.0 < number < math.inf:
        raise ValueError(f"`{name}` must be positive and finite. Received: {name}={value!r}. Pass a positive float.")
    return number


def _not_negative(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"`{name}` must be finite and at least 0. Received: {name}={value!r}. Pass 0.0 or more.")
    return number


def _below_one(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={value!r}. Pass a float such as 0.9.")
    return number
