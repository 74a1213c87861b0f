"""The channel between the driver and the workers: events one way, a request to stop and messages the other way.

On a Ray cluster it is a small actor (`ActorMonitor`, `ActorClient`); a worker in the driver's own process uses a queue
(`LocalMonitor`, `LocalClient`). An event is a dictionary with the keys ``kind`` and ``rank``.
"""

import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Event = dict[str, Any]

ANSWER_S = 2.0
"""A call of `ActorMonitor.events` waits this long; the events of a slower answer are returned by the next call."""


class _State:
    """The state of the actor: events, the request to stop, and messages to rank 0."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._posted: list[dict[str, Any]] = []
        self._stop = False

    def push(self, event: Event) -> bool:
        """Add an event; return whether the workers shall stop."""
        self._events.append(event)
        return self._stop

    def drain(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and stop."""
        self._stop = True

    def post(self, message: dict[str, Any]) -> None:
        """Send a message to the worker of rank 0."""
        self._posted.append(message)

    def take(self) -> list[dict[str, Any]]:
        """Return the messages since the last call."""
        posted, self._posted = self._posted, []
        return posted


class ActorMonitor:
    """The driver's end: an actor on the driver's node, which does not depend on other nodes.

    Attributes:
        address: the actor's handle, for `make_client`.
    """

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(_State)
        self._asked: Any = None
        self.address: Any = actor.options(num_cpus=0, scheduling_strategy=here).remote()

    def events(self) -> list[Event]:
        """Return the events since the last call, in the order in which they were sent."""
        self._asked = self._asked or self.address.drain.remote()
        ready, _ = ray.wait([self._asked], timeout=ANSWER_S)
        if not ready:
            return []
        asked, self._asked = self._asked, None
        return ray.get(asked)

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and stop."""
        self.address.request_stop.remote()

    def post(self, message: dict[str, Any]) -> None:
        """Send a message to the worker of rank 0."""
        self.address.post.remote(message)

    def close(self) -> None:
        """Kill the actor."""
        ray.kill(self.address)


class LocalMonitor:
    """The driver's end: a queue, for a worker in a thread of this process. The interface is that of `ActorMonitor`."""

    def __init__(self) -> None:
        self.stop = False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    @property
    def address(self) -> "LocalMonitor":
        """See `ActorMonitor`."""
        return self

    def push(self, event: Event) -> None:
        """Add an event."""
        self._events.put(event)

    def events(self) -> list[Event]:
        """See `ActorMonitor`."""
        found: list[Event] = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def request_stop(self) -> None:
        """See `ActorMonitor`."""
        self.stop = True

    def close(self) -> None:
        """Do nothing."""


@dataclass
class ActorClient:
    """A worker's end of an actor.

    Attributes:
        handle: of the actor.
        rank: of the worker.
        interval: least seconds between two events of a kind; earlier ones are dropped unless they are urgent.
    """

    handle: Any
    rank: int
    interval: float = 0.5
    _last: dict[str, float] = field(default_factory=dict)
    _pending: list[Any] = field(default_factory=list)
    _stop: bool = False

    def send(self, kind: str, payload: Mapping[str, Any], urgent: bool = False) -> None:
        """Send an event without waiting."""
        now = time.monotonic()
        if not urgent and now - self._last.get(kind, 0.0) < self.interval:
            return
        self._collect()
        self._last[kind] = now
        self._pending.append(self.handle.push.remote({"kind": kind, "rank": self.rank, **payload}))

    def stop_requested(self) -> bool:
        """Return whether the driver has asked to stop, by the answers that have arrived."""
        self._collect()
        return self._stop

    def flush(self) -> None:
        """Wait until all events have arrived."""
        self._stop = any(ray.get(self._pending)) or self._stop
        self._pending = []

    def _collect(self) -> None:
        if self._pending:
            done, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
            self._stop = any(ray.get(done)) or self._stop


@dataclass
class LocalClient:
    """A worker's end of a `LocalMonitor`. The interface is that of `ActorClient`."""

    monitor: LocalMonitor
    rank: int

    def send(self, kind: str, payload: Mapping[str, Any], urgent: bool = False) -> None:
        """See `ActorClient`."""
        self.monitor.push({"kind": kind, "rank": self.rank, **payload})

    def stop_requested(self) -> bool:
        """See `ActorClient`."""
        return self.monitor.stop

    def flush(self) -> None:
        """Do nothing: a sent event has arrived."""


Monitor = ActorMonitor | LocalMonitor
Client = ActorClient | LocalClient


def make_client(address: Any, rank: int) -> Client:
    """Return a worker's end of the monitor with an address."""
    return LocalClient(address, rank) if isinstance(address, LocalMonitor) else ActorClient(address, rank)
