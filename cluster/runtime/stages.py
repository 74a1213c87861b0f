"""How long the stages of a worker's start take."""

import time

import psutil


class Stages:
    """Stop watch of the stages of a start; the first one began with this process.

    Attributes:
        seconds: by stage, in order.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = psutil.Process().create_time()

    def end(self, stage: str) -> None:
        """Note the end of a stage, which began when the one before it ended."""
        now = time.time()
        self.seconds[stage], self._last = round(now - self._last, 2), now
