"""How often Ray Data's scheduling loop turns.

A module of its own without torch: Ray Data names the callback to every data task, which imports it.
"""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

REST_S, LONGEST_REST_S = 0.01, 0.2
"""Pause after each turn of Ray Data's scheduling loop, while the consumer waits and while it never does."""

REST_SHARE = 0.02
"""Pause as a share of the time since the consumer last waited: what a pause that is too long may cost."""


class Pace:
    """How long the scheduling loops of this process may rest: longer while no consumer has had to wait."""

    def __init__(self) -> None:
        self._waited = time.monotonic()

    def waited(self) -> None:
        """Note that a consumer waits, or will soon."""
        self._waited = time.monotonic()

    def rest_s(self) -> float:
        """Return the pause from one turn to the next."""
        return min(max(REST_S, REST_SHARE * (time.monotonic() - self._waited)), LONGEST_REST_S)


PACE = Pace()


class Rest(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest.

    The loop waits for tasks only while one is at work; when rows wait for the consumer instead, it turns without a
    pause, which costs the training worker half a core and its interpreter lock. A turn takes one to two milliseconds.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Sleep a little; called by Ray after each turn."""
        time.sleep(PACE.rest_s())
