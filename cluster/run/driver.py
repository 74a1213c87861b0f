"""The driver's loop, shared by `train` and `tune`: Ray's `fit` in a thread, the workers' events in the caller's."""

import concurrent.futures
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.record.failures import TRANSIENT, failure_reason
from cluster.worker.monitor import Event, Monitor

log = logging.getLogger(__name__)

POLL_S = 0.25
"""Seconds between two polls of the workers' events."""
REFUSED_GRACE_S = 3.0
"""After a worker has refused to continue, the driver waits this long for the others, which wait for that worker."""
POLLED: Event = {"kind": "polled", "rank": 0}
"""Yielded after each poll, for periodic work of the caller."""


class Fit:
    """A call of `fit` in another thread, since the main thread handles signals, and the events of its workers.

    Args:
        future: the result of `fit` of a trainer or a tuner.
        monitor: receives the workers' events.
        ended: returns which process has ended without which Ray does not work, empty if none has.

    Attributes:
        refused: why a worker refused to continue, or failed twice in the same way without a step in between; else
            empty. The others may then still run after `events` has ended.
        lost: the process of Ray that has ended, or empty. Ray must not be called then: it would wait for that process.
    """

    def __init__(
        self, future: "concurrent.futures.Future[Any]", monitor: Monitor, ended: Callable[[], str] = str
    ) -> None:
        self.future, self.monitor, self.ended, self.refused, self.lost = future, monitor, ended, "", ""
        self._failure = ""

    @property
    def running(self) -> bool:
        """Whether `fit` has not returned yet."""
        return not self.future.done()

    def events(self) -> Iterator[Event]:
        """Yield the workers' events, and `POLLED` after each poll, until `fit` has returned or Ray has ended."""
        deadline = math.inf
        while self.running and time.monotonic() < deadline:
            self.lost = self.ended()
            if self.lost:
                return
            yield from self._poll()
            yield POLLED
            if self.refused:
                deadline = min(deadline, time.monotonic() + REFUSED_GRACE_S)
            concurrent.futures.wait([self.future], POLL_S)
        yield from self._poll()

    def _poll(self) -> Iterator[Event]:
        for event in self.monitor.events():
            match event["kind"]:
                case "refused":
                    self.refused = self.refused or event["error"]
                case "progress":
                    self._failure = ""
                case "failure" if event.get("raised") and not TRANSIENT.search(event["reason"]):
                    if event["reason"] == self._failure:
                        self.refused = self.refused or f"twice before the first step: {event['reason']}"
                        continue
                    self._failure = event["reason"]
            yield event

    @property
    def result(self) -> Any:
        """What `fit` has returned; None if it has not, or has failed."""
        return self.future.result() if self.future.done() and self.future.exception() is None else None

    @property
    def outcome(self) -> dict[str, Any]:
        """The workers' result (``status`` finished or stopped), or ``status`` failed or refused with ``error``."""
        if self.refused:
            return {"status": "refused", "error": self.refused}
        if self.lost:
            return {"status": "failed", "error": self.lost}
        if error := self.future.exception():
            log.error("fit failed", exc_info=error)
            return {"status": "failed", "error": failure_reason(error)}
        return dict(getattr(self.result, "return_value", None) or {})
