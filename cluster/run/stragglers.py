"""Workers that compute more slowly than the others, by the times of their forward passes in the pulses."""

import statistics
from collections.abc import Mapping
from typing import Any

from cluster.worker.monitor import Event

LEAST = 2
"""Workers that are needed for a comparison."""
STEPS = 20
"""Steps for which a worker must have been slow: those of the median in its pulses."""


def slowness(seconds: Mapping[int, float]) -> dict[int, float]:
    """Return each rank's seconds as a multiple of the median; empty for fewer than two ranks.

    Of an even number of ranks the lower of the two in the middle counts, so that of two ranks one can be slow.
    """
    if len(seconds) < LEAST or (median := statistics.median_low(seconds.values())) <= 0:
        return {}
    return {rank: value / median for rank, value in seconds.items()}


class Stragglers:
    """The driver's end: finds the workers that have been slow for some time. Times are those of the driver's clock.

    Args:
        factor: a worker is slow above this multiple of the median.
        after_s: seconds for which it must have been slow, and at least `STEPS` steps.
    """

    def __init__(self, factor: float, after_s: float) -> None:
        self.factor, self.after_s = factor, after_s
        self._places: dict[int, Event] = {}
        self._seconds: dict[int, float] = {}
        self._steps: dict[int, int] = {}
        self._since: dict[int, tuple[float, int]] = {}
        self._told: set[int] = set()

    def note(self, event: Mapping[str, Any], now: float) -> Event | None:
        """Process an event of a worker; return an event of the kind `straggler` about one that is slow, once."""
        kind, rank = event["kind"], event["rank"]
        if kind == "failure":
            for known in (self._places, self._seconds, self._steps, self._since, self._told):
                known.clear()
        elif kind == "started":
            self._places[rank] = {key: event.get(key, "") for key in ("pid", "node", "node_id", "ip")}
            self._seconds.pop(rank, None)
        elif kind == "pulse" and rank in self._places:
            self._seconds.pop(rank, None)
            if event.get("forward_s") and not event["last"]:
                self._seconds[rank], self._steps[rank] = event["forward_s"], event["steps"]
            return self._judge(now)
        return None

    def _judge(self, now: float) -> Event | None:
        found = slowness(self._seconds)
        slow = {rank: times for rank, times in found.items() if times > self.factor}
        self._since = {rank: self._since.get(rank, (now, self._steps[rank])) for rank in slow}
        self._told &= set(slow)
        for rank, times in slow.items():
            since, first = self._since[rank]
            long = now - since >= self.after_s and self._steps[rank] - first >= STEPS
            if long and rank not in self._told:
                self._told.add(rank)
                seconds = self._seconds[rank]
                facts = {"times": times, "forward_s": seconds, "median_s": seconds / times}
                return {"kind": "straggler", "rank": rank, **self._places[rank], **facts}
        return None
