"""The small actor through which workers tell the driver how they are, and the driver asks them to stop."""

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class MonitorState:
    """Events from the workers in the order they came, and the request to stop. Lives inside an actor."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False

    def push(self, event: dict[str, Any]) -> bool:
        """Add an event; return whether the driver asked to stop."""
        self._events.append(event)
        return self._stop

    def drain(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and end."""
        self._stop = True


class LocalMonitor:
    """The same for a worker that runs in a thread of the driver's process: events go to a queue, without an actor."""

    def __init__(self, events: "queue.SimpleQueue[dict[str, Any]]") -> None:
        self.events = events
        self.stop = False


def start_monitor() -> Any:
    """Start the actor on the driver's node, so that the loss of another does not take it; return its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(MonitorState).options(num_cpus=0, scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@dataclass
class MonitorClient:
    """A worker's end: sends without waiting, at most every ``interval`` seconds unless an event is marked urgent."""

    handle: Any
    rank: int
    interval: float = 0.2
    _last: float = 0.0
    _pending: list[Any] = field(default_factory=list)
    _stop: bool = False

    def send(self, kind: str, payload: Mapping[str, Any], urgent: bool = False) -> None:
        """Send an event; a progress event that comes too soon after the last is left out."""
        now = time.monotonic()
        self._collect()
        if not urgent and now - self._last < self.interval:
            return
        self._last = now
        self._pending.append(self.handle.push.remote({"kind": kind, "rank": self.rank, **payload}))

    def stop_requested(self) -> bool:
        """Whether the driver asked to stop, as far as the answers have come in."""
        self._collect()
        return self._stop

    def flush(self) -> None:
        """Wait until all events have been taken."""
        self._stop = any([self._stop, *ray.get(self._pending)])
        self._pending = []

    def _collect(self) -> None:
        if not self._pending:
            return
        done, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
        self._stop = self._stop or any(ray.get(done))


@dataclass
class LocalClient:
    """What `MonitorClient` is, for a `LocalMonitor`."""

    monitor: LocalMonitor
    rank: int

    def send(self, kind: str, payload: Mapping[str, Any], urgent: bool = False) -> None:
        """Leave an event for the driver's thread."""
        self.monitor.events.put({"kind": kind, "rank": self.rank, **payload})

    def stop_requested(self) -> bool:
        """Whether the driver asked to stop."""
        return self.monitor.stop

    def flush(self) -> None:
        """Do nothing: an event has arrived when it is sent."""


Client = MonitorClient | LocalClient


def connect(monitor: Any, rank: int) -> Client:
    """Return a worker's end of a monitor actor, or of a `LocalMonitor`."""
    return LocalClient(monitor, rank) if isinstance(monitor, LocalMonitor) else MonitorClient(monitor, rank)


def pump(handle: Any, show: Callable[[dict[str, Any]], None]) -> None:
    """Hand every waiting event to ``show`` (driver's end)."""
    for event in ray.get(handle.drain.remote()):
        show(event)
