"""The time of a rank's own computation, measured without synchronisation."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ForwardTimer:
    """Measures the forward passes of each step, which at ZeRO stages 0 to 2 wait for no other rank and no data.

    On CPUs it is their wall time. On GPUs two events enclose each forward pass on its stream; they are read in a later
    step, when they are done, so that nothing waits for them.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._steps: deque[list[tuple[Any, Any]]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure a forward pass."""
        if self.on_gpu:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float | None:
        """End a step; return the seconds of the last step that is known, on GPUs an earlier one; None if none is."""
        if not self.on_gpu:
            seconds, self._seconds = self._seconds, 0.0
            return seconds
        found = None
        while self._steps and self._steps[0][-1][1].query():
            found = sum(first.elapsed_time(last) for first, last in self._steps.popleft()) / 1000
        self._steps.append(self._events)
        self._events = []
        return found
