"""Detection of hanging workers: each worker sends its number of batches in a periodic pulse to the driver.

Workers that wait for a hanging one in a collective operation make no progress either, so steps cannot identify it. A
process that is stopped, swapped out or disconnected sends no pulse. A process that is alive but stuck, for example in
its data, has fewer batches than the workers that wait for it.
"""

import logging
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.run.monitor import Client

log = logging.getLogger(__name__)

PULSE_S = 2.0
BLIND_S = 10.0
"""If the driver itself has not checked for this long, it restarts all timers: the driver may have been suspended."""
START_FACTOR = 5.0
"""Factor of `cluster.hang_s` for the first batches of a worker."""

T = TypeVar("T")


class Pulse:
    """A worker's end: a thread that sends the numbers of its batches and bad samples, until `stop`."""

    def __init__(self, client: Client, interval_s: float = PULSE_S, quarantined: Callable[[], int] = lambda: 0) -> None:
        self.client, self.interval_s, self.batches, self.quarantined = client, interval_s, 0, quarantined
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def count(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches and count them."""
        for batch in batches:
            self.batches += 1
            yield batch

    def stop(self) -> None:
        """Send a last pulse, marked as such, and stop."""
        self._over.set()
        self._thread.join()
        self._send(last=True)

    def _beat(self) -> None:
        while not self._over.wait(self.interval_s):
            self._send(last=False)

    def _send(self, last: bool) -> None:
        facts = {"batches": self.batches, "quarantined": self.quarantined(), "last": last}
        self.client.send("pulse", facts, urgent=True)


@dataclass(frozen=True)
class Suspect:
    """A hanging worker."""

    rank: int
    pid: int
    host: str
    node_id: str
    why: str


@dataclass
class _Seen:
    pid: int
    host: str
    node_id: str
    pulse: float
    batches: int = 0
    moved: float = 0.0


class Watchdog:
    """The driver's end: finds hanging workers by their events. Times are those of the driver's clock.

    Args:
        hang_s: seconds without a pulse, or without a batch while others have more, after which a worker hangs.
    """

    def __init__(self, hang_s: float) -> None:
        self.hang_s = hang_s
        self._seen: dict[int, _Seen] = {}
        self._checked: float | None = None

    def note(self, event: Mapping[str, Any], now: float) -> None:
        """Process an event of a worker; unrelated kinds are ignored."""
        kind, rank = event["kind"], event["rank"]
        if kind == "ready":
            self._seen[rank] = _Seen(event["pid"], event["node"], event.get("node_id", ""), now, moved=now)
        elif kind == "failure":
            self._seen.clear()
        elif kind == "pulse" and rank in self._seen:
            if event["last"]:
                del self._seen[rank]
                return
            seen = self._seen[rank]
            seen.pulse = now
            if event["batches"] != seen.batches:
                seen.batches, seen.moved = event["batches"], now

    def suspect(self, now: float) -> Suspect | None:
        """Return a hanging worker, once; None if there is none."""
        checked, self._checked = self._checked, now
        if checked is not None and now - checked > BLIND_S:
            for seen in self._seen.values():
                seen.pulse = seen.moved = now
        found = self._silent(now) or self._stuck(now)
        if found is not None:
            del self._seen[found.rank]
        return found

    def _silent(self, now: float) -> Suspect | None:
        for rank, seen in sorted(self._seen.items()):
            if now - seen.pulse > self.hang_s:
                return self._named(rank, f"has sent no heartbeat for {now - seen.pulse:.0f} s")
        return None

    def _stuck(self, now: float) -> Suspect | None:
        """Return the worker with the fewest batches, if all have waited for long and others have more."""
        if not self._seen:
            return None
        least = min(seen.batches for seen in self._seen.values())
        still = now - max(seen.moved for seen in self._seen.values())
        allowed = self.hang_s * (1 if least > 0 else START_FACTOR)
        if still <= allowed or all(seen.batches == least for seen in self._seen.values()):
            return None
        rank = min(rank for rank, seen in self._seen.items() if seen.batches == least)
        return self._named(rank, f"has received no batch for {still:.0f} s while others wait for it")

    def _named(self, rank: int, why: str) -> Suspect:
        seen = self._seen[rank]
        return Suspect(rank, seen.pid, seen.host, seen.node_id, why)


def end(suspect: Suspect) -> None:
    """Kill a hanging worker on any node, so that Ray Train restarts the group."""
    log.error("worker %d (process %d on %s) %s: killing it", suspect.rank, suspect.pid, suspect.host, suspect.why)
    if suspect.host == platform.node():
        _kill(suspect.pid)
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(suspect.node_id, soft=False)
    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=place).remote(suspect.pid)  # type: ignore[attr-defined]


def _kill(pid: int) -> None:
    """Kill a Ray Train worker on this machine; other processes are not touched."""
    import psutil

    try:
        if "RayTrainWorker" in " ".join(psutil.Process(pid).cmdline()):
            os.kill(pid, signal.SIGKILL)
    except (psutil.Error, ProcessLookupError) as error:
        log.warning("process %d was not killed: %s", pid, error)
