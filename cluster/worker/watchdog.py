"""Detection of hanging workers: each worker reports its progress in a periodic pulse to the driver.

Workers that wait for a hanging one in a collective operation make no progress either, so steps cannot identify it. A
process that is stopped, swapped out or disconnected sends no pulse. A process that is alive but stuck, for example in
its data, has fewer batches than the workers that wait for it. If all have the same number and none makes progress, all
stand in the same operation, or in operations that wait for each other.
"""

import logging
import math
import os
import platform
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from cluster.worker.monitor import Client
from cluster.worker.stacks import all_stacks, by_operation, operation
from perceiver.train.loop import Hook, StepInfo

log = logging.getLogger(__name__)

PULSE_S = 2.0
BLIND_S = 10.0
"""If the driver itself has not checked for this long, it restarts all timers: the driver may have been suspended."""
START_FACTOR = 5.0
"""Factor of `cluster.hang_s` for the first batches of a worker."""
START, FIRST_STEPS = "start", 2
"""The phase of a worker until it has done this many steps: connections, restore, first batches, compilation."""
STEP_FACTOR = 3.0
"""A step may take this many times the median of the last ones, if that is longer than `cluster.hang_s`."""

T = TypeVar("T")


class Pulse:
    """A worker's end: a thread that sends its progress and its number of bad samples, until `stop`.

    Args:
        client: sends the pulses.
        hang_s: seconds without progress after which the worker hangs.
        long_s: the same in a phase that may take long, see `mark`.
        interval_s: seconds between two pulses.
        quarantined: return the number of bad samples.

    Attributes:
        batches: number of batches of training and evaluation.
        steps: number of steps.
        moves: number of signs of progress: batches, steps, phases.
        saving: return for how many seconds a checkpoint has been written in the background, 0 if none is.
    """

    def __init__(
        self,
        client: Client,
        hang_s: float,
        long_s: float,
        interval_s: float = PULSE_S,
        quarantined: Callable[[], int] = lambda: 0,
    ) -> None:
        self.client, self.hang_s, self.long_s, self.interval_s = client, hang_s, max(hang_s, long_s), interval_s
        self.quarantined, self.saving = quarantined, lambda: 0.0
        self.batches = self.moves = self.steps = 0
        self._phase, self._seconds, self._forward = START, deque[float](maxlen=20), deque[float](maxlen=20)
        self._moved, self._due = time.monotonic(), hang_s
        self._trainer, self._over = threading.current_thread(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def count(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches and count them."""
        for batch in batches:
            self.batches += 1
            self._move()
            yield batch

    def stepped(self, info: StepInfo) -> None:
        """Take note of a step (a hook)."""
        self.steps += 1
        if self.steps > 1:  # the first one includes compilation
            self._seconds.append(info.seconds)
        if info.result.forward_s is not None:
            self._forward.append(info.result.forward_s)
        self._enter(self._usual())

    def mark(self, phase: str = "") -> Hook:
        """Return a hook that begins a phase that may take long, such as an evaluation; without a name: that ends it."""
        return lambda info: self._enter(phase or self._usual())

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Mark a phase that may take long outside of the hooks."""
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(self._usual())

    def stop(self) -> None:
        """Send a last pulse, marked as such, and stop."""
        self._over.set()
        self._thread.join()
        self.send(last=True)

    def _usual(self) -> str:
        return START if self.steps < FIRST_STEPS else ""

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._move()

    def _move(self) -> None:
        self.moves += 1
        self._moved, self._due = time.monotonic(), self.hang_s

    def _allowed_s(self) -> float:
        if self._phase:
            return self.long_s
        return max(self.hang_s, STEP_FACTOR * statistics.median(self._seconds))

    def _beat(self) -> None:
        while not self._over.wait(self.interval_s):
            self.send()

    def send(self, last: bool = False) -> None:
        """Send a pulse; `last`: the worker is not watched any more."""
        facts = {"batches": self.batches, "moves": self.moves, "quarantined": self.quarantined(), "last": last}
        facts |= {"phase": self._phase, "allowed_s": self._allowed_s(), "saving_s": self.saving()}
        facts["steps"] = self.steps
        facts["forward_s"] = statistics.median(self._forward) if self._forward else None
        self.client.send("pulse", {**facts, **self._standing()}, urgent=True)

    def _standing(self) -> dict[str, str]:
        """Return where this worker stands, if it has not moved for long, or its save has not ended for long."""
        still, allowed = time.monotonic() - self._moved, self._allowed_s()
        saver = next((thread for thread in threading.enumerate() if thread.name == "checkpoint"), None)
        if saver is not None and self.saving() > self.long_s:
            return {"stacks": all_stacks(), "operation": operation(saver)}
        if still < self._due:
            return {}
        self._due = allowed if still < allowed else 2 * still
        return {"stacks": all_stacks(), "operation": operation(self._trainer)}


@dataclass(frozen=True)
class Suspect:
    """A hanging worker; `stacks` are those that the workers have sent, by rank."""

    rank: int
    pid: int
    host: str
    node_id: str
    why: str
    stacks: Mapping[int, str] = field(default_factory=dict)


@dataclass
class _Seen:
    pid: int
    host: str
    node_id: str
    pulse: float
    moved: float
    batches: int = 0
    moves: int = 0
    allowed_s: float = math.inf
    saving_s: float = 0.0
    phase: str = START
    stacks: str = ""
    operation: str = "an unknown operation"


class Watchdog:
    """The driver's end: finds hanging workers by their events. Times are those of the driver's clock.

    Args:
        hang_s: seconds without a pulse, or without a batch while others have more, after which a worker hangs.
        long_s: seconds after which the save of a checkpoint hangs.
        excused: whether workers wait for something else, such as the head of the cluster; asked while none has made
            progress for half of `hang_s`. When it is over, all timers restart.
    """

    def __init__(self, hang_s: float, long_s: float, excused: Callable[[], bool] = lambda: False) -> None:
        self.hang_s, self.long_s, self.excused = hang_s, max(hang_s, long_s), excused
        self._waited = False
        self._seen: dict[int, _Seen] = {}
        self._checked: float | None = None

    def note(self, event: Mapping[str, Any], now: float) -> None:
        """Process an event of a worker; unrelated kinds are ignored."""
        kind, rank = event["kind"], event["rank"]
        if kind == "started":
            self._seen[rank] = _Seen(event["pid"], event["node"], event.get("node_id", ""), now, now)
        elif kind == "failure":
            self._seen.clear()
        elif kind == "pulse" and rank in self._seen:
            if event["last"]:
                del self._seen[rank]
                return
            seen = self._seen[rank]
            seen.pulse, seen.batches = now, event["batches"]
            seen.allowed_s, seen.saving_s, seen.phase = event["allowed_s"], event["saving_s"], event["phase"]
            if event["moves"] != seen.moves:
                seen.moves, seen.moved, seen.stacks = event["moves"], now, ""
            if event.get("stacks"):
                seen.stacks, seen.operation = event["stacks"], event["operation"]

    def suspect(self, now: float) -> Suspect | None:
        """Return a hanging worker, once; None if there is none."""
        checked, self._checked = self._checked, now
        if checked is not None and now - checked > BLIND_S:
            self._restart(now)
        if self._seen and self._still_s(now) > self.hang_s / 2 and self.excused():
            self._waited = True
            return None
        if self._waited:
            self._waited = False
            self._restart(now)
        found = self._silent(now) or self._stuck(now)
        if found is not None:
            del self._seen[found.rank]
            return found
        found = self._still(now) or self._saving()
        if found is not None:
            self._seen.clear()  # the death of one worker restarts all
        return found

    def _restart(self, now: float) -> None:
        for seen in self._seen.values():
            seen.pulse = seen.moved = now

    def _silent(self, now: float) -> Suspect | None:
        for rank, seen in sorted(self._seen.items()):
            if now - seen.pulse > self.hang_s * (START_FACTOR if seen.phase == START else 1):
                return self._named(rank, f"has sent no heartbeat for {now - seen.pulse:.0f} s")
        return None

    def _stuck(self, now: float) -> Suspect | None:
        """Return the worker with the fewest batches, if all have waited for long and others have more."""
        if not self._seen:
            return None
        least = min(seen.batches for seen in self._seen.values())
        still = self._still_s(now)
        allowed = self.hang_s * (1 if least > 0 else START_FACTOR)
        if still <= allowed or all(seen.batches == least for seen in self._seen.values()):
            return None
        rank = min(rank for rank, seen in self._seen.items() if seen.batches == least)
        return self._named(rank, f"has received no batch for {still:.0f} s while others wait for it ({self._where()})")

    def _still(self, now: float) -> Suspect | None:
        """Return the first worker, if none has made progress for longer than any of them may take."""
        if not self._seen:
            return None
        still = self._still_s(now)
        if still <= max(seen.allowed_s for seen in self._seen.values()) + 2 * PULSE_S:  # the stacks are on their way
            return None
        why = f"has made no progress for {still:.0f} s, like all workers ({self._where()})"
        return self._named(min(self._seen), why)

    def _saving(self) -> Suspect | None:
        """Return the first worker whose checkpoint has been written for too long."""
        late = {rank: seen for rank, seen in self._seen.items() if seen.saving_s > self.long_s and seen.stacks}
        if not late:
            return None
        rank = min(late)
        where = by_operation({rank: seen.operation for rank, seen in late.items()})
        return self._named(rank, f"has not ended a save for {late[rank].saving_s:.0f} s ({where})")

    def _where(self) -> str:
        return by_operation({rank: seen.operation for rank, seen in self._seen.items()})

    def _still_s(self, now: float) -> float:
        return now - max(seen.moved for seen in self._seen.values())

    def _named(self, rank: int, why: str) -> Suspect:
        seen, stacks = self._seen[rank], {rank: seen.stacks for rank, seen in self._seen.items() if seen.stacks}
        return Suspect(rank, seen.pid, seen.host, seen.node_id, why, stacks)


def keep_stacks(suspect: Suspect, logs: Path) -> Suspect:
    """Write the stacks below a run's ``logs`` folder; return the suspect with that folder in `why`."""
    if not suspect.stacks:
        return suspect
    folder = logs / f"hang-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, text in suspect.stacks.items():
            (folder / f"rank-{rank:05d}.txt").write_text(text)
    except OSError as error:
        log.warning("the stacks of a hang were not written: %s", error)
        return suspect
    return replace(suspect, why=f"{suspect.why}; stacks in {folder}")


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
