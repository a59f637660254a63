"""Labels, corrections and masks of in-batch softmax logits: pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_rs_contrib.ids import NO_CANDIDATE

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


def number_ids(candidate_ids: Any, positive_ids: Any) -> tuple[Any, Any]:
    """Returns numbers for ids: equal numbers for equal ids, small enough to be places in a row of logits.

    Args:
        candidate_ids: `[num_candidates]` int32.
        positive_ids: `[num_queries, m]` int32, padded with -1.

    Returns:
        `[num_candidates]` int32 in [0, `num_candidates`) for the candidates, and `[num_queries, m]` int32 for the
        positives: the number of the candidates with that id, or `num_candidates` if there is none.
    """
    num_candidates = ops.shape(candidate_ids)[0]
    in_order = ops.sort(candidate_ids)

    def first_place(ids: Any) -> Any:
        return ops.cast(ops.searchsorted(in_order, ids), "int32")

    flat_ids = ops.reshape(positive_ids, (-1,))
    places = first_place(flat_ids)
    ids_there = ops.take(in_order, ops.minimum(places, num_candidates - 1), axis=0)
    is_candidate = ops.logical_and(ops.equal(ids_there, flat_ids), ops.not_equal(flat_ids, NO_CANDIDATE))
    numbers = ops.where(is_candidate, places, num_candidates)
    return first_place(candidate_ids), ops.reshape(numbers, ops.shape(positive_ids))


def known_positives(labels: Any, candidate_numbers: Any, positive_numbers: Any) -> Any:
    """Returns which negatives are further positives of the query.

    Formula: `hits[i, j] = (candidate_numbers[j] in positive_numbers[i]) and (labels[i, j] == 0)`.

    Args:
        labels: `[num_queries, num_candidates]` float32, the one-hot labels that `positive_labels` returns.
        candidate_numbers: `[num_candidates]` int32, as `number_ids` returns them.
        positive_numbers: `[num_queries, m]` int32, as `number_ids` returns them.

    Returns:
        `[num_queries, num_candidates]` bool, False for the positives themselves.
    """
    # A table of the numbers of each query. Comparing each candidate with each positive takes m times as many steps: for
    # m = 512, five times as long, measured on a CPU.
    num_queries, num_candidates = ops.shape(labels)
    shape = ops.shape(positive_numbers)
    queries = ops.broadcast_to(ops.expand_dims(ops.arange(num_queries, dtype="int32"), 1), shape)
    places = ops.reshape(ops.stack([queries, positive_numbers], axis=-1), (-1, 2))
    is_listed = ops.scatter_update(
        ops.zeros((num_queries, num_candidates + 1), "bool"), places, ops.ones((shape[0] * shape[1],), "bool")
    )
    return ops.logical_and(ops.take(is_listed, candidate_numbers, axis=1), ops.equal(labels, 0.0))


def true_negatives(negative_ids: Any, own_ids: Any = None, positive_ids: Any = None) -> Any:
    """Returns which of each query's own negatives are candidates, and none of its positives.

    Formula: `(negative_ids[i, k] not in (-1, own_ids[i])) and (negative_ids[i, k] not in positive_ids[i])`.

    Args:
        negative_ids: `[num_queries, n]` int32, padded with -1.
        own_ids: `[num_queries]` int32 ids of the positives, or `None` not to compare with them.
        positive_ids: `[num_queries, m]` int32 ids of further positives, or `None`.

    Returns:
        `[num_queries, n]` bool.
    """
    keep = ops.not_equal(negative_ids, NO_CANDIDATE)
    if own_ids is not None:
        keep = ops.logical_and(keep, ops.not_equal(negative_ids, ops.expand_dims(own_ids, 1)))
    if positive_ids is None:
        return keep

    def is_positive(column: Any) -> Any:
        return ops.any(ops.equal(ops.expand_dims(column, 1), positive_ids), axis=1)

    # One column after the other: at once, XLA on a CPU stores all `num_queries * n * m` comparisons.
    positives = ops.map(is_positive, ops.transpose(negative_ids))
    return ops.logical_and(keep, ops.logical_not(ops.transpose(positives)))


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
