"""When a checkpoint is due."""

from __future__ import annotations

import time


class Schedule:
    """Says when a checkpoint is due: after a number of steps, epochs or seconds, of which one is given.

    Args:
        every_steps: number of steps.
        every_epochs: number of epochs.
        every_seconds: number of seconds.
    """

    def __init__(self, every_steps: int | None, every_epochs: int | None, every_seconds: float | None) -> None:
        self.every_steps = every_steps
        self.every_epochs = every_epochs
        self.every_seconds = every_seconds
        self._num_steps = 0
        self._last = time.monotonic()
        self._is_due = False

    def begin(self, num_steps: int) -> None:
        """Begins after a number of steps, which a resumed training does not begin at 0."""
        self._num_steps = num_steps
        self.note_saved()

    def add_steps(self, number: int) -> None:
        """Notes steps. A checkpoint is due once they reach or pass a multiple of `every_steps`."""
        before, self._num_steps = self._num_steps, self._num_steps + number
        if self.every_steps is not None:
            self._is_due |= self._num_steps // self.every_steps > before // self.every_steps

    def add_epoch(self, number: int) -> None:
        """Notes that `number` epochs are complete."""
        if self.every_epochs is not None:
            self._is_due |= number % self.every_epochs == 0

    def note_time(self, is_over: bool) -> None:
        """Notes whether the seconds are over."""
        self._is_due |= is_over

    def note_saved(self) -> None:
        """Notes that a checkpoint is being written."""
        self._last = time.monotonic()
        self._is_due = False

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return self._num_steps

    @property
    def is_over(self) -> bool:
        """Whether the seconds since the last checkpoint are over, by the clock of this process."""
        return self.every_seconds is not None and time.monotonic() - self._last >= self.every_seconds

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is due."""
        return self._is_due
