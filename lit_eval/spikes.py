"""Finds the loss spikes of a run in its logged losses, by the rule of training's guard (pretrain/guards.py)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

REFRESH = 4096  # losses between two fresh sums, so that rounding errors of the running ones don't add up


@dataclass(frozen=True)
class LossSpike:
    """A loss that stayed high.

    Attributes:
        first_step, step: of the first high loss, and of the one that made it a spike.
        loss: at `step`.
        mean: of the losses before.
    """

    first_step: int
    step: int
    loss: float
    mean: float


class _Window:
    """The newest normal losses, with mean and deviation in constant time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.restart([])

    def restart(self, losses: Iterable[float]) -> None:
        self.losses = deque(losses, maxlen=self.size)
        self._refresh()

    def _refresh(self) -> None:
        self.origin = self.losses[0] if self.losses else 0.0  # sums are of differences from it
        self.sum = sum(x - self.origin for x in self.losses)
        self.squares = sum((x - self.origin) ** 2 for x in self.losses)
        self.added = 0

    def add(self, loss: float) -> None:
        if len(self.losses) == self.size:
            old = self.losses[0] - self.origin
            self.sum -= old
            self.squares -= old * old
        self.losses.append(loss)
        self.sum += loss - self.origin
        self.squares += (loss - self.origin) ** 2
        self.added += 1
        if self.added >= REFRESH or len(self.losses) == 1:
            self._refresh()

    def mean_and_deviation(self) -> tuple[float, float]:
        n = len(self.losses)
        mean = self.sum / n
        return self.origin + mean, math.sqrt(max(0.0, self.squares / n - mean * mean))


def find_spikes(
    rows: Iterable[tuple[float, float]], *, sigmas: float = 6.0, window: int = 64, in_a_row: int = 3
) -> list[LossSpike]:
    """The spikes in (step, loss) of the logged steps, ascending; a loss may be NaN or infinite.

    A loss is high if it is not finite, or exceeds the mean of the last `window` normal losses by `sigmas` of their
    standard deviations (once half of the window is there); `in_a_row` high losses in a row are a spike.
    """
    normal = _Window(window)
    high: list[tuple[float, float]] = []
    found: list[LossSpike] = []
    for step, loss in rows:
        enough = len(normal.losses) * 2 >= window
        mean, deviation = normal.mean_and_deviation() if enough else (0.0, 0.0)
        if (not enough and math.isfinite(loss)) or loss <= mean + sigmas * deviation:
            normal.add(loss)
            high = []
            continue
        high.append((step, loss))
        if len(high) == in_a_row:
            found.append(LossSpike(int(high[0][0]), int(step), loss, mean))
            normal.restart(value for _, value in high if math.isfinite(value))
            high = []
    return found
