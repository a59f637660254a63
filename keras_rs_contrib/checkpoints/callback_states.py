"""The state of the other callbacks of a `fit`: their plain attributes that training changes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_rs_contrib.checkpoints.plain_values import Array, NotPlainError, from_json, to_json


class CallbackStates:
    """Reads and sets the state of callbacks.

    The attributes that the constructor and `on_train_begin` set are those of the arguments. Those that differ later,
    such as `wait` and `best` of `EarlyStopping`, are the state. So a changed argument, such as another patience, stays
    in force when training resumes.

    Args:
        callbacks: callbacks, after `on_train_begin`.
    """

    def __init__(self, callbacks: list[keras.callbacks.Callback]) -> None:
        different = {id(each): each for each in callbacks if not isinstance(each, keras.callbacks.ProgbarLogger)}
        self._callbacks = list(different.values())
        self._at_begin = [_plain(callback) for callback in self._callbacks]

    def to_json(self, arrays: list[Array]) -> list[Any]:
        """Returns the state of each callback as JSON, and appends its arrays."""
        states = []
        for callback, begin in zip(self._callbacks, self._at_begin, strict=True):
            changed = {}
            for name, (content, own) in _plain(callback).items():
                if name not in begin or not _are_same(begin[name], (content, own)):
                    changed[name] = to_json(vars(callback)[name], arrays)
            states.append({"class": type(callback).__name__, "attributes": changed})
        return states

    def set(self, states: list[Any], arrays: list[Array]) -> None:
        """Sets the state that `to_json` has returned. A callback that was not there then keeps its own."""
        states = list(states)
        # Arrays from files are not writable, and callbacks own theirs.
        arrays = [np.array(array) for array in arrays]
        for callback in self._callbacks:
            state = next((each for each in states if each["class"] == type(callback).__name__), None)
            if state is not None:
                states.remove(state)
                for name, content in state["attributes"].items():
                    setattr(callback, name, from_json(content, arrays))


def _plain(callback: keras.callbacks.Callback) -> dict[str, tuple[Any, list[Array]]]:
    """Returns the attributes of a callback that are plain, each as JSON with its arrays."""
    result = {}
    for name, value in vars(callback).items():
        arrays: list[Array] = []
        try:
            result[name] = to_json(value, arrays), arrays
        except NotPlainError:
            continue
    return result


def _are_same(first: tuple[Any, list[Array]], second: tuple[Any, list[Array]]) -> bool:
    if repr(first[0]) != repr(second[0]):
        return False
    return all(
        a is b or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in zip(first[1], second[1], strict=True)
    )
