"""The watchdog finds the worker for which the others wait, and only that one."""

import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from cluster.run.monitor import LocalClient, LocalMonitor
from cluster.run.watchdog import BLIND_S, PULSE_S, Pulse, Suspect, Watchdog, end

HANG = 60.0


def ready(rank: int) -> dict[str, Any]:
    return {"kind": "ready", "rank": rank, "pid": 100 + rank, "node": "host", "seconds": 1.0}


def pulse(rank: int, batches: int, last: bool = False) -> dict[str, Any]:
    return {"kind": "pulse", "rank": rank, "batches": batches, "last": last}


def watch(seconds: float, pulses: dict[int, list[int]], step: float = PULSE_S) -> tuple[float, Suspect] | None:
    """Simulate time; return when a worker was suspected, and which.

    ``pulses`` lists, by rank, the number of batches in each pulse (the last one repeats, -1 for no pulse).
    """
    dog = Watchdog(HANG)
    for rank in pulses:
        dog.note(ready(rank), 0.0)
    for turn in range(int(seconds / step)):
        now = (turn + 1) * step
        for rank, counts in pulses.items():
            count = counts[min(turn, len(counts) - 1)]
            if count >= 0:
                dog.note(pulse(rank, count), now)
        if (found := dog.suspect(now)) is not None:
            return now, found
    return None


def test_workers_that_make_progress_are_not_suspected() -> None:
    assert watch(600, {0: list(range(1, 400)), 1: list(range(1, 400))}) is None


def test_a_stopped_process_is_found_within_two_minutes() -> None:
    found = watch(600, {0: [1, 2, 3, 4], 1: [1, 2, 3, -1], 2: [1, 2, 3, 4]})
    assert found is not None and found[0] <= 120
    assert (found[1].rank, found[1].pid) == (1, 101) and "heartbeat" in found[1].why


def test_the_worker_without_data_is_found_not_those_that_wait_for_it() -> None:
    found = watch(600, {0: [1, 2, 3, 4], 1: [1, 2, 3, 3], 2: [1, 2, 3, 4]})
    assert found is not None and found[0] <= 120 and found[1].rank == 1 and "no batch" in found[1].why


def test_a_long_evaluation_or_save_is_not_a_hang() -> None:
    assert watch(3600, {0: [5], 1: [5]}) is None


def test_first_batches_may_take_longer() -> None:
    assert watch(HANG * 4, {0: [1], 1: [0]}) is None
    found = watch(HANG * 8, {0: [1], 1: [0]})
    assert found is not None and found[1].rank == 1


def test_a_suspended_driver_suspects_nobody() -> None:
    dog = Watchdog(HANG)
    dog.note(ready(0), 0.0)
    assert dog.suspect(1.0) is None
    assert dog.suspect(1.0 + HANG + BLIND_S) is None
    assert dog.suspect(1.0 + HANG + BLIND_S + 5) is None


def test_workers_that_ended_or_failed_are_not_watched() -> None:
    dog = Watchdog(HANG)
    for rank in (0, 1):
        dog.note(ready(rank), 0.0)
    dog.note(pulse(0, 3, last=True), 1.0)
    dog.note({"kind": "failure", "rank": 0, "failed": 1, "reason": "x"}, 2.0)
    dog.note(pulse(1, 3), 3.0)
    for now in range(4, 400, 5):
        assert dog.suspect(float(now)) is None


def test_a_pulse_counts_batches_from_a_thread() -> None:
    monitor = LocalMonitor()
    beat = Pulse(LocalClient(monitor, 3), interval_s=0.01, quarantined=lambda: 5)
    assert list(beat.count(["a", "b"])) == ["a", "b"]
    events: list[dict[str, Any]] = []
    while not events or events[-1]["batches"] < 2:
        events += monitor.events()
    beat.stop()
    events += monitor.events()
    assert events[-1] == {"kind": "pulse", "rank": 3, "batches": 2, "quarantined": 5, "last": True}
    assert "pulse" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(("name", "dies"), [("RayTrainWorker", True), ("other", False)])
def test_only_a_training_worker_is_killed(name: str, dies: bool) -> None:
    script = "import sys, time; print('up', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        end(Suspect(0, process.pid, os.uname().nodename, "", "hangs"))
        if dies:
            assert process.wait(timeout=60) == -9
        else:
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
