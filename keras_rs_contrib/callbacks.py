"""A callback that keeps an index over a feature tower up to date while the tower is trained."""

from __future__ import annotations

from typing import Any

import keras

from keras_rs_contrib.retrieval import ShardedBruteForceRetrieval


class RefreshCandidates(keras.callbacks.Callback):  # type: ignore[misc]
    """Refreshes an index before each validation and at the end of training.

    An index that is tied to an embedding is never stale, and is left alone.

    Args:
        index: what `shard_candidates` returned for a feature tower.
        verbose: as of `ShardedBruteForceRetrieval.refresh`.

    Raises:
        TypeError: if `index` is no `ShardedBruteForceRetrieval`.

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
                f"Received: {index!r} (of type {type(index).__name__}). Pass what `shard_candidates` returned."
            )
        self.index = index
        self.verbose = verbose

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refreshes the index: metrics are about the tower as it is now."""
        self.index.refresh(verbose=self.verbose)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Refreshes the index, so that what is saved next is up to date."""
        self.index.refresh(verbose=self.verbose)
