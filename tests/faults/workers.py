"""Faults of workers and data tasks: killed, stopped, out of memory, an exception, a loss that is NaN."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.faults.job import Job, Outcome, fault_tree, send
from tests.faults.table import STEPS, expect_finished, scenario

KILLED_WITHIN_S = 15
HUNG_WITHIN_S = 120


def _start_again(job: Job, outcome: Outcome, harm: Callable[[Job], float], said: str) -> None:
    """Inject a fault into a worker once there is a checkpoint; the workers must restart and finish."""
    try:
        job.start().wait_checkpoint()
        fault = harm(job)
        detected = job.wait_line(said)
        expect_finished(job, outcome)
        outcome.expect(job.said("resumed at step"), "the workers resumed from a checkpoint")
        job.judge(outcome, fault, detected, STEPS)
    finally:
        job.kill()


@scenario("worker SIGKILL")
def worker_killed(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """A worker is killed."""
    job = Job(folder, fault_tree(tree, STEPS))
    _start_again(job, outcome, lambda job: send(job.worker(1), signal.SIGKILL), "worker 1 failed")
    outcome.expect((outcome.detected_s or 0) <= KILLED_WITHIN_S, "detected within 15 s")


@scenario("worker SIGSTOP (hang)")
def worker_stopped(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """A worker is stopped, so that the others wait for it in a collective operation."""
    tree = fault_tree(tree, STEPS)
    tree["cluster"]["hang_s"] = float(os.environ.get("FAULT_HANG_S", "60"))
    job = Job(folder, tree)
    _start_again(job, outcome, lambda job: send(job.worker(1), signal.SIGSTOP), "worker 1 (process")
    outcome.expect((outcome.detected_s or 0) <= HUNG_WITHIN_S, "detected within 120 s")


def _all_stand_still(job: Job, outcome: Outcome, harm: Callable[[Job], float], said: str) -> None:
    """Like `_start_again`, for a fault in which no worker is behind; the stacks of all workers must be kept."""
    job.tree["cluster"]["hang_s"] = float(os.environ.get("FAULT_HANG_S", "60"))
    _start_again(job, outcome, harm, said)
    outcome.expect((outcome.detected_s or 0) <= HUNG_WITHIN_S, "detected within 120 s")
    stacks = sorted(path.name for path in job.run.glob("logs/hang-*/*"))
    outcome.expect(stacks == ["rank-00000.txt", "rank-00001.txt"], f"the stacks of all workers are kept: {stacks}")


@scenario("collective that a rank skips (hang)")
def collective_skipped(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """Rank 0 enters a barrier that rank 1 skips: both wait for ever, and neither is behind."""
    job = Job(folder, fault_tree(tree, STEPS)).inject("barrier", 30)

    def harm(job: Job) -> float:
        job.wait((job.folder / "inject.json.taken").exists, "barrier")
        return _poisoned(job)

    _all_stand_still(job, outcome, harm, "like all workers (rank 0 in barrier (torch/distributed/")


@scenario("data tasks SIGSTOP everywhere (hang)")
def data_blocked(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """All data tasks are stopped, also those that start meanwhile; the workers train on what they have, then wait."""
    tree = fault_tree(tree, STEPS)
    tree["data"] = {**tree["data"], "run_samples": 32}
    job = Job(folder, tree).paced()

    def harm(job: Job) -> float:
        def stop() -> float | None:
            for task in job.data_tasks():
                with contextlib.suppress(psutil.NoSuchProcess):
                    task.suspend()
            return job.said(": killing it")

        job.poll_s = 0.2
        job.wait(stop, "hang")
        job.poll_s = 0.02
        return max(when for when, _ in job.recorded) + 1e-3

    _all_stand_still(job, outcome, harm, ": killing it")


@scenario("worker out of memory (rlimit)")
def worker_out_of_memory(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """A worker cannot allocate memory: it raises an exception, or is terminated."""

    def harm(job: Job) -> float:
        process = job.worker(1)
        used = process.memory_info().vms
        process.rlimit(psutil.RLIMIT_AS, (used, used))
        return time.time()

    _start_again(Job(folder, fault_tree(tree, STEPS)), outcome, harm, "worker 1 failed")


@scenario("exception in a worker")
def worker_raises(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """An exception in step 30 of one worker, while the other waits for it."""
    job = Job(folder, fault_tree(tree, STEPS)).inject("raise", 30, rank=1)

    def harm(job: Job) -> float:
        job.wait((job.folder / "inject.json.taken").exists, "exception")
        return _poisoned(job)

    _start_again(job, outcome, harm, "worker 1 failed (RuntimeError: an exception planted by the fault tests)")
    outcome.expect((outcome.detected_s or 0) <= KILLED_WITHIN_S, "detected within 15 s")


@scenario("data task killed")
def data_task_killed(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """Ray runs the task again; training does not notice."""
    tree = fault_tree(tree, STEPS)
    tree["data"] = {**tree["data"], "run_samples": 32}
    job = Job(folder, tree).start()
    try:
        job.wait_checkpoint()
        fault = send(job.wait(job.data_tasks, "data task")[0], signal.SIGKILL)
        expect_finished(job, outcome)
        job.judge(outcome, fault, None, STEPS)
        outcome.expect(not job.said("restarting the workers"), f"no worker was restarted\n{job.output}")
    finally:
        job.kill()


@scenario("loss NaN: stop")
def bad_loss_stops(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The run ends and reports the step; the sample ids are saved; `--resume` continues without the fault."""
    job = Job(folder, fault_tree(tree, STEPS)).inject("nan", 30).start()
    try:
        outcome.expect(job.end() == 2, f"exit code 2\n{job.output}")
        fault, detected = _poisoned(job), job.said("the loss is nan at step 30")
        outcome.expect(detected, f"the step is named\n{job.output}")
        outcome.expect(len(_kept(job, 30)) == 16, "the ids of the step's 16 samples are kept")
        outcome.expect(job.start("--resume").end() == 0, f"exit code 0\n{job.output}")
        job.judge(outcome, fault, detected, STEPS)
        outcome.first_step_s = None  # the user decides when
    finally:
        job.kill()


@scenario("loss NaN: skip")
def bad_loss_is_skipped(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The step does not change the weights, and the run continues."""
    job = Job(folder, fault_tree(tree, STEPS, on_bad_loss="skip")).inject("nan", 30).start()
    try:
        expect_finished(job, outcome)
        job.judge(outcome, _poisoned(job), None, STEPS)
        outcome.expect([row["step"] for row in job.history() if "train/bad_loss" in row] == [30], "recorded once")
        outcome.expect(len(_kept(job, 30)) == 16, "the ids of the step's 16 samples are kept")
    finally:
        job.kill()


@scenario("loss spike: skip")
def spike_is_skipped(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The step does not change the weights, and the run continues. Later losses are 0, which no factor raises."""
    spikes = {"on_spike": "skip", "spike_window": 20, "spike_factor": 1000}
    job = Job(folder, fault_tree(tree, STEPS, replay_every=7, **spikes)).inject("spike", 8).start()
    try:
        expect_finished(job, outcome)
        job.judge(outcome, _poisoned(job), None, STEPS)
        found = [row["step"] for row in job.history() if "train/loss_spike" in row]
        outcome.expect(found == [8], f"recorded once: {found}")
        outcome.expect(max(job.losses()[step] for step in range(9, STEPS + 1)) < 1, "the weights are as before")
        outcome.expect(len(_kept(job, 8)) == 16, "the ids of the step's 16 samples are kept")
    finally:
        job.kill()


@scenario("loss NaN: roll back")
def bad_loss_is_rolled_back(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The last checkpoint is restored; the samples since then are skipped and their ids saved."""
    job = Job(folder, fault_tree(tree, STEPS, on_bad_loss="rollback")).inject("nan", 31).start()
    try:
        expect_finished(job, outcome)
        found = job.said("the loss of step 31 was NaN or infinite: rolled back")
        outcome.expect(found, f"the roll-back is reported\n{job.output}")
        job.judge(outcome, fault := _poisoned(job), found, STEPS, unrecorded={31})
        (void,) = [json.loads(path.read_text()) for path in (job.run / "ledger").glob("void-*.json")]
        outcome.steps_lost = passed = void["last"] - void["first"] + 1
        rows = {int(row["step"]): row["time"] for row in job.history() if "train/loss" in row}
        outcome.first_step_s = max(0.0, rows[32] - (found or fault))  # the line is printed a moment later
        outcome.expect(len(_kept(job, void["first"], 31)) == 16 * passed, "the ids of its samples are kept")
    finally:
        job.kill()


def _poisoned(job: Job) -> float:
    """Return when the fault was injected."""
    return (job.folder / "inject.json.taken").stat().st_ctime


def _kept(job: Job, first: int, last: int | None = None) -> list[int]:
    """Return the sample ids that all ranks saved for the steps from the first to the last."""
    import pyarrow.parquet as pq

    folder = job.run / "bad-loss" / f"steps-{first:08d}-{last or first:08d}"
    return [sample for path in folder.glob("rank-*.parquet") for sample in pq.read_table(path)["sample_id"].to_pylist()]
