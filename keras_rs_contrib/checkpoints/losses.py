"""Finds the first step whose loss is not finite, without waiting for the devices."""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

# Steps that may be computed before the loss of a step is looked at. The same in all processes, so that all stop alike.
STEPS_AHEAD = 8


class Loss(NamedTuple):
    """The loss of a step.

    Attributes:
        name: its name in the logs.
        value: its value.
        epoch: the epoch, counted from 0.
        step: the number of batches of the epoch, up to and with this step; `None` for all of them.
    """

    name: str
    value: Any
    epoch: int
    step: int | None


class Losses:
    """The losses of the last steps, which the devices may not have computed yet."""

    def __init__(self) -> None:
        self._unseen: collections.deque[Loss] = collections.deque()

    def add(self, loss: Loss) -> None:
        """Adds the loss of a step."""
        self._unseen.append(loss)

    def not_finite(self, waits: bool) -> Loss | None:
        """Returns the first loss that is not finite, or `None`.

        Args:
            waits: whether to wait for the last step.
        """
        while len(self._unseen) > (0 if waits else STEPS_AHEAD):
            loss = self._unseen.popleft()
            if not math.isfinite(float(loss.value)):
                return loss
        return None
