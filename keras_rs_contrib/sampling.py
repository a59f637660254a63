"""How likely each candidate is to be drawn into a batch, for the log-q correction of in-batch softmax."""

from __future__ import annotations

import math
import numbers
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.candidate_ids import to_int32


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class StreamingSamplingProbability(keras.layers.Layer):  # type: ignore[misc]
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
        self.share = self.add_weight(
            shape=(num_candidates,), initializer="zeros", dtype="float32", trainable=False, name="share"
        )
        if counts is not None:
            self.share.assign(counts / counts.sum())
        else:
            self._add_clock()
        self.built = True

    def _add_clock(self) -> None:
        # The share of each candidate is that at the time of its last update. Times are counts of examples, and wrap
        # around: what is used is their difference.
        self.updated_at = self.add_weight(
            shape=(self.num_candidates,), initializer="zeros", dtype="int32", trainable=False, name="updated_at"
        )
        self.now = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False, name="now")
        # The sum of all shares: below 1 until the average is full.
        self.total = self.add_weight(shape=(), initializer="zeros", dtype="float32", trainable=False, name="total")

    def __call__(self, candidate_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what `call` does."""
        return super().__call__(to_int32(candidate_ids, "candidate_ids"), *args, **kwargs)

    def call(self, candidate_ids: Any, candidate_mask: Any = None, training: bool | None = None) -> Any:
        """Returns the probability of each candidate, in training with this batch in the estimate.

        Args:
            candidate_ids: `[batch]` int32, each in [0, `num_candidates`).
            candidate_mask: `[batch]` bool; False marks padding, which is not counted. `None` for none.
            training: whether to count the batch.

        Returns:
            `[batch]` float32 in [0, 1]: 0 for a candidate that has not been seen, and NaN, on JAX, for an id out of
            range.

        Raises:
            TypeError: if ids are no integers.
            ValueError: if the ids are not flat.
        """
        if len(candidate_ids.shape) != 1:
            raise ValueError(
                f"`candidate_ids` must have shape (batch,). Received: shape {tuple(candidate_ids.shape)}. Flatten them."
            )
        if self.is_fixed:
            return ops.take(self.share, candidate_ids, axis=0)
        if training:
            self._count(candidate_ids, candidate_mask)
        return ops.divide_no_nan(self._share_now(candidate_ids), self.total)

    def _share_now(self, candidate_ids: Any) -> Any:
        elapsed = ops.subtract(self.now, ops.take(self.updated_at, candidate_ids, axis=0))
        elapsed = ops.cast(ops.cast(elapsed, "uint32"), "float32")
        return ops.multiply(ops.take(self.share, candidate_ids, axis=0), ops.exp(ops.divide(elapsed, -self.window)))

    def _count(self, candidate_ids: Any, candidate_mask: Any) -> None:
        if candidate_mask is None:
            counted = ops.ones_like(candidate_ids, dtype="float32")
        else:
            counted = ops.cast(candidate_mask, "float32")
        num_counted = ops.sum(counted)
        kept = ops.exp(ops.divide(num_counted, -self.window))
        # 1 less what is kept, which in float32 would be nothing for a large window.
        added = ops.negative(ops.expm1(ops.divide(num_counted, -self.window)))
        gain = ops.divide(added, ops.maximum(num_counted, 1.0))
        places = ops.expand_dims(candidate_ids, 1)
        # Twice the same row gets twice the same share, and then two gains.
        share = ops.scatter_update(self.share, places, ops.multiply(self._share_now(candidate_ids), kept))
        self.share.assign(ops.scatter_update(share, places, ops.multiply(counted, gain), reduction="add"))
        now = ops.add(self.now, ops.cast(num_counted, "int32"))
        self.updated_at.assign(
            ops.scatter_update(self.updated_at, places, ops.broadcast_to(now, ops.shape(candidate_ids)))
        )
        self.now.assign(now)
        self.total.assign(ops.add(ops.multiply(self.total, kept), added))

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
