"""Recall, NDCG and reciprocal rank over the whole corpus, from the ranks of the positives."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rs_contrib.arguments import positive_int


class RankMetric(keras.metrics.Metric):  # type: ignore[misc]
    """The weighted mean, over queries, of a value that follows from the ranks of a query's positives.

    It keeps one weighted sum and one sum of weights, so that neither the split into batches nor the number of devices
    changes it. Subclasses say in `values` what is averaged.

    Args:
        name: name of the metric.
        dtype: of the sums.
    """

    def __init__(self, name: str | None = None, dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.total = self.add_variable((), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, ranks: Any, sample_weight: Any = None) -> None:
        """Adds queries to the mean.

        Args:
            ranks: ints, 0 is best, as `ShardedBruteForceRetrieval.ranks` returns them: `[num_queries]`, where each has
                one positive, or `[num_queries, m]`, where it has up to m. A negative rank stands for no positive, and
                a query without any does not count.
            sample_weight: `[num_queries]` weights, 0 for padding; `None` for 1.

        Raises:
            TypeError: if ranks are no integers.
            ValueError: if shapes do not fit.
        """
        ranks = ops.convert_to_tensor(ranks)
        dtype = keras.backend.standardize_dtype(ranks.dtype)
        if "int" not in dtype:
            raise TypeError(
                f"`ranks` must be integers, 0 for the best. Received: dtype {dtype}. Pass what `ranks` of the index "
                "returned."
            )
        ranks = ops.cast(ranks, "int32")
        if len(ranks.shape) == 1:
            ranks = ops.expand_dims(ranks, 1)
        if len(ranks.shape) != 2:
            raise ValueError(
                "`ranks` must have shape (num_queries,) or (num_queries, m). Received: "
                f"shape {tuple(ranks.shape)}. Pass a row for each query."
            )
        if ranks.shape[1] == 0:
            ranks = ops.full((ranks.shape[0], 1), -1, dtype="int32")
        weight = ops.cast(ops.any(ops.greater_equal(ranks, 0), axis=1), self.dtype)
        if sample_weight is not None:
            sample_weight = ops.convert_to_tensor(sample_weight)
            if tuple(sample_weight.shape) != tuple(ranks.shape[:1]):
                raise ValueError(
                    "`sample_weight` must have one weight for each query. Received: "
                    f"shape {tuple(sample_weight.shape)} for {ranks.shape[0]} queries. Pass a flat list."
                )
            weight = ops.multiply(weight, ops.cast(sample_weight, self.dtype))
        # Whatever a query that does not count has, it is not to reach the sum, not even as 0 times NaN.
        values = ops.where(ops.equal(weight, 0), 0.0, ops.cast(self.values(ranks), self.dtype))
        self.total.assign_add(ops.sum(ops.multiply(values, weight)))
        self.count.assign_add(ops.sum(weight))

    def values(self, ranks: Any) -> Any:
        """Returns what is averaged.

        Args:
            ranks: `[num_queries, m]` int, negative for none; each query that counts has one that is not.

        Returns:
            `[num_queries]` float.
        """
        raise NotImplementedError

    def result(self) -> Any:
        """Returns the mean, a scalar; 0 where nothing has been counted."""
        return ops.divide_no_nan(self.total, self.count)


class _RankMetricAtK(RankMetric):
    # What the metric is called, before its k.
    prefix: str

    def __init__(self, k: int = 10, name: str | None = None, dtype: Any = None) -> None:
        self.k = positive_int(k, "k")
        super().__init__(name=name or f"{self.prefix}_at_{k}", dtype=dtype)

    def positives_and_hits(self, ranks: Any) -> tuple[Any, Any]:
        """Returns which ranks are there, and which of them are among the first k, both as `ranks` in shape, bool."""
        is_positive = ops.greater_equal(ranks, 0)
        return is_positive, ops.logical_and(is_positive, ops.less(ranks, self.k))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "k": self.k}


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RecallAtK(_RankMetricAtK):
    """The share of a query's positives that are among the k best candidates of the whole corpus, averaged.

    With one positive a query it is the hit rate. With several, the most that it can be is k over their number: some
    authors divide by the smaller of the two, which this does not.

    Args:
        k: positive int, length of the list.
        name: name of the metric; by default `recall_at_` and k.
        dtype: of the sums.

    Raises:
        ValueError: if `k` is no positive int.

    Example:
    ```python
    metric = RecallAtK(k=10)
    metric.update_state([0, 9, 10, 250])  # of four queries, two have their positive among the first ten
    print(float(metric.result()))  # 0.5
    ```

    Reference: Herlocker et al., "Evaluating collaborative filtering recommender systems", ACM TOIS 22(1), 2004.
    """

    prefix = "recall"

    def values(self, ranks: Any) -> Any:
        """Returns the recall of each query."""
        is_positive, hits = self.positives_and_hits(ranks)
        return ops.divide(_count(hits), ops.maximum(_count(is_positive), 1.0))


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class NDCGAtK(_RankMetricAtK):
    """The discounted cumulative gain of the k best candidates over the most that it could be, averaged over queries.

    A positive at rank r, from 0, gains `1 / log2(r + 2)` if r is less than k. The ideal list, too, is cut at k: it has
    the smaller of k and the number of positives at its head.

    Args:
        k: positive int, length of the list.
        name: name of the metric; by default `ndcg_at_` and k.
        dtype: of the sums.

    Raises:
        ValueError: if `k` is no positive int.

    Example:
    ```python
    metric = NDCGAtK(k=10)
    metric.update_state([[0, 2, -1]])  # one query with two positives, in the first and the third place
    print(float(metric.result()))  # (1 + 0.5) / (1 + 0.63) = 0.92
    ```

    Reference: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", ACM TOIS 20(4), 2002, with
    binary gains and the discount `log2(1 + place)`.
    """

    prefix = "ndcg"

    def values(self, ranks: Any) -> Any:
        """Returns the NDCG of each query."""
        is_positive, hits = self.positives_and_hits(ranks)
        gain = ops.sum(ops.where(hits, _discount(ops.where(hits, ranks, 0)), 0.0), axis=1)
        # No list has more positives in it than the query has.
        places = ops.arange(min(self.k, ranks.shape[1]), dtype="int32")
        at_head = ops.less(ops.expand_dims(places, 0), ops.sum(ops.cast(is_positive, "int32"), axis=1, keepdims=True))
        ideal = ops.sum(ops.where(at_head, ops.expand_dims(_discount(places), 0), 0.0), axis=1)
        return ops.divide(gain, ops.maximum(ideal, 1.0))


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class MeanReciprocalRank(RankMetric):
    """The reciprocal place of a query's best positive in the list of the whole corpus, averaged.

    The first place has 1, the second 1/2. The list is not cut.

    Args:
        name: name of the metric.
        dtype: of the sums.

    Example:
    ```python
    metric = MeanReciprocalRank()
    metric.update_state([0, 3])
    print(float(metric.result()))  # (1 + 1/4) / 2 = 0.625
    ```

    Reference: Voorhees, "The TREC-8 question answering track report", TREC 1999.
    """

    def __init__(self, name: str | None = "mean_reciprocal_rank", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def values(self, ranks: Any) -> Any:
        """Returns the reciprocal rank of each query."""
        places = ops.where(ops.greater_equal(ranks, 0), ops.add(ops.cast(ranks, "float32"), 1.0), float("inf"))
        return ops.divide(1.0, ops.min(places, axis=1))


def _count(mask: Any) -> Any:
    return ops.sum(ops.cast(mask, "float32"), axis=1)


def _discount(ranks: Any) -> Any:
    return ops.divide(1.0, ops.log2(ops.add(ops.cast(ranks, "float32"), 2.0)))
