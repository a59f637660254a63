"""Callbacks that refresh an index or evaluate queries, and what callbacks of Keras need to know of rank metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from keras_rs_contrib.arguments import explains_keywords
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.metrics import RankMetric


class RefreshCandidates(keras.callbacks.Callback):  # type: ignore[misc]
    """Refreshes an index before each validation or prediction, and at the end of training.

    A model of your own that contains the index of a feature tower needs it: training changes the tower, and not the
    index. `TwoTowerModel` refreshes its index by itself.

    The index of an embedding is never stale: it is left unchanged.

    Args:
        index: the result of `shard_candidates` for a feature tower.
        verbose: as in `ShardedBruteForceRetrieval.refresh`.

    Raises:
        TypeError: if `index` is not a `ShardedBruteForceRetrieval`.

    Example:
    ```python
    tower = keras.Sequential([keras.layers.Dense(4)])
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower, candidates=np.eye(5))
    callback = RefreshCandidates(index)  # model.fit(..., callbacks=[callback])
    ```
    """

    @explains_keywords
    def __init__(self, index: ShardedBruteForceRetrieval, *, verbose: int | str = "auto") -> None:
        super().__init__()
        if not isinstance(index, ShardedBruteForceRetrieval):
            raise TypeError(
                "`index` must be a `ShardedBruteForceRetrieval`. "
                f"Received: {index!r} (of type {type(index).__name__}). Pass the result of `shard_candidates`."
            )
        self.index = index
        self.verbose = verbose

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refreshes the index, so that metrics use the current tower."""
        self.index.refresh_if_stale(verbose=self.verbose)

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refreshes the index, so that predictions use the current tower."""
        self.index.refresh_if_stale(verbose=self.verbose)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Refreshes the index, so that a model saved next holds a current index."""
        self.index.refresh_if_stale(verbose=self.verbose)


class EvaluateQueries(keras.callbacks.Callback):  # type: ignore[misc]
    """Adds the corpus metrics of queries with several positives to the logs of each epoch.

    The metrics appear next to the validation metrics, with a prefix before their names: in the progress bar, in the
    history, and in the logs of callbacks that come after this one, such as `EarlyStopping`.

    Args:
        query_features: dict of `[num_queries, ...]` arrays, as in `TwoTowerModel.evaluate_queries`.
        positive_ids: ints with a row for each query, its positives, in any form that `evaluate_queries` takes.
        exclude_ids: ints with a row for each query, its excluded ids, or `None`.
        metrics: rank metrics. By default, `corpus_metrics` of the model.
        include_ids: the only ids in the lists, flat for all queries, or with a row for each; or `None` for all.
        epochs: the epochs after which to evaluate, counted from 1; `None` for all.
        prefix: prefix of the names in the logs.

    Example:
    ```python
    users = np.arange(4)
    callback = EvaluateQueries({"user_id": users}, positive_ids=[[3], [1], [2], [0]])
    # model.fit(..., callbacks=[callback])
    ```
    """

    @explains_keywords
    def __init__(
        self,
        query_features: dict[str, Any],
        positive_ids: Any,
        exclude_ids: Any = None,
        metrics: Iterable[RankMetric] | None = None,
        *,
        include_ids: Any = None,
        epochs: Iterable[int] | None = None,
        prefix: str = "val_query_",
    ) -> None:
        super().__init__()
        self.query_features = query_features
        self.positive_ids = positive_ids
        self.exclude_ids = exclude_ids
        self.include_ids = include_ids
        self.rank_metrics = None if metrics is None else list(metrics)
        self.epochs = None if epochs is None else frozenset(epochs)
        self.prefix = prefix

    def set_model(self, model: keras.Model) -> None:
        """Sets the model, or raises `TypeError` if it has no `evaluate_queries`."""
        if not hasattr(model, "evaluate_queries"):
            raise TypeError(
                "`EvaluateQueries` needs a `TwoTowerModel`. "
                f"Received: a model of type {type(model).__name__}. "
                "For other models, rank with the index in your own callback."
            )
        super().set_model(model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Evaluates the queries and adds their metrics to the logs."""
        if logs is None or (self.epochs is not None and epoch + 1 not in self.epochs):
            return
        values = self.model.evaluate_queries(
            self.query_features,
            self.positive_ids,
            self.exclude_ids,
            include_ids=self.include_ids,
            metrics=self.rank_metrics,
            verbose=0,
        )
        logs.update({f"{self.prefix}{name}": value for name, value in values.items()})


def set_modes(callbacks: Any, metrics: Iterable[RankMetric]) -> None:
    """Sets the `mode` of callbacks that monitor rank metrics, such as `EarlyStopping`, where it is "auto".

    Keras finds the direction only of metrics of `compile`, and raises for all others.

    Args:
        callbacks: as in `fit`.
        metrics: the corpus metrics of the model.
    """
    callbacks = getattr(callbacks, "callbacks", callbacks)
    callbacks = [] if callbacks is None else keras.tree.flatten(callbacks)
    metrics = list(metrics)
    in_logs = [(prefix, metric) for metric in metrics for prefix in ("", "val_")]
    for callback in callbacks:
        if isinstance(callback, EvaluateQueries):
            own_metrics = metrics if callback.rank_metrics is None else callback.rank_metrics
            in_logs += [(callback.prefix, metric) for metric in own_metrics]
    modes = {f"{prefix}{metric.name}": "max" if metric.higher_is_better else "min" for prefix, metric in in_logs}
    for callback in callbacks:
        if getattr(callback, "mode", None) == "auto":
            callback.mode = modes.get(str(getattr(callback, "monitor", None)), "auto")
