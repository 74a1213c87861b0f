"""The small actor through which workers tell the driver how they are, and the driver asks them to stop."""

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class MonitorState:
    """Events from the workers in the order they came, and the request to stop. Lives inside an actor."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = self._resize = False
        self._posted: list[dict[str, Any]] = []

    def push(self, event: dict[str, Any]) -> tuple[bool, bool]:
        """Add an event; return whether the workers are asked to stop, and whether to start again in another number."""
        self._events.append(event)
        if event["kind"] == "ready":
            self._resize = False  # this one has started again
        return self._stop, self._resize

    def drain(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and end."""
        self._stop = True

    def request_resize(self) -> None:
        """Ask the workers to save a checkpoint and to start again, in another number."""
        self._resize = True

    def post(self, news: dict[str, Any]) -> None:
        """Leave something for the worker of rank 0."""
        self._posted.append(news)

    def take(self) -> list[dict[str, Any]]:
        """Return what was left for the worker of rank 0 since the last call."""
        posted, self._posted = self._posted, []
        return posted


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
    """A worker's end: sends without waiting, a kind at most every ``interval`` seconds if it is not marked urgent."""

    handle: Any
    rank: int
    interval: float = 0.5
    _last: dict[str, float] = field(default_factory=dict)
    _pending: list[Any] = field(default_factory=list)
    _stop: bool = False
    _resize: bool = False

    def send(self, kind: str, payload: Mapping[str, Any], urgent: bool = False) -> None:
        """Send an event; one that is not urgent and comes too soon after the last of its kind is left out."""
        now = time.monotonic()
        if not urgent and now - self._last.get(kind, 0.0) < self.interval:
            return
        self._collect()
        self._last[kind] = now
        self._pending.append(self.handle.push.remote({"kind": kind, "rank": self.rank, **payload}))

    def stop_requested(self) -> bool:
        """Whether the driver asked to stop, as far as the answers have come in."""
        self._collect()
        return self._stop

    def resize_requested(self) -> bool:
        """Whether the workers are asked to start again in another number."""
        self._collect()
        return self._resize

    def flush(self) -> None:
        """Wait until all events have been taken."""
        self._note(ray.get(self._pending))
        self._pending = []

    def _collect(self) -> None:
        if not self._pending:
            return
        done, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
        self._note(ray.get(done))

    def _note(self, answers: Sequence[tuple[bool, bool]]) -> None:
        self._stop = self._stop or any(stop for stop, _ in answers)
        self._resize = self._resize or any(resize for _, resize in answers)


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

    def resize_requested(self) -> bool:
        """Never: this worker is the only one."""
        return False

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
