"""Recall, NDCG and mean reciprocal rank over the whole corpus, from the ranks of the positives."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import keras
from keras import ops

from keras_rs_contrib.arguments import check_sample_weight, explains_keywords, positive_int
from keras_rs_contrib.ids import NOT_IN_LIST


class RankMetric(keras.metrics.Metric):  # type: ignore[misc]
    """The weighted mean over queries of a value computed from the ranks of each query's positives.

    Formula: `sum(weight * value) / sum(weight)`. Both sums run over all queries, so the result does not depend on the
    batch size or on the number of devices. Subclasses compute the values in `values`.

    Args:
        name: name of the metric.
        dtype: dtype of the sums.

    Attributes:
        higher_is_better: what callbacks with `mode="auto"`, such as `EarlyStopping`, assume of the metric.
    """

    higher_is_better = True

    def __init__(self, name: str | None = None, dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.total = self.add_variable((), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    @explains_keywords
    def update_state(self, ranks: Any, *, sample_weight: Any = None) -> None:
        """Adds queries to the mean.

        Args:
            ranks: ints from `ShardedBruteForceRetrieval.ranks`, 0 for the best: `[num_queries]` for one positive per
                query, or `[num_queries, m]` for up to m positives. A negative rank means no positive, and 2**31 - 1 one
                that is not in the list. Queries without positives are not counted.
            sample_weight: `[num_queries]` weights, finite and at least 0; 0 for padding. `None` means a weight of 1 for
                each query. While compiling, the values are not checked: NaN makes the result NaN.

        Raises:
            TypeError: if `ranks` are not integers.
            ValueError: if a shape is wrong, or a weight is negative or not finite.
        """
        ranks = ops.convert_to_tensor(ranks)
        dtype = keras.backend.standardize_dtype(ranks.dtype)
        if "int" not in dtype:
            raise TypeError(
                f"`ranks` must be integers, 0 for the best. Received: dtype {dtype}. Pass the result of the index's "
                "`ranks` method."
            )
        ranks = ops.cast(ranks, "int32")
        if len(ranks.shape) == 1:
            ranks = ops.expand_dims(ranks, 1)
        if len(ranks.shape) != 2:
            raise ValueError(
                "`ranks` must have shape (num_queries,) or (num_queries, m). Received: "
                f"shape {tuple(ranks.shape)}. Pass one row for each query."
            )
        if ranks.shape[1] == 0:
            ranks = ops.full((ranks.shape[0], 1), -1, dtype="int32")
        if sample_weight is not None:
            sample_weight = ops.convert_to_tensor(sample_weight)
            if tuple(sample_weight.shape) != tuple(ranks.shape[:1]):
                raise ValueError(
                    "`sample_weight` must have one weight for each query. Received: "
                    f"shape {tuple(sample_weight.shape)} for {ranks.shape[0]} queries. Pass a flat array."
                )
            check_sample_weight(sample_weight)
        if keras.backend.backend() == "jax" and type(self).__module__ == __name__:
            total, count = _compiled_sums(_settings_of(self), ranks, sample_weight)
        else:
            # The classes of users may compute on the host.
            total, count = self._sums(ranks, sample_weight)
        self.total.assign_add(total)
        self.count.assign_add(count)

    def _sums(self, ranks: Any, sample_weight: Any) -> tuple[Any, Any]:
        """Returns `sum(weight * value)` and `sum(weight)`."""
        weight = ops.cast(ops.any(ops.greater_equal(ranks, 0), axis=1), self.dtype)
        if sample_weight is not None:
            weight = ops.multiply(weight, ops.cast(sample_weight, self.dtype))
        # The value of a query without weight may not be finite, and 0 * NaN would make the sum NaN.
        values = ops.where(ops.equal(weight, 0), 0.0, ops.cast(self.values(ranks), self.dtype))
        return ops.sum(ops.multiply(values, weight)), ops.sum(weight)

    def values(self, ranks: Any) -> Any:
        """Returns the value of each query.

        Args:
            ranks: `[num_queries, m]` int32, negative for no positive, 2**31 - 1 for one that is not in the list. Each
                counted query has at least one positive.

        Returns:
            `[num_queries]` float.
        """
        raise NotImplementedError

    def result(self) -> Any:
        """Returns the mean as a scalar; 0 if no query is counted."""
        return ops.divide_no_nan(self.total, self.count)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the sums depend on. Metrics with equal settings share a program.

    Attributes:
        kind: the class.
        config: all else, as JSON.
        metric: a metric of these settings.
    """

    kind: type[RankMetric]
    config: str
    metric: RankMetric = dataclasses.field(compare=False)


def _settings_of(metric: RankMetric) -> _Settings:
    config = {name: value for name, value in metric.get_config().items() if name != "name"}
    return _Settings(type(metric), json.dumps(config, sort_keys=True), metric)


@functools.partial(jax.jit, static_argnums=0)
def _compiled_sums(settings: _Settings, ranks: Any, sample_weight: Any) -> Any:
    """Returns what `RankMetric._sums` does, as one program instead of one for each operation."""
    return settings.metric._sums(ranks, sample_weight)


class _RankMetricAtK(RankMetric):
    # The metric's name without k.
    prefix: str

    @explains_keywords
    def __init__(self, k: int = 10, *, name: str | None = None, dtype: Any = None) -> None:
        self.k = positive_int(k, "k")
        super().__init__(name=name or f"{self.prefix}_at_{k}", dtype=dtype)

    def positives_and_hits(self, ranks: Any) -> tuple[Any, Any]:
        """Returns bool masks, shape of `ranks`: the positives, and the positives with ranks below k."""
        return ops.greater_equal(ranks, 0), _are_among_best(ranks, self.k)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "k": self.k}


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RecallAtK(_RankMetricAtK):
    """Recall: the share of a query's positives among the k best candidates of the corpus, averaged over queries.

    Formula: `recall = num_hits / num_positives`, where `num_hits` is the number of positives with rank below k, and
    ranks start at 0. With one positive per query, this is the hit rate. With more than k positives, recall is at most
    `k / num_positives`. Some authors divide by `min(k, num_positives)` instead.

    Args:
        k: positive int, the number of best candidates to consider.
        name: name of the metric; by default `recall_at_{k}`.
        dtype: dtype of the sums.

    Raises:
        ValueError: if `k` is not a positive int.

    Example:
    ```python
    metric = RecallAtK(k=10)
    metric.update_state([0, 9, 10, 250])  # two of four positives are among the ten best candidates
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
    """Normalized discounted cumulative gain (NDCG) of the k best candidates, averaged over queries.

    Formula: `ndcg = dcg / ideal_dcg`. Ranks start at 0. `dcg` is the sum of `1 / log2(rank + 2)` over the positives
    with rank below k. `ideal_dcg` is the same sum over the ranks 0 to `min(k, num_positives) - 1`.

    Args:
        k: positive int, the number of best candidates to consider.
        name: name of the metric; by default `ndcg_at_{k}`.
        dtype: dtype of the sums.

    Raises:
        ValueError: if `k` is not a positive int.

    Example:
    ```python
    metric = NDCGAtK(k=10)
    metric.update_state([[0, 2, -1]])  # one query with two positives, at positions 1 and 3
    print(float(metric.result()))  # (1 + 0.5) / (1 + 0.63) = 0.92
    ```

    Reference: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", ACM TOIS 20(4), 2002, with
    binary gains and the discount `log2(1 + position)`.
    """

    prefix = "ndcg"

    def values(self, ranks: Any) -> Any:
        """Returns the NDCG of each query."""
        is_positive, hits = self.positives_and_hits(ranks)
        gain = ops.sum(ops.where(hits, _discount(ops.where(hits, ranks, 0)), 0.0), axis=1)
        # A query has at most `ranks.shape[1]` positives, so the ideal list needs no more positions.
        places = ops.arange(min(self.k, ranks.shape[1]), dtype="int32")
        at_head = ops.less(ops.expand_dims(places, 0), ops.sum(ops.cast(is_positive, "int32"), axis=1, keepdims=True))
        ideal = ops.sum(ops.where(at_head, ops.expand_dims(_discount(places), 0), 0.0), axis=1)
        return ops.divide(gain, ops.maximum(ideal, 1.0))


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class MeanReciprocalRank(RankMetric):
    """Mean reciprocal rank (MRR) of a query's best positive in the whole corpus.

    Formula: `mrr = mean(1 / (best_rank + 1))` over queries, where `best_rank` is the lowest rank of a query's
    positives, and ranks start at 0. The list has no cutoff. A query adds 0 if none of its positives is in the list.

    Args:
        name: name of the metric.
        dtype: dtype of the sums.

    Example:
    ```python
    metric = MeanReciprocalRank()
    metric.update_state([0, 3])
    print(float(metric.result()))  # (1 + 1/4) / 2 = 0.625
    ```

    Reference: Voorhees, "The TREC-8 question answering track report", TREC 1999.
    """

    @explains_keywords
    def __init__(self, *, name: str | None = "mean_reciprocal_rank", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def values(self, ranks: Any) -> Any:
        """Returns the reciprocal rank of each query."""
        is_in_list = _are_among_best(ranks, NOT_IN_LIST)
        places = ops.where(is_in_list, ops.add(ops.cast(ranks, "float32"), 1.0), float("inf"))
        return ops.divide(1.0, ops.min(places, axis=1))


def _are_among_best(ranks: Any, k: int) -> Any:
    """Returns which ranks are those of positives in the list, and below k."""
    return ops.logical_and(ops.greater_equal(ranks, 0), ops.less(ranks, min(k, NOT_IN_LIST)))


def _count(mask: Any) -> Any:
    return ops.sum(ops.cast(mask, "float32"), axis=1)


def _discount(ranks: Any) -> Any:
    return ops.divide(1.0, ops.log2(ops.add(ops.cast(ranks, "float32"), 2.0)))
