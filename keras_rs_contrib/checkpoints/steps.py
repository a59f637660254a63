"""The training step that Keras calls, which may first take the batches that have been trained already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

TOO_FEW = (
    "A training resumes on the data that it began with. Received: fewer batches than the checkpoint was trained on. "
    "Pass the same data, or another `directory` to begin again."
)


class Steps:
    """Takes the place of `model.train_function`.

    Args:
        function: what Keras calls for each step: it takes the state of the model and an iterator over batches, and
            returns logs and the new state.
        batches_per_call: the number of batches in a call: `steps_per_execution`.
        is_active: whether the training that has put it here is running.
        before_reading: called in each epoch before the first batch is taken.
        before_step: takes the state before a step, and returns the state to train.
        after_step: takes the logs of a step, and its number of batches.

    Attributes:
        batches: the number of batches taken in this epoch.
    """

    def __init__(
        self,
        function: Any,
        batches_per_call: int,
        is_active: Callable[[], bool],
        before_reading: Callable[[], None],
        before_step: Callable[[Any], Any],
        after_step: Callable[[Any, int], None],
    ) -> None:
        self.function = function
        self._batches_per_call = batches_per_call
        self._is_active = is_active
        self._before_reading = before_reading
        self._before_step = before_step
        self._after_step = after_step
        self.batches = 0
        self._num_earlier = 0
        self._num_skipped = 0
        self._logs: dict[str, float] = {}
        self._iterator: Iterator[Any] | None = None

    @property
    def is_skipping(self) -> bool:
        """Whether the next call takes batches without training."""
        return self.batches < self._num_skipped

    def begin_epoch(self) -> None:
        """Begins to count the batches of an epoch."""
        self.batches, self._num_skipped, self._iterator = 0, 0, None

    def skip(self, num_earlier: int, num_batches: int, logs: dict[str, float]) -> None:
        """Lets the coming calls take batches without training.

        Args:
            num_earlier: the number of batches of earlier epochs, which one call takes.
            num_batches: the number of batches of this epoch.
            logs: what these calls return.
        """
        self._num_earlier, self._num_skipped, self._logs = num_earlier, num_batches, logs

    def __call__(self, state: Any, iterator: Iterator[Any]) -> tuple[Any, Any]:
        """Trains a step, or takes its batches."""
        if not self._is_active():
            return self.function(state, iterator)  # type: ignore[no-any-return]
        if self._iterator is None:
            self._before_reading()
        self._iterator = iterator
        while self._num_earlier:
            self._take()
            self._num_earlier -= 1
        if self.is_skipping:
            for _ in range(min(self._batches_per_call, self._num_skipped - self.batches)):
                self._take()
                self.batches += 1
            return dict(self._logs), state
        state = self._before_step(state)
        before = self.batches
        logs, state = self.function(state, self)
        self._after_step(logs, self.batches - before)
        return logs, state

    def _take(self) -> None:
        assert self._iterator is not None
        if next(self._iterator, self) is self:
            raise ValueError(TOO_FEW)

    def __next__(self) -> Any:
        """Returns the next batch, for the step."""
        assert self._iterator is not None
        batch = next(self._iterator)
        self.batches += 1
        return batch

    def __iter__(self) -> Steps:
        """Returns itself."""
        return self
