"""Detection of loss spikes: a loss far above the median of the last ones."""

import statistics
from collections import deque
from collections.abc import Sequence

MAD = 1.4826
"""Factor from the median absolute deviation to the standard deviation of a normal distribution."""
LEAST_SPREAD = 0.01
"""The spread is at least this share of the median, so that a flat curve has no spikes."""
LEAST_SHARE = 0.2
"""A loss is judged once the window has this share of its losses."""


class SpikeDetector:
    """Compares losses with those of the last steps; the same on all ranks, since the loss is that of the global batch.

    Args:
        window: number of losses to compare with.
        factor: a loss is a spike above median + factor x spread; the spread is the scaled median absolute deviation.
        losses: of the last steps before a resume.
    """

    def __init__(self, window: int, factor: float, losses: Sequence[float] = ()) -> None:
        self.factor, self._losses = factor, deque(losses, maxlen=window)
        self._least = max(2, round(LEAST_SHARE * window))

    @property
    def losses(self) -> list[float]:
        """The losses of the window, oldest first; spikes are not among them."""
        return list(self._losses)

    @property
    def limit(self) -> float | None:
        """The loss above which the next one is a spike; None if too few are known."""
        if len(self._losses) < self._least:
            return None
        median = statistics.median(self._losses)
        spread = MAD * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.factor * max(spread, LEAST_SPREAD * abs(median))

    def is_spike(self, loss: float) -> bool:
        """Return whether a finite loss is a spike."""
        limit = self.limit
        return limit is not None and loss > limit

    def add(self, loss: float) -> None:
        """Add a loss that is no spike to the window."""
        self._losses.append(loss)
