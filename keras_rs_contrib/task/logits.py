"""What is done to the logits of in-batch negatives: pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

# The logit of a candidate that is out of the running. Low enough that its softmax weight is exactly 0, and finite, so
# that a row that weighs nothing contributes 0 and not NaN. The value is the one TFRS uses: a loss of the caller's own
# sees the same logits.
MASKED = float(np.finfo(np.float32).min) / 100.0

# Where TFRS and Keras RS clip sampling probabilities, to keep the logarithm finite.
MIN_SAMPLING_PROBABILITY = 1e-6


def positive_labels(logits: Any, first_query: Any = 0) -> Any:
    """Returns the one-hot labels of in-batch softmax: candidate i is the positive of query i.

    Args:
        logits: `[num_queries, num_candidates]` float scores of consecutive queries of a batch.
        first_query: int, the first one's place in the batch.

    Returns:
        `[num_queries, num_candidates]` float32, 1 where query and candidate have the same place and 0 elsewhere.
    """
    num_queries, num_candidates = ops.shape(logits)
    queries = ops.expand_dims(ops.add(ops.arange(num_queries, dtype="int32"), first_query), 1)
    candidates = ops.expand_dims(ops.arange(num_candidates, dtype="int32"), 0)
    return ops.cast(ops.equal(queries, candidates), "float32")


def subtract_log_probability(logits: Any, candidate_sampling_probability: Any) -> Any:
    """Subtracts the log sampling probability from each candidate's logit.

    Args:
        logits: `[num_queries, num_candidates]` float32 scores.
        candidate_sampling_probability: `[num_candidates]` float, clipped to [1e-6, 1] as TFRS and Keras RS do.

    Returns:
        Corrected logits, shape and dtype of `logits`.

    Reference: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019.
    """
    probability = ops.clip(ops.cast(candidate_sampling_probability, "float32"), MIN_SAMPLING_PROBABILITY, 1.0)
    return ops.subtract(logits, ops.expand_dims(ops.log(probability), 0))


def accidental_hits(labels: Any, candidate_ids: Any, first_query: Any = 0) -> Any:
    """Returns where a negative is the query's own positive candidate once more.

    Args:
        labels: `[num_queries, num_candidates]`, the one-hot labels of `positive_labels`.
        candidate_ids: `[num_candidates]` integer ids; row i is the id of the positive of the batch's query i.
        first_query: int, the place in the batch of the first query.

    Returns:
        `[num_queries, num_candidates]` bool, False on the positives themselves.
    """
    positive_ids = ops.slice(candidate_ids, [first_query], [ops.shape(labels)[0]])
    same_id = ops.equal(ops.expand_dims(positive_ids, 1), ops.expand_dims(candidate_ids, 0))
    return ops.logical_and(same_id, ops.equal(labels, 0.0))


def mask_logits(logits: Any, keep: Any) -> Any:
    """Returns the logits with those outside `keep` set to `MASKED`.

    Args:
        logits: `[num_queries, num_candidates]` float32 scores.
        keep: bool, of a shape that broadcasts to that of `logits`.

    Returns:
        Masked logits, shape and dtype of `logits`.
    """
    return ops.where(keep, logits, ops.cast(MASKED, logits.dtype))


def hardest_negatives(logits: Any, labels: Any, num_hard_negatives: int) -> tuple[Any, Any]:
    """Returns each query's positive and the `num_hard_negatives` negatives with the largest logits.

    A positive that is masked itself has no claim to its place: as in TFRS, it competes as if its logit were 0.

    Args:
        logits: `[num_queries, num_candidates]` float32 scores.
        labels: `[num_queries, num_candidates]` one-hot float32.
        num_hard_negatives: how many negatives to keep; all of them where there are fewer.

    Returns:
        The logits and the labels, both `[num_queries, 1 + kept negatives]`, the positive first.
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
