"""How likely each candidate is to be drawn into a batch, for the log-q correction of in-batch softmax."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.ids import IdArguments

# The variables of an estimate.
STATE = ("share", "share_error", "updated_at", "now", "total", "total_error")


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class StreamingSamplingProbability(IdArguments, keras.layers.Layer):  # type: ignore[misc]
    """Estimates the sampling probability of each candidate from the stream of training batches.

    In-batch softmax draws its negatives by their frequency, and so holds popular candidates down, unless the logarithm
    of each candidate's sampling probability is subtracted from its logit (`candidate_sampling_probability` of
    `DistributedTwoTowerTask`). This layer keeps the estimate as its state: called in training, it counts the candidates
    of the batch first. The probability is that of a single draw; the task needs it up to a factor only.

    The estimate is an exponential moving average of each candidate's share of the examples. A call costs as much as its
    batch is large, however many candidates there are: the averages of the others are left to decay until they are seen
    next. From the first batch on it is the share so far, and after `window` examples older ones begin to fade, so that
    it follows a distribution that shifts. Its relative error for a candidate of probability p is about
    `1 / sqrt(2 * window * p)`.

    Yi et al. average the number of steps between two batches with the candidate instead. That tells candidates apart
    that are in less than every batch; the most popular are in every one.

    Args:
        num_candidates: positive int; candidate ids are rows, 0 to `num_candidates` - 1.
        window: positive number of examples, of which the average is mostly made.
        counts: `[num_candidates]` non-negative numbers, such as how often each candidate occurs in the training data,
            to take the probabilities from. They then stay as they are. `None` to estimate them.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if `window` or `counts` are no numbers.
        ValueError: if an argument is out of range.

    Example:
    ```python
    sampling_probability = StreamingSamplingProbability(num_candidates=4)
    batch = np.array([3, 0, 3, 1])
    print(sampling_probability(batch, training=True))  # 0.5, 0.25, 0.5, 0.25
    ```

    Reference: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019.
    """

    def __init__(self, num_candidates: int, window: float = 1_000_000, counts: Any = None, **kwargs: Any) -> None:
        num_candidates = positive_int(num_candidates, "num_candidates")
        window = _check_window(window)
        if counts is not None:
            counts = _check_counts(counts, num_candidates)
        # A mixed precision policy would round the probabilities to 8 bits.
        kwargs.setdefault("dtype", "float32")
        super().__init__(autocast=False, **kwargs)
        self.num_candidates = num_candidates
        self.window = window
        self.is_fixed = counts is not None
        self.supports_masking = True
        self.share = self._add_state((num_candidates,), "share")
        if counts is not None:
            self.share.assign(counts / counts.sum())
        else:
            # The share of each candidate is that at the time of its last update. Times are counts of examples, and wrap
            # around after 2**32 of them: what is used is their difference.
            self.updated_at = self._add_state((num_candidates,), "updated_at", "int32")
            self.now = self._add_state((), "now", "int32")
            # The sum of all shares: below 1 until the average is full.
            self.total = self._add_state((), "total")
            # A step changes a share by so little that what float32 cuts off would add up over the window.
            self.share_error = self._add_state((num_candidates,), "share_error")
            self.total_error = self._add_state((), "total_error")
        self.built = True

    def _add_state(self, shape: tuple[int, ...], name: str, dtype: str = "float32") -> keras.Variable:
        return self.add_weight(shape=shape, initializer="zeros", dtype=dtype, trainable=False, name=name)

    def call(self, candidate_ids: Any, candidate_mask: Any = None, training: bool | None = None) -> Any:
        """Returns the probability of each candidate, in training with this batch in the estimate.

        Args:
            candidate_ids: `[batch]` int32, each in [0, `num_candidates`).
            candidate_mask: `[batch]` bool; False marks padding, which is not counted. `None` for none.
            training: whether to count the batch.

        Returns:
            `[batch]` float32 in [0, 1]: 0 for a candidate that has not been seen, and NaN for an id out of range, which
            is not counted either.

        Raises:
            TypeError: if ids are no integers.
            ValueError: if the ids are not flat, or the mask has another shape.
        """
        if len(candidate_ids.shape) != 1:
            raise ValueError(
                f"`candidate_ids` must have shape (batch,). Received: shape {tuple(candidate_ids.shape)}. Flatten them."
            )
        if candidate_mask is not None and tuple(candidate_mask.shape) != tuple(candidate_ids.shape):
            raise ValueError(
                "`candidate_mask` needs one bool for each of the ids. Received: "
                f"shape {tuple(candidate_mask.shape)} for ids of shape {tuple(candidate_ids.shape)}. Flatten it."
            )
        known = ops.logical_and(ops.greater_equal(candidate_ids, 0), ops.less(candidate_ids, self.num_candidates))
        rows = ops.clip(candidate_ids, 0, self.num_candidates - 1)
        if self.is_fixed:
            return ops.where(known, ops.take(self.share, rows, axis=0), float("nan"))
        if training:
            counted = known if candidate_mask is None else ops.logical_and(known, ops.cast(candidate_mask, "bool"))
            self._count(rows, ops.cast(counted, "float32"))
        state = {name: ops.convert_to_tensor(getattr(self, name)) for name in STATE}
        return ops.where(known, _probability(state, rows, self.window), float("nan"))

    def _count(self, rows: Any, counted: Any) -> None:
        state = {name: ops.convert_to_tensor(getattr(self, name)) for name in STATE}
        for name, value in _with_batch(state, rows, counted, self.window).items():
            getattr(self, name).assign(value)

    def compute_output_shape(self, candidate_ids_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the shape of the ids."""
        return candidate_ids_shape

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: probabilities carry no mask."""
        return

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor; counts are among the weights."""
        config: dict[str, Any] = super().get_config()
        config.update(num_candidates=self.num_candidates, window=self.window, is_fixed=self.is_fixed)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StreamingSamplingProbability:
        """Returns the layer that `get_config` describes, without its state."""
        config = dict(config)
        is_fixed = config.pop("is_fixed")
        # Weights replace these.
        return cls(**config, counts=np.ones(config["num_candidates"]) if is_fixed else None)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function compiled, on JAX: called eagerly, its many small steps would be sent off one by one."""
    return jax.jit(function) if keras.backend.backend() == "jax" else function


@_compiled
def _probability(state: dict[str, Any], rows: Any, window: float) -> Any:
    """Returns the probability of each row, `[batch]` float32."""
    share = ops.multiply(ops.take(state["share"], rows, axis=0), ops.exp(_age(state, rows, window)))
    return ops.divide_no_nan(share, state["total"])


@_compiled
def _with_batch(state: dict[str, Any], rows: Any, counted: Any, window: float) -> dict[str, Any]:
    """Returns the state with a batch in the average.

    Args:
        state: the values of `STATE`.
        rows: `[batch]` int32, in range.
        counted: `[batch]` float32, 1 for a row that counts and 0 for one that does not.
        window: examples.
    """
    num_counted = ops.sum(counted)
    batch_age = ops.divide(num_counted, -window)
    # What the batch weighs in the average, 1 - exp(-n / window), and a single one of its examples.
    gain = ops.negative(ops.expm1(batch_age))
    gained = ops.multiply(_sum_of_equals(rows, counted), ops.divide_no_nan(gain, num_counted))
    share, error = ops.take(state["share"], rows, axis=0), ops.take(state["share_error"], rows, axis=0)
    age = ops.add(_age(state, rows, window), batch_age)
    # Of a share that has faded to little, the difference would be less exact than the quotient.
    is_old = ops.less(age, -0.5)
    sum_if_old = ops.add(ops.multiply(share, ops.exp(age)), gained)
    share, error = _add_compensated(share, error, ops.add(ops.multiply(share, ops.expm1(age)), gained))
    share, error = ops.where(is_old, sum_if_old, share), ops.where(is_old, 0.0, error)
    change = ops.multiply(gain, ops.subtract(1.0, state["total"]))
    total, total_error = _add_compensated(state["total"], state["total_error"], change)
    now = ops.add(state["now"], ops.cast(num_counted, "int32"))
    places = ops.expand_dims(rows, 1)
    # Where a row comes twice, it gets the same twice.
    return {
        "share": ops.scatter_update(state["share"], places, share),
        "share_error": ops.scatter_update(state["share_error"], places, error),
        "updated_at": ops.scatter_update(state["updated_at"], places, ops.broadcast_to(now, ops.shape(rows))),
        "now": now,
        "total": total,
        "total_error": total_error,
    }


def _age(state: dict[str, Any], rows: Any, window: float) -> Any:
    """Returns how long ago the share of each row was updated, in windows, negative."""
    elapsed = ops.cast(ops.subtract(state["now"], ops.take(state["updated_at"], rows, axis=0)), "uint32")
    return ops.divide(ops.cast(elapsed, "float32"), -window)


def _sum_of_equals(rows: Any, values: Any) -> Any:
    """Returns, for each place, the sum of the values at all places with the same row.

    Args:
        rows: `[batch]` int32.
        values: `[batch]` float32.
    """
    order = ops.argsort(rows)
    in_order = ops.take(rows, order, axis=0)
    begins = ops.concatenate([ops.zeros((1,), "int32"), ops.cast(ops.not_equal(in_order[1:], in_order[:-1]), "int32")])
    group_in_order = ops.cumsum(begins)[: ops.shape(rows)[0]]
    sums = ops.segment_sum(ops.take(values, order, axis=0), group_in_order, num_segments=rows.shape[0])
    group = ops.take(group_in_order, ops.argsort(order), axis=0)
    return ops.take(sums, group, axis=0)


def _add_compensated(total: Any, error: Any, change: Any) -> tuple[Any, Any]:
    """Returns the sum of `total` and `change`, and what it is too large by, for the next addition to make up for.

    Reference: W. Kahan, "Further remarks on reducing truncation errors", CACM 8(1), 1965.
    """
    change = ops.subtract(change, error)
    result = ops.add(total, change)
    return result, ops.subtract(ops.subtract(result, total), change)


def _check_window(window: Any) -> float:
    if not isinstance(window, numbers.Real) or isinstance(window, bool):
        raise TypeError(f"`window` must be a number of examples. Received: window={window!r}. Pass 1_000_000, say.")
    result = float(window)
    if not 1 <= result < math.inf:
        raise ValueError(
            "`window` must be a number of examples, at least 1 and finite. "
            f"Received: window={window!r}. Pass about as many examples as a distribution takes to shift."
        )
    return result


def _check_counts(counts: Any, num_candidates: int) -> np.ndarray[Any, Any]:
    result = np.asarray(ops.convert_to_numpy(counts) if ops.is_tensor(counts) else counts)
    if result.dtype.kind not in "iuf":
        raise TypeError(
            f"`counts` must be numbers. Received: dtype {result.dtype}. Count with `np.bincount(ids, minlength=...)`."
        )
    if result.shape != (num_candidates,):
        raise ValueError(
            "`counts` needs one number for each candidate. Received: "
            f"shape {result.shape} for {num_candidates} candidates. "
            f"Count with `np.bincount(ids, minlength={num_candidates})`."
        )
    wrong = np.flatnonzero(~(np.isfinite(result) & (result >= 0)))
    if wrong.size:
        raise ValueError(
            "`counts` must be finite and not negative. Received: "
            f"{result[wrong[0]]} for candidate {wrong[0]}. Count how often each candidate occurs."
        )
    result = result.astype("float64")
    if not result.sum() > 0:
        raise ValueError(
            "`counts` must not all be 0: there would be no probability. Received: "
            f"{num_candidates} zeros. Drop `counts` to estimate them."
        )
    return result
