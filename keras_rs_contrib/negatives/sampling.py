"""Estimates of candidate sampling probabilities, for the log-q correction of in-batch softmax."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import explains_keywords, positive_int
from keras_rs_contrib.distribution import check_layout
from keras_rs_contrib.ids import IdArguments, check_known_ids

# The variables that hold the estimate.
STATE = ("share", "share_error", "updated_at", "now", "total", "total_error")


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class StreamingSamplingProbability(IdArguments, keras.layers.Layer):  # type: ignore[misc]
    """Estimates the sampling probability of each candidate from the stream of training batches.

    In-batch softmax draws negatives in proportion to their frequency, which lowers the scores of popular candidates.
    The log-q correction compensates for this: it subtracts the logarithm of each candidate's sampling probability from
    its logit (`candidate_sampling_probability` of `DistributedTwoTowerTask`). This layer holds the estimate as its
    state. In training, a call first counts the candidates of the batch. The result is the probability of a single draw.
    The task needs it only up to a constant factor.

    A candidate that has not occurred has the probability 0. In training, the estimate counts the batch first, so that
    only candidates outside the batch can have it. In validation, and with `counts`, new candidates have it too. The
    task treats 0 as unknown, so that they do not dominate the loss.

    The estimate is an exponential moving average of each candidate's share of the examples. The cost of a call depends
    on the batch size, not on the number of candidates: the average of a candidate decays only when the layer reads it.
    During the first `window` examples, the estimate is close to the share of all examples so far. Later, older examples
    fade, so that the estimate follows a distribution that shifts. The relative error for a candidate of probability `p`
    is about `1 / sqrt(2 * window * p)`.

    Yi et al. instead average the number of steps between two batches that contain the candidate. That does not
    distinguish candidates that are in every batch, as the most popular ones are.

    Args:
        num_candidates: positive int. Candidate ids are the row numbers 0 to `num_candidates - 1`.
        window: float, at least 1, number of examples after which the weight of an example has decayed to `1 / e`.
        counts: `[num_candidates]` non-negative numbers, such as the frequency of each candidate in the training data.
            The probabilities are then fixed: `counts / sum(counts)`. `None` estimates them.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if `window` or `counts` are not numbers, or ids are not integers.
        ValueError: if an argument is out of range, or has a wrong shape.

    Example:
    ```python
    sampling_probability = StreamingSamplingProbability(num_candidates=4)
    batch = np.array([3, 0, 3, 1])
    print(sampling_probability(batch, training=True))  # 0.5, 0.25, 0.5, 0.25
    ```

    Reference: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019.
    """

    @explains_keywords
    def __init__(self, num_candidates: int, *, window: float = 1_000_000, counts: Any = None, **kwargs: Any) -> None:
        num_candidates = positive_int(num_candidates, "num_candidates")
        window = _check_window(window)
        if counts is not None:
            counts = _check_counts(counts, num_candidates)
        # A mixed precision policy would round the probabilities to 16-bit floats.
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
            # `share` holds the value at the candidate's last update, `updated_at` the time of that update. Times are
            # counts of examples. They may wrap around after 2**32, because only differences are used.
            self.updated_at = self._add_state((num_candidates,), "updated_at", "int32")
            self.now = self._add_state((), "now", "int32")
            # The sum of all shares, which starts at 0 and approaches 1.
            self.total = self._add_state((), "total")
            # The change in one step is so small that float32 rounding errors would add up over the window. These
            # variables hold the compensation of Kahan summation.
            self.share_error = self._add_state((num_candidates,), "share_error")
            self.total_error = self._add_state((), "total_error")
        self.built = True

    def _add_state(self, shape: tuple[int, ...], name: str, dtype: str = "float32") -> keras.Variable:
        check_layout(f"{self.path or self.name}/{name}", shape)
        return self.add_weight(shape=shape, initializer="zeros", dtype=dtype, trainable=False, name=name)

    def call(self, candidate_ids: Any, *, candidate_mask: Any = None, training: bool | None = None) -> Any:
        """Returns the sampling probability of each candidate. In training, the estimate includes this batch.

        Args:
            candidate_ids: `[batch]` int32, each in [0, `num_candidates`).
            candidate_mask: `[batch]` bool; False marks padding, which is not counted. `None` if there is no padding.
            training: bool, whether to count the batch.

        Returns:
            `[batch]` float32 in [0, 1]: 0 for a candidate that has not occurred yet or has no counts, and NaN for
            padding out of range. In a compiled function, any id out of range gives NaN, and is not counted.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if the ids are not flat, the mask has another shape, or, outside of compiled functions, an id is
                out of range.
        """
        if len(candidate_ids.shape) != 1:
            raise ValueError(
                f"`candidate_ids` must have shape (batch,). Received: shape {tuple(candidate_ids.shape)}. "
                "Flatten the ids."
            )
        if candidate_mask is not None and tuple(candidate_mask.shape) != tuple(candidate_ids.shape):
            raise ValueError(
                "`candidate_mask` needs one bool for each id. Received: "
                f"shape {tuple(candidate_mask.shape)} for ids of shape {tuple(candidate_ids.shape)}. "
                "Pass a mask of the same shape."
            )
        check_known_ids(candidate_ids, self.num_candidates, self.name, candidate_mask)
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
        """Returns `None`: probabilities have no mask."""
        return

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor. `counts` are saved with the weights."""
        config: dict[str, Any] = super().get_config()
        config.update(num_candidates=self.num_candidates, window=self.window, is_fixed=self.is_fixed)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StreamingSamplingProbability:
        """Returns the layer that `get_config` describes, without its state."""
        config = dict(config)
        is_fixed = config.pop("is_fixed")
        # Placeholder counts: loading the weights replaces them.
        return cls(**config, counts=np.ones(config["num_candidates"]) if is_fixed else None)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles the function on JAX, where eager mode would dispatch its many small operations one by one."""
    return jax.jit(function) if keras.backend.backend() == "jax" else function


@_compiled
def _probability(state: dict[str, Any], rows: Any, window: float) -> Any:
    """Returns the probability of each row.

    Formula: `share[i] * exp(-(now - updated_at[i]) / window) / total`.

    Args:
        state: values of the variables in `STATE`.
        rows: `[batch]` int32, in range.
        window: float, number of examples.

    Returns:
        `[batch]` float32.
    """
    age = _age(ops.take(state["updated_at"], rows, axis=0), state["now"], window)
    share = ops.multiply(ops.take(state["share"], rows, axis=0), ops.exp(age))
    return ops.divide_no_nan(share, state["total"])


@_compiled
def _with_batch(state: dict[str, Any], rows: Any, counted: Any, window: float) -> dict[str, Any]:
    """Returns the state with a batch added to the average.

    Formula: `share[i] = share[i] * exp(-(now + n - updated_at[i]) / window) + (1 - exp(-n / window)) * n[i] / n`, where
    `n` is the number of counted examples in the batch and `n[i]` the number of those with candidate `i`.

    Args:
        state: values of the variables in `STATE`.
        rows: `[batch]` int32, in range.
        counted: `[batch]` float32, 1 for an example that counts and 0 for padding.
        window: float, number of examples.

    Returns:
        Values of the variables in `STATE`.
    """
    num_counted = ops.sum(counted)
    batch_age = ops.divide(num_counted, -window)
    # The weight of the batch in the average, `1 - exp(-n / window)`. All its examples have the same part of it.
    gain = ops.negative(ops.expm1(batch_age))
    counts = _sum_of_equals(rows, counted)
    gained = ops.multiply(counts, ops.divide_no_nan(gain, num_counted))
    before = {name: ops.take(state[name], rows, axis=0) for name in ("share", "share_error", "updated_at")}
    share, error = before["share"], before["share_error"]
    age = ops.add(_age(before["updated_at"], state["now"], window), batch_age)
    # A share that has decayed a lot is more exact as a product with `exp(age)` than as a sum with its change.
    is_old = ops.less(age, -0.5)
    sum_if_old = ops.add(ops.multiply(share, ops.exp(age)), gained)
    share, error = _add_compensated(share, error, ops.add(ops.multiply(share, ops.expm1(age)), gained))
    share, error = ops.where(is_old, sum_if_old, share), ops.where(is_old, 0.0, error)
    change = ops.multiply(gain, ops.subtract(1.0, state["total"]))
    total, total_error = _add_compensated(state["total"], state["total_error"], change)
    now = ops.add(state["now"], ops.cast(num_counted, "int32"))
    after = {"share": share, "share_error": error, "updated_at": now}
    places = ops.expand_dims(rows, 1)
    # If a row occurs twice, both updates write the same value. Padding writes what it has read. As each value that is
    # written depends on the one before, XLA reads first, and writes in place. Otherwise, it would copy the whole state.
    rows_after = {
        name: ops.scatter_update(state[name], places, ops.where(ops.greater(counts, 0.0), after[name], before[name]))
        for name in before
    }
    return {**rows_after, "now": now, "total": total, "total_error": total_error}


def _age(updated_at: Any, now: Any, window: float) -> Any:
    """Returns the exponent of the decay since the last update of each row.

    Formula: `-(now - updated_at[i]) / window`.
    """
    elapsed = ops.cast(ops.subtract(now, updated_at), "uint32")
    return ops.divide(ops.cast(elapsed, "float32"), -window)


def _sum_of_equals(rows: Any, values: Any) -> Any:
    """Returns, for each position, the sum of the values at all positions with the same row.

    Formula: `sums[i] = sum(values[j])` over all `j` with `rows[j] == rows[i]`.

    Args:
        rows: `[batch]` int32.
        values: `[batch]` float32.

    Returns:
        `[batch]` float32.
    """
    order = ops.argsort(rows)
    in_order = ops.take(rows, order, axis=0)
    begins = ops.concatenate([ops.zeros((1,), "int32"), ops.cast(ops.not_equal(in_order[1:], in_order[:-1]), "int32")])
    group_in_order = ops.cumsum(begins)[: ops.shape(rows)[0]]
    sums = ops.segment_sum(ops.take(values, order, axis=0), group_in_order, num_segments=rows.shape[0])
    group = ops.take(group_in_order, ops.argsort(order), axis=0)
    return ops.take(sums, group, axis=0)


def _add_compensated(total: Any, error: Any, change: Any) -> tuple[Any, Any]:
    """Adds `change` to `total` with Kahan summation.

    Formulas: `sum = total + (change - error)`, `new_error = (sum - total) - (change - error)`.

    Args:
        total: float32, any shape.
        error: float32, the rounding error of the previous addition: the amount by which `total` is too large.
        change: float32.

    Returns:
        The sum and its rounding error, to pass to the next addition.

    Reference: W. Kahan, "Further remarks on reducing truncation errors", CACM 8(1), 1965.
    """
    change = ops.subtract(change, error)
    result = ops.add(total, change)
    return result, ops.subtract(ops.subtract(result, total), change)


def _check_window(window: Any) -> float:
    if not isinstance(window, numbers.Real) or isinstance(window, bool):
        raise TypeError(
            f"`window` must be a number of examples. Received: window={window!r}. Pass a number such as 1_000_000."
        )
    result = float(window)
    if not 1 <= result < math.inf:
        raise ValueError(
            "`window` must be a finite number of examples, at least 1. "
            f"Received: window={window!r}. Pass the number of examples in which the distribution shifts noticeably."
        )
    return result


def _check_counts(counts: Any, num_candidates: int) -> np.ndarray[Any, Any]:
    result = np.asarray(ops.convert_to_numpy(counts) if ops.is_tensor(counts) else counts)
    if result.dtype.kind not in "iuf":
        raise TypeError(
            f"`counts` must be numbers. Received: dtype {result.dtype}. "
            f"Compute them with `np.bincount(ids, minlength={num_candidates})`."
        )
    if result.shape != (num_candidates,):
        raise ValueError(
            "`counts` needs one number for each candidate. Received: "
            f"shape {result.shape} for {num_candidates} candidates. "
            f"Compute them with `np.bincount(ids, minlength={num_candidates})`."
        )
    wrong = np.flatnonzero(~(np.isfinite(result) & (result >= 0)))
    if wrong.size:
        raise ValueError(
            "`counts` must be finite and at least 0. Received: "
            f"{result[wrong[0]]} for candidate {wrong[0]}. Pass the number of occurrences of each candidate."
        )
    result = result.astype("float64")
    if not result.sum() > 0:
        raise ValueError(
            "`counts` must have at least one positive value. Received: "
            f"{num_candidates} zeros. Pass `counts=None` to estimate the probabilities."
        )
    return result
