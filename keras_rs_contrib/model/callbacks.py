"""Callbacks that refresh an index, and that evaluate queries with several positives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.metrics import RankMetric


class RefreshCandidates(keras.callbacks.Callback):  # type: ignore[misc]
    """Refreshes an index before each validation and at the end of training.

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

    def __init__(self, index: ShardedBruteForceRetrieval, verbose: int | str = "auto") -> None:
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
        self.index.refresh_if_stale(self.verbose)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Refreshes the index, so that a model saved next holds a current index."""
        self.index.refresh_if_stale(self.verbose)


class EvaluateQueries(keras.callbacks.Callback):  # type: ignore[misc]
    """Adds the corpus metrics of queries with several positives to the logs of each epoch.

    The metrics appear next to the validation metrics, with a prefix before their names: in the progress bar, in the
    history, and in the logs of callbacks that come after this one, such as `EarlyStopping`.

    Args:
        query_features: dict of `[num_queries, ...]` arrays, as in `TwoTowerModel.evaluate_queries`.
        positive_ids: `[num_queries, m]` ints, positives of each query, padded with -1.
        exclude_ids: `[num_queries, n]` ints, excluded ids of each query, padded with -1, or `None`.
        metrics: rank metrics. By default, `corpus_metrics` of the model.
        epochs: the epochs after which to evaluate, counted from 1; `None` for all.
        prefix: prefix of the names in the logs.

    Example:
    ```python
    users = np.arange(4)
    callback = EvaluateQueries({"user_id": users}, positive_ids=[[3], [1], [2], [0]])
    # model.fit(..., callbacks=[callback])
    ```
    """

    def __init__(
        self,
        query_features: dict[str, Any],
        positive_ids: Any,
        exclude_ids: Any = None,
        metrics: Iterable[RankMetric] | None = None,
        epochs: Iterable[int] | None = None,
        prefix: str = "val_query_",
    ) -> None:
        super().__init__()
        self.query_features = query_features
        self.positive_ids = positive_ids
        self.exclude_ids = exclude_ids
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
            self.query_features, self.positive_ids, self.exclude_ids, self.rank_metrics, verbose=0
        )
        logs.update({f"{self.prefix}{name}": value for name, value in values.items()})
