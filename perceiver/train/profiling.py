"""Profiles of single steps by `torch.profiler`: the Chrome trace, the top operators, and where the time went."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from perceiver.config import UserError
from perceiver.train.config import ProfileConfig
from perceiver.train.loop import Hook, StepInfo

log = logging.getLogger(__name__)

OPERATORS = 15
"""The operators with the largest self time that a summary lists."""
MARKER = "perceiver: step "
"""Marks the end of a step in the trace; the time of the first one relates the clocks of the trace and of Python."""
COLLECTIVES = ("gloo:", "nccl:", "c10d::", "record_param_comms", "ncclDevKernel", "ncclKernel")
"""What the names of operators and GPU kernels of communication begin with."""

Interval = tuple[float, float]


def profiling(
    config: ProfileConfig | None, rank: int, start_step: int, write: Callable[[str, bytes], None]
) -> list[Hook]:
    """Return the hook of a rank that is profiled, see `ProfileHook`; empty for the others."""
    return [ProfileHook(config, rank, start_step, write)] if config is not None and rank in config.ranks else []


class ProfileHook:
    """Profiles the steps of `config` on this rank, and writes the trace and a summary.

    It must come before hooks that may raise. Steps before `start_step` are not profiled: a run that resumes after them
    leaves the earlier profile as it is.

    Args:
        config: which steps.
        rank: of this worker.
        start_step: steps done when this process starts.
        write: write a file of the run's folder, given its name and content.
    """

    def __init__(self, config: ProfileConfig, rank: int, start_step: int, write: Callable[[str, bytes], None]) -> None:
        self.config, self.rank, self.write = config, rank, write
        self._profile: profile | None = None
        self._ends: list[Interval] = []
        self._waits: list[Interval] = []
        self._start_before(start_step + 1)

    def __call__(self, info: StepInfo) -> None:
        if self._profile is None:
            return self._start_before(info.step + 1)
        now = time.perf_counter()
        with record_function(f"{MARKER}{info.step}"):
            began = now - info.seconds
            self._ends.append((began, now))
            self._waits.append((began, began + info.wait_seconds))
        if info.step >= self.config.steps[1] or info.last:
            self._finish(info.step)
        return None

    def _start_before(self, step: int) -> None:
        """Start if `step`, the next one, is to be profiled."""
        if self.config.steps[0] <= step <= self.config.steps[1]:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, profile_memory=self.config.memory)
            self._profile.start()

    def _finish(self, step: int) -> None:
        assert self._profile is not None
        done, self._profile = self._profile, None
        done.stop()
        steps = [step - len(self._ends) + 1, step]
        facts = {"rank": self.rank, "steps": steps, "memory": self.config.memory}
        summary = {**facts, **summarise(done, self._ends, self._waits)}
        try:
            with tempfile.TemporaryDirectory(prefix="profile-") as folder:
                trace = Path(folder, "trace.json.gz")
                done.export_chrome_trace(str(trace))
                self.write(f"profile/rank-{self.rank:05d}.json.gz", trace.read_bytes())
            self.write(f"profile/rank-{self.rank:05d}.json", json.dumps(summary, indent=1).encode())
        except (OSError, RuntimeError, UserError) as error:
            log.warning("the profile of steps %d to %d could not be written (%s)", *steps, error)


def summarise(done: profile, steps: Sequence[Interval], waits: Sequence[Interval]) -> dict[str, Any]:
    """Return the seconds, how they are divided, and the top operators of a profile.

    Args:
        done: a stopped profile; it has a marker at the end of each step.
        steps: start and end of each step by `time.perf_counter`.
        waits: the part of each in which it waited for data.
    """
    events = list(done.events() or ())
    marker = next(event for event in events if event.name.startswith(MARKER))
    offset = marker.time_range.start / 1e6 - steps[0][1]
    whole = (steps[0][0] + offset, steps[-1][1] + offset)
    devices = {event.device_type.name for event in events}
    device = "CUDA" if "CUDA" in devices else "CPU"
    compute: list[Interval] = []
    communication: list[Interval] = []
    for event in events:
        interval = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        if event.name.startswith(COLLECTIVES):
            communication.append(interval)
        elif event.device_type.name == device and not is_annotation(event):
            compute.append(interval)
    split = divide(whole, [(a + offset, b + offset) for a, b in waits], compute, communication)
    return {"seconds": whole[1] - whole[0], "device": device.lower(), "split": split, "operators": top(done)}


def is_annotation(event: Any) -> bool:
    """Return whether a profiler's event is a named range of the program, not an operator or a kernel."""
    name = getattr(event, "name", None) or event.key  # a single event, or the average of those of a name
    return bool(event.is_user_annotation) or name.startswith((MARKER, "[memory]"))


def divide(
    whole: Interval, waits: Sequence[Interval], compute: Sequence[Interval], communication: Sequence[Interval]
) -> dict[str, float]:
    """Divide a time span into parts that add up to it: shares of data wait, compute, communication and host.

    Each moment counts for the first of these that goes on in it: waiting for data, an operator or kernel, a collective.
    So communication that overlaps with compute counts as compute. The rest is the host: Python, launches, hooks.
    """
    parts, covered, before = {}, list[Interval](), 0.0
    for name, intervals in (("data wait", waits), ("compute", compute), ("communication", communication)):
        covered += [(max(a, whole[0]), min(b, whole[1])) for a, b in intervals]
        now = union(covered)
        parts[name], before = now - before, now
    length = whole[1] - whole[0]
    return {**{name: part / length for name, part in parts.items()}, "host": 1 - before / length}


def union(intervals: Sequence[Interval]) -> float:
    """Return the length of the union of intervals; those that end before they start are empty."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def top(done: profile) -> list[dict[str, Any]]:
    """Return the operators with the largest self time on the device, otherwise on the CPU: name, calls, ms, bytes."""
    rows = []
    for row in done.key_averages():
        if not is_annotation(row):
            rows.append(
                {
                    "name": row.key,
                    "calls": row.count,
                    "cpu_ms": row.self_cpu_time_total / 1000,
                    "device_ms": row.self_device_time_total / 1000,
                    "memory_mb": (row.self_device_memory_usage or row.self_cpu_memory_usage) / 1e6,
                }
            )
    rows.sort(key=lambda row: (row["device_ms"], row["cpu_ms"]), reverse=True)
    return rows[:OPERATORS]
