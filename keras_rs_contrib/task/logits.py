"""Labels, corrections and masks of in-batch softmax logits: pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

# The logit of a masked candidate. It is low enough for a softmax weight of exactly 0, and finite, so that a row with
# weight 0 contributes 0 and not NaN. TFRS uses the same value, so a custom loss sees the same logits.
MASKED = float(np.finfo(np.float32).min) / 100.0

# TFRS and Keras RS clip sampling probabilities to this minimum to keep the logarithm finite.
MIN_SAMPLING_PROBABILITY = 1e-6


def positive_labels(logits: Any, first_query: Any = 0) -> Any:
    """Returns the one-hot labels of in-batch softmax: candidate i of the batch is the positive of query i.

    Formula: `labels[i, j] = 1 if j == first_query + i else 0`.

    Args:
        logits: `[num_queries, num_candidates]` float scores of consecutive queries of a batch.
        first_query: int, position in the batch of the first of these queries.

    Returns:
        `[num_queries, num_candidates]` float32.
    """
    num_queries, num_candidates = ops.shape(logits)
    queries = ops.expand_dims(ops.add(ops.arange(num_queries, dtype="int32"), first_query), 1)
    candidates = ops.expand_dims(ops.arange(num_candidates, dtype="int32"), 0)
    return ops.cast(ops.equal(queries, candidates), "float32")


def subtract_log_probability(logits: Any, sampling_probability: Any, num_candidates: Any) -> Any:
    """Subtracts the log sampling probability from each candidate's logit.

    Formula: `logit[i, j] - log(clip(p, 1e-6, 1))`, where `p = sampling_probability[j]`, or `1 / num_candidates` if that
    is 0.

    The probability 0 means that there is no estimate, as for a candidate without training examples. It is still one of
    the `num_candidates` draws, and with the probability `1 / num_candidates` it counts like one candidate of the
    corpus: `mean(exp(score[i, j]) / p[j])` over the draws estimates the sum of `exp(score[i, j])` over the corpus. With
    the lower limit, as in TFRS and Keras RS, it would count like `1e6 / num_candidates` of them.

    Args:
        logits: `[num_queries, num_candidates]` float32 scores.
        sampling_probability: float, broadcastable to the shape of `logits`. Positive values are clipped to [1e-6, 1] as
            in TFRS and Keras RS.
        num_candidates: number of candidates without padding, at least 1.

    Returns:
        Corrected logits, shape and dtype of `logits`.

    Reference: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019.
    """
    probability = ops.cast(sampling_probability, "float32")
    one_draw = ops.divide(1.0, ops.cast(num_candidates, "float32"))
    probability = ops.where(ops.equal(probability, 0.0), one_draw, probability)
    return ops.subtract(logits, ops.log(ops.clip(probability, MIN_SAMPLING_PROBABILITY, 1.0)))


def accidental_hits(labels: Any, candidate_ids: Any, first_query: Any = 0) -> Any:
    """Returns which negatives have the id of the query's positive.

    Formula: `hits[i, j] = (ids[j] == ids[first_query + i]) and (labels[i, j] == 0)`.

    Args:
        labels: `[num_queries, num_candidates]` float32, the one-hot labels that `positive_labels` returns.
        candidate_ids: `[num_candidates]` int ids; row i is the id of the positive of query i of the batch.
        first_query: int, position in the batch of the first of these queries.

    Returns:
        `[num_queries, num_candidates]` bool, False for the positives themselves.
    """
    positive_ids = ops.slice(candidate_ids, [first_query], [ops.shape(labels)[0]])
    same_id = ops.equal(ops.expand_dims(positive_ids, 1), ops.expand_dims(candidate_ids, 0))
    return ops.logical_and(same_id, ops.equal(labels, 0.0))


def mask_logits(logits: Any, keep: Any) -> Any:
    """Sets the logits to `MASKED` where `keep` is False.

    Formula: `logit[i, j] if keep[i, j] else MASKED`.

    Args:
        logits: `[num_queries, num_candidates]` float32 scores.
        keep: bool, broadcastable to the shape of `logits`.

    Returns:
        Masked logits, shape and dtype of `logits`.
    """
    return ops.where(keep, logits, ops.cast(MASKED, logits.dtype))


def hardest_negatives(logits: Any, labels: Any, num_hard_negatives: int) -> tuple[Any, Any]:
    """Returns the logits and labels of each query's positive and of its negatives with the largest logits.

    A masked positive has no guaranteed column: as in TFRS, it competes with the negatives as if its logit were 0.

    Args:
        logits: `[num_queries, num_candidates]` float32 scores.
        labels: `[num_queries, num_candidates]` one-hot float32.
        num_hard_negatives: int, number of negatives to keep; all of them if there are fewer.

    Returns:
        Logits and labels, both `[num_queries, min(1 + num_hard_negatives, num_candidates)]` float32, the positive
        first.
    """
    positive_place = ops.where(ops.greater(logits, MASKED), float("inf"), 0.0)
    order = ops.where(ops.greater(labels, 0.0), positive_place, logits)
    num_candidates = ops.shape(logits)[1]
    if isinstance(num_candidates, int):
        num_kept = min(num_hard_negatives + 1, num_candidates)
    else:
        num_kept = ops.minimum(num_hard_negatives + 1, num_candidates)
    _, kept = ops.top_k(order, num_kept)
    return ops.take_along_axis(logits, kept, axis=1), ops.take_along_axis(labels, kept, axis=1)
