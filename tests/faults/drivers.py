"""Faults of the driver and its run: killed, terminated, damaged checkpoints, two drivers, a wrong clock."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.faults.job import PATIENCE_S, RUN, Job, Outcome, fault_tree, send
from tests.faults.stages import killed_at_each_stage
from tests.faults.table import STEPS, expect_finished, scenario

GRACE_S = 30
LOST_WITHIN_S = 60
"""The driver looks for its processes of Ray several times per second; a loaded machine takes its time to end."""
LONG = 200
STOPPED = 1000
"""Steps of a run whose workers still train when its driver's lease has expired."""
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <sys/time.h>
#define OFF 3600
int clock_gettime(clockid_t id, struct timespec *t) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, t);
  if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) t->tv_sec += OFF;
  return code;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
  int code = real(t, zone);
  t->tv_sec += OFF;
  return code;
}
time_t time(time_t *t) {
  time_t (*real)(time_t *) = dlsym(RTLD_NEXT, "time");
  time_t now = real(0) + OFF;
  if (t) *t = now;
  return now;
}
"""
"""Return a library that, if preloaded, sets the clock of a process an hour ahead."""


def _kill_driver(job: Job, outcome: Outcome) -> float:
    """Kill the driver; the processes that it leaves behind must exit by themselves."""
    assert job.process is not None
    job.process.kill()
    fault = time.time()
    job.end()
    until = time.monotonic() + 60
    while (left := job.leftovers()) and time.monotonic() < until:
        time.sleep(0.2)
    outcome.expect(not left, f"processes left behind: {[p.name() for p in left]}")
    return fault


@scenario("driver SIGKILL, then --resume")
def driver_killed(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The lease of the killed driver must not block the resume; its remaining processes must exit by themselves."""
    job = Job(folder, fault_tree(tree, STEPS)).start()
    try:
        job.wait_checkpoint()
        fault = _kill_driver(job, outcome)
        again = time.time()
        job.start("--resume")
        expect_finished(job, outcome)
        job.judge(outcome, fault, again, STEPS)
        outcome.detected_s = None  # by the user
    finally:
        job.kill()


@scenario("gcs_server SIGKILL, then --resume")
def instance_lost(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The driver ends with one line: the process of its Ray instance that is lost, and the command that resumes."""
    job = Job(folder, fault_tree(tree, STEPS)).start()
    try:
        job.wait_checkpoint()
        (lost,) = [process for process in job.leftovers() if process.name() == "gcs_server"]
        fault = send(lost, signal.SIGKILL)
        outcome.expect(job.end() == 1, f"exit code 1\n{job.output}")
        ended = time.time()
        errors = [line for _, line in job.lines if line.startswith("error:")]
        wanted = ("gcs_server", "; continue with: perceiver train", f"--resume --run {RUN}")
        named = all(part in " ".join(errors) for part in wanted)
        outcome.expect(len(errors) == 1 and named, f"one error names it and the command\n{job.output}")
        outcome.expect("Traceback" not in job.output, "no traceback in the output")
        outcome.expect(ended - fault <= LOST_WITHIN_S, f"ended within {LOST_WITHIN_S} s")
        outcome.expect(job.facts().get("status") == "failed", "the run failed")
        job.start("--resume")
        expect_finished(job, outcome)
        job.judge(outcome, fault, ended, STEPS)
    finally:
        job.kill()


@scenario("SIGTERM with 30 s grace, then --resume")
def terminated(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """A checkpoint is committed before the deadline, so that no step is lost."""
    job = Job(folder, fault_tree(tree, STEPS)).start()
    try:
        job.wait_checkpoint()
        assert job.process is not None
        job.process.send_signal(signal.SIGTERM)
        fault = time.time()
        detected = job.wait_line("stopping: the workers save")
        outcome.expect(job.end() == 130, f"exit code 130\n{job.output}")
        stopped = job.steps()[-1]
        manifest = job.run / "checkpoints" / f"step-{stopped:08d}" / "manifest.json"
        outcome.expect(manifest.stat().st_mtime - fault <= GRACE_S, "a checkpoint is committed within 30 s")
        outcome.expect(time.time() - fault <= GRACE_S, "the command has ended within 30 s")
        outcome.expect(job.facts().get("step") == stopped, "the last step is saved")
        job.start("--resume")
        expect_finished(job, outcome)
        outcome.expect(job.said(f"resumed at step {stopped} "), "resumed from there")
        job.judge(outcome, fault, detected, STEPS, graceful=True)
        outcome.first_step_s = None  # the user decides when
    finally:
        job.kill()


@scenario("checkpoint truncated and flipped")
def checkpoint_damaged(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The newest two checkpoints are damaged while the run is stopped; the one before them is used."""
    job = Job(folder, fault_tree(tree, STEPS, keep_checkpoints=4)).start()
    try:
        job.wait(lambda: len(job.steps()) >= 3, "three checkpoints")
        assert job.process is not None
        job.process.send_signal(signal.SIGINT)
        job.end()
        steps = job.steps()
        fault = time.time()
        for step, harm in ((steps[-1], _truncate), (steps[-2], _flip)):
            shards = (job.run / "checkpoints" / f"step-{step:08d}").glob("shard-*.safetensors")
            harm(max(shards, key=lambda path: path.stat().st_size))
        job.start("--resume")
        expect_finished(job, outcome)
        outcome.expect(job.said(f"resumed at step {steps[-3]} "), f"resumed from step {steps[-3]}\n{job.output}")
        logs = "".join(path.read_text(errors="replace") for path in (job.run / "logs").rglob("*") if path.is_file())
        for step in steps[-2:]:
            outcome.expect(f"step-{step:08d} is not used" in logs, f"step {step} named in the log")
        job.judge(outcome, fault, None, STEPS)
    finally:
        job.kill()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


@scenario("two drivers, one name")
def two_drivers(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The second driver is refused at once with the name of the owner; the first one is not affected."""
    tree = fault_tree(tree, LONG)
    job, second = Job(folder, tree).paced().start(), Job(folder, tree)
    try:
        job.wait_checkpoint()
        assert job.process is not None
        fault = time.time()
        outcome.expect(second.start("--resume").end() == 2, f"exit code 2\n{second.output}")
        found = second.said(f"is in use by process {job.process.pid} ")
        outcome.expect(found, f"the owner is named\n{second.output}")
        expect_finished(job, outcome)
        job.judge(outcome, fault, found, LONG)
    finally:
        job.kill()
        second.kill()


@scenario("driver SIGSTOP, another takes over, then SIGCONT")
def driver_stopped(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The workers of the stopped driver go on meanwhile; neither they nor the driver change the second one's run."""
    tree = fault_tree(tree, STOPPED, checkpoint_every=4)
    job, second = Job(folder, tree).paced().start(), Job(folder, tree)
    try:
        job.wait_checkpoint()
        assert job.process is not None
        job.process.send_signal(signal.SIGSTOP)
        fault = time.time()
        until = time.monotonic() + PATIENCE_S
        while second.start("--resume").end() == 2 and second.said("is in use by") and time.monotonic() < until:
            time.sleep(5)
        outcome.expect(second.process and second.process.returncode == 0, f"exit code 0\n{second.output}")
        job.process.send_signal(signal.SIGCONT)
        continued = time.time()
        outcome.expect(job.end() == 2, f"exit code 2\n{job.output}")
        errors = [line for when, line in job.lines if when > continued and line.startswith("error:")]
        owner = f"taken over this run (process {second.process and second.process.pid} "
        outcome.expect(len(errors) == 1 and owner in errors[0], f"one error names the second driver\n{job.output}")
        outcome.expect(second.facts().get("status") == "finished", "the run is finished")
        second.judge(outcome, fault, None, STOPPED)
    finally:
        job.kill()
        second.kill()


@scenario("clock an hour ahead")
def clock_off(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """A driver with such a clock is refused while the run is active, and resumes it once its driver was killed."""
    tree, library = fault_tree(tree, LONG), folder / "clock.so"
    source = library.with_suffix(".c")
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    job, ahead = Job(folder, tree).paced().start(), Job(folder, tree, {"LD_PRELOAD": str(library)})
    try:
        job.wait_checkpoint()
        outcome.expect(ahead.start("--resume").end() == 2, f"exit code 2\n{ahead.output}")
        assert job.process is not None
        outcome.expect(ahead.said(f"is in use by process {job.process.pid} "), f"the owner is named\n{ahead.output}")
        fault = _kill_driver(job, outcome)
        ahead.start("--resume")
        expect_finished(ahead, outcome)
        ahead.judge(outcome, fault, None, LONG)
        outcome.first_step_s = None  # its times are from another clock
    finally:
        job.kill()
        ahead.kill()


@scenario("kill at each stage of a checkpoint write")
def killed_while_saving(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """A separate process saves and is killed before its n-th file operation, for every n; no checkpoint is partial."""
    stages, wrong = killed_at_each_stage(folder)
    outcome.fault += f" ({stages})"
    outcome.expect(stages > 5 and not wrong, f"after a kill at stage {wrong}: no complete checkpoint")
