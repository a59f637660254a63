"""Callbacks that the model adds to those of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_rs_contrib import processes
from keras_rs_contrib.model.training_data import TrainingData


def with_callbacks(callbacks: Any, *added: keras.callbacks.Callback) -> Any:
    """Returns the `callbacks` of `fit`, in any form, and those added."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    return [*([] if callbacks is None else keras.tree.flatten(callbacks)), *added]


class ReleasedCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """A callback that holds something, such as a file, until the end of `fit`. Keras does not tell it of an error."""

    def release(self) -> None:
        """Lets go of what it holds. It may be called again."""
        raise NotImplementedError


@contextlib.contextmanager
def releasing(callbacks: Any) -> Iterator[None]:
    """Lets callbacks release what they hold after `with`, also after an error.

    Args:
        callbacks: the `callbacks` of `fit`, in any form.
    """
    with contextlib.ExitStack() as stack:
        for callback in with_callbacks(callbacks):
            if isinstance(callback, ReleasedCallback):
                stack.callback(callback.release)
        yield


class RefreshIndex(keras.callbacks.Callback):  # type: ignore[misc]
    """Refreshes the index after other callbacks have changed the weights, such as `SwapEMAWeights`."""

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refreshes the index before an evaluation."""
        if self.model.ranks_in_evaluation:
            self.model.refresh_index()

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refreshes the index before predictions."""
        self.model.refresh_index()


class Collect(keras.callbacks.Callback):  # type: ignore[misc]
    """Collects what the model keeps of the training data, within `with`.

    Args:
        training_data: collects it.
        seen: whether to collect what queries have seen.
        is_partial: whether an epoch may end before the data do. Otherwise, the first epoch shows all.
    """

    def __init__(self, training_data: TrainingData, *, seen: bool, is_partial: bool) -> None:
        super().__init__()
        self.training_data = training_data
        self.seen = seen
        self.is_partial = is_partial

    def __enter__(self) -> None:
        self.training_data.begin(seen=self.seen)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and processes.have_own_data():
            # Others may not get here.
            self.training_data.discard()
        else:
            self.training_data.end()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Ends collecting if all data have been read."""
        if not self.is_partial:
            self.training_data.end()
