"""What the Ray Train controller tells the user through the monitor."""

import time
from typing import Any

from ray.train import UserCallback

from cluster.record.failures import failure_reason

AGAIN_S = 5.0
"""Ray tells of the same failure at each look at the workers, until all of them have ended."""


class FailureReporter(UserCallback):
    """Sends an event for each worker failure that Ray Train recovers from."""

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor
        self._told: tuple[int, str, float] | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Name the first worker that failed and why. Called by Ray, by keyword, in the controller's process."""
        error = Exception()
        error.worker_failures = worker_exceptions  # type: ignore[attr-defined]
        rank, _ = sorted(worker_exceptions.items())[0]
        reason = failure_reason(error).split(": ", 1)[-1]
        before, self._told = self._told, (rank, reason, time.monotonic())
        if before and before[:2] == (rank, reason) and time.monotonic() - before[2] < AGAIN_S:
            return
        self.monitor.push.remote({"kind": "failure", "rank": 0, "failed": rank, "reason": reason})
