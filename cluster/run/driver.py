"""The driver's loop: Ray's `fit` in a thread, the workers' events in the caller's. `train` and `tune` share it."""

import concurrent.futures
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

from cluster.record.failures import failure_reason
from cluster.run.monitor import Event, Monitor

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""Between two looks at what the workers have sent."""
REFUSED_GRACE_S = 3.0
"""A worker that refuses to continue leaves the others waiting for it: after so long the driver waits no more."""
LOOKED: Event = {"kind": "looked", "rank": 0}
"""Yielded after each look, for what is to be done now and then."""


class Fit:
    """A call of `fit` in another thread, since signals are the main thread's, and what its workers send meanwhile.

    Args:
        future: of the `fit` of a trainer or a tuner.
        monitor: through which the workers send events.

    Attributes:
        refused: why a worker refused to continue; empty otherwise. Then the others may still run when `events` ends.
    """

    def __init__(self, future: "concurrent.futures.Future[Any]", monitor: Monitor) -> None:
        self.future, self.monitor, self.refused = future, monitor, ""

    @property
    def running(self) -> bool:
        """Whether `fit` has not returned yet."""
        return not self.future.done()

    def events(self) -> Iterator[Event]:
        """Yield the workers' events, and `LOOKED` after each look, until `fit` has returned."""
        deadline = math.inf
        while self.running and time.monotonic() < deadline:
            yield from self._look()
            yield LOOKED
            if self.refused:
                deadline = min(deadline, time.monotonic() + REFUSED_GRACE_S)
            concurrent.futures.wait([self.future], LOOK_S)
        yield from self._look()

    def _look(self) -> Iterator[Event]:
        for event in self.monitor.events():
            if event["kind"] == "refused":
                self.refused = self.refused or event["error"]
            yield event

    @property
    def outcome(self) -> dict[str, Any]:
        """What the workers returned (``status`` finished or stopped), or status failed or refused with ``error``."""
        if self.refused:
            return {"status": "refused", "error": self.refused}
        if error := self.future.exception():
            log.error("fit failed", exc_info=error)
            return {"status": "failed", "error": failure_reason(error)}
        return dict(getattr(self.future.result(), "return_value", None) or {})
