"""Finding a worker that hangs: each sends a pulse with how many batches it has got; the driver names who is missing.

Workers that wait in a collective operation for one that hangs do not move either, so steps tell nobody apart. Two
things do. A process that is stopped, swapped out or cut off sends no pulse. One that is alive but stuck, in its data
for example, has got fewer batches than those that wait for it.
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
"""When the driver itself has not looked for so long, it starts to watch afresh: it may be what stood still."""
START_FACTOR = 5.0
"""Patience with the first batches of a worker, times `cluster.hang_s`."""

T = TypeVar("T")


class Pulse:
    """A worker's end: a thread that sends how many batches and bad samples this worker has got, until `stop`."""

    def __init__(self, client: Client, interval_s: float = PULSE_S, quarantined: Callable[[], int] = lambda: 0) -> None:
        self.client, self.interval_s, self.batches, self.quarantined = client, interval_s, 0, quarantined
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def count(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on, counting them."""
        for batch in batches:
            self.batches += 1
            yield batch

    def stop(self) -> None:
        """Send a last pulse that says so, and no more."""
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
    """A worker that holds the others up."""

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
    """The driver's end: takes the workers' events and says who hangs. Times are the driver's own.

    Args:
        hang_s: seconds without a pulse, or without a batch while others have got more.
    """

    def __init__(self, hang_s: float) -> None:
        self.hang_s = hang_s
        self._seen: dict[int, _Seen] = {}
        self._looked: float | None = None

    def note(self, event: Mapping[str, Any], now: float) -> None:
        """Take in an event of a worker; those of other kinds change nothing."""
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
        """Who hangs, if anybody does; named once."""
        looked, self._looked = self._looked, now
        if looked is not None and now - looked > BLIND_S:
            for seen in self._seen.values():
                seen.pulse = seen.moved = now
        found = self._silent(now) or self._stuck(now)
        if found is not None:
            del self._seen[found.rank]
        return found

    def _silent(self, now: float) -> Suspect | None:
        for rank, seen in sorted(self._seen.items()):
            if now - seen.pulse > self.hang_s:
                return self._named(rank, f"has given no sign of life for {now - seen.pulse:.0f} s")
        return None

    def _stuck(self, now: float) -> Suspect | None:
        """The worker with the fewest batches, when nobody has got one for long and others have more."""
        if not self._seen:
            return None
        least = min(seen.batches for seen in self._seen.values())
        still = now - max(seen.moved for seen in self._seen.values())
        patience = self.hang_s * (1 if least > 0 else START_FACTOR)
        if still <= patience or all(seen.batches == least for seen in self._seen.values()):
            return None
        rank = min(rank for rank, seen in self._seen.items() if seen.batches == least)
        return self._named(rank, f"has got no batch for {still:.0f} s while others wait for it")

    def _named(self, rank: int, why: str) -> Suspect:
        seen = self._seen[rank]
        return Suspect(rank, seen.pid, seen.host, seen.node_id, why)


def end(suspect: Suspect) -> None:
    """Kill a worker that hangs, wherever it is, so that Ray Train starts the group again."""
    log.error("worker %d (process %d on %s) %s: killing it", suspect.rank, suspect.pid, suspect.host, suspect.why)
    if suspect.host == platform.node():
        _kill(suspect.pid)
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(suspect.node_id, soft=False)
    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=place).remote(suspect.pid)  # type: ignore[attr-defined]


def _kill(pid: int) -> None:
    """Kill a Ray Train worker of this machine; a process that has ended, or is none, is left alone."""
    import psutil

    try:
        if "RayTrainWorker" in " ".join(psutil.Process(pid).cmdline()):
            os.kill(pid, signal.SIGKILL)
    except (psutil.Error, ProcessLookupError) as error:
        log.warning("process %d was not killed: %s", pid, error)
