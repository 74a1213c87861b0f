"""The watchdog finds the worker for which the others wait, and only that one."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.worker.monitor import LocalClient, LocalMonitor
from cluster.worker.watchdog import BLIND_S, PULSE_S, Pulse, Suspect, Watchdog, end, keep_stacks
from perceiver.train.engine.protocol import StepResult
from perceiver.train.loop import StepInfo

HANG, LONG = 60.0, 1800.0


def ready(rank: int) -> dict[str, Any]:
    return {"kind": "started", "rank": rank, "pid": 100 + rank, "node": "host"}


def pulse(rank: int, batches: int, last: bool = False, **facts: Any) -> dict[str, Any]:
    """Return a pulse of a worker that is in a phase that may take long, unless ``facts`` differ."""
    usual = {"moves": batches, "phase": "evaluation", "allowed_s": LONG, "saving_s": 0.0}
    return {"kind": "pulse", "rank": rank, "batches": batches, "last": last, **usual, **facts}


def watch(
    seconds: float, pulses: dict[int, list[int]], step: float = PULSE_S, **facts: Any
) -> tuple[float, Suspect] | None:
    """Simulate time; return when a worker was suspected, and which.

    ``pulses`` lists, by rank, the number of batches in each pulse (the last one repeats, -1 for no pulse).
    """
    dog = Watchdog(HANG, LONG)
    for rank in pulses:
        dog.note(ready(rank), 0.0)
    for turn in range(int(seconds / step)):
        now = (turn + 1) * step
        for rank, counts in pulses.items():
            count = counts[min(turn, len(counts) - 1)]
            if count >= 0:
                dog.note(pulse(rank, count, **facts), now)
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
    assert watch(LONG, {0: [5], 1: [5]}) is None
    found = watch(LONG * 2, {0: [5], 1: [5]})
    assert found is not None and found[0] <= LONG + 5 * PULSE_S


def test_workers_that_all_stand_still_are_found_within_two_minutes_with_operation_and_stacks(tmp_path: Path) -> None:
    where = {"phase": "", "allowed_s": HANG, "stacks": "thread MainThread:", "operation": "sum (ranks.py:44)"}
    found = watch(600, {0: [1, 2, 3], 1: [1, 2, 3]}, **where)
    assert found is not None and HANG < found[0] <= 120
    suspect = keep_stacks(found[1], tmp_path)
    assert "ranks 0, 1 in sum (ranks.py:44)" in suspect.why and str(tmp_path) in suspect.why
    assert [path.name for path in sorted(tmp_path.glob("hang-*/*"))] == ["rank-00000.txt", "rank-00001.txt"]


def test_one_worker_in_a_long_phase_or_with_long_steps_gives_all_more_time() -> None:
    dog = Watchdog(HANG, LONG)
    for rank in (0, 1):
        dog.note(ready(rank), 0.0)
    for now in range(2, int(LONG), 2):
        dog.note(pulse(0, 3), float(now))
        dog.note(pulse(1, 3, phase="", allowed_s=HANG), float(now))
        assert dog.suspect(float(now)) is None


def test_a_save_in_the_background_that_does_not_end_is_found() -> None:
    facts = {"phase": "", "allowed_s": HANG, "saving_s": LONG + 1, "stacks": "thread checkpoint:", "operation": "put"}
    found = watch(60, {0: list(range(100)), 1: list(range(100))}, **facts)
    assert found is not None and "save" in found[1].why and "ranks 0, 1 in put" in found[1].why


def test_first_batches_may_take_longer() -> None:
    assert watch(HANG * 4, {0: [1], 1: [0]}) is None
    found = watch(HANG * 8, {0: [1], 1: [0]})
    assert found is not None and found[1].rank == 1


def test_a_suspended_driver_suspects_nobody() -> None:
    dog = Watchdog(HANG, LONG)
    dog.note(ready(0), 0.0)
    assert dog.suspect(1.0) is None
    assert dog.suspect(1.0 + HANG + BLIND_S) is None
    assert dog.suspect(1.0 + HANG + BLIND_S + 5) is None


def test_workers_that_wait_for_the_head_of_the_cluster_do_not_hang() -> None:
    """And have the whole time again when it answers."""
    away = True
    dog = Watchdog(HANG, LONG, lambda: away)
    dog.note(ready(0), 0.0)
    dog.note(pulse(0, 1), 1.0)
    assert all(dog.suspect(float(now)) is None for now in range(1, int(9 * HANG), 5))
    away = False
    back = int(9 * HANG)
    found = next(now for now in range(back, back + 1000, 5) if dog.suspect(float(now)) is not None)
    assert HANG < found - back <= HANG + 10


def test_workers_that_ended_or_failed_are_not_watched() -> None:
    dog = Watchdog(HANG, LONG)
    for rank in (0, 1):
        dog.note(ready(rank), 0.0)
    dog.note(pulse(0, 3, last=True), 1.0)
    dog.note({"kind": "failure", "rank": 0, "failed": 1, "reason": "x"}, 2.0)
    dog.note(pulse(1, 3), 3.0)
    for now in range(4, 400, 5):
        assert dog.suspect(float(now)) is None


def test_a_pulse_counts_batches_from_a_thread() -> None:
    monitor = LocalMonitor()
    beat = Pulse(LocalClient(monitor, 3), 60, 600, interval_s=0.01, quarantined=lambda: 5)
    assert list(beat.count(["a", "b"])) == ["a", "b"]
    events: list[dict[str, Any]] = []
    while not events or events[-1]["batches"] < 2:
        events += monitor.events()
    beat.stop()
    events += monitor.events()
    wanted = {"kind": "pulse", "rank": 3, "batches": 2, "moves": 2, "quarantined": 5, "last": True}
    assert wanted.items() <= events[-1].items() and "stacks" not in events[-1]
    assert "pulse" not in [thread.name for thread in threading.enumerate()]


def test_a_worker_that_stands_still_sends_its_stacks_and_names_the_operation() -> None:
    monitor = LocalMonitor()
    events: list[dict[str, Any]] = []
    found = threading.Event()

    def work() -> None:
        beat = Pulse(LocalClient(monitor, 0), hang_s=0.02, long_s=600, interval_s=0.01)
        with beat.during("evaluation"):
            next(beat.count(iter(found.wait, None)))
        beat.stop()

    thread = threading.Thread(target=work, name="trainer")
    thread.start()
    wanted = "count (cluster/worker/watchdog.py:"  # on a busy machine it stands still elsewhere before
    while not (sent := [event for event in events if event.get("stacks") and event["operation"].startswith(wanted)]):
        events += monitor.events()
    found.set()
    thread.join()
    assert sent[0]["allowed_s"] == 600
    assert "thread trainer:" in sent[0]["stacks"] and "thread pulse:" in sent[0]["stacks"]


def test_the_limit_grows_with_long_steps_but_not_by_the_first() -> None:
    monitor = LocalMonitor()
    beat = Pulse(LocalClient(monitor, 0), hang_s=10, long_s=600, interval_s=600)

    def limit(seconds: float) -> float:
        beat.stepped(StepInfo(1, 9, 1.0, 8, seconds, 0.0, StepResult(0, 1.0, {}, 1.0, 0.1, False)))
        beat.send()
        return monitor.events()[-1]["allowed_s"]

    assert [limit(seconds) for seconds in (100.0, 1.0, 1.0, 8.0, 8.0, 8.0)] == [600, 10, 10, 10, 13.5, 24]
    with beat.during("checkpoint"):
        beat.send()
        assert monitor.events()[-1]["phase"] == "checkpoint"
    beat.stop()


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
