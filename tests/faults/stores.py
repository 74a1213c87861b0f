"""Faults of the store: a full disk, an object store that fails, stalls or refuses."""

import resource
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from tests.faults.faulty_s3 import BUCKET, IDENTITY, FaultyS3, S3Job
from tests.faults.job import Job, Outcome, fault_tree, send
from tests.faults.table import STEPS, expect_finished, scenario

MEMORY_EVERY = 5
"""Steps between two checkpoints in memory, in the row of a slow store."""
DELAY_S = 0.5
"""Seconds that each request of that row takes."""
PLANTED = "planted-7c1f9ab2e04d"
"""A secret without a known form: only its key shows that it is one."""
REFUSED_WITHIN_S = 30
STALL_S = 20.0
SAVE_S = 20.0
"""Limit of a save in the row of a store that never answers, in seconds."""


def limit_files(job: Job, most: int) -> None:
    """Limit the size of the files that the workers write, as if the disk were full."""
    for rank in (0, 1):
        job.worker(rank).rlimit(psutil.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


@scenario("disk full for a while (file size limit)")
def disk_full(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """For a while no checkpoint can be written: training continues, and later checkpoints are saved."""
    job = planted_job(folder, fault_tree(tree, STEPS, checkpoint_misses=1000)).start()
    try:
        before = job.wait_checkpoint()
        limit_files(job, 1024)
        fault = time.time()
        detected = job.wait_line("was not saved")
        limit_files(job, resource.RLIM_INFINITY)
        expect_finished(job, outcome)
        outcome.expect(job.steps()[-1] == STEPS > before, "the last checkpoint is there")
        outcome.expect(not job.said("restarting the workers"), "training continued")
        outcome.expect(not (found := places_of_the_secret(job)), f"the secret is in {found[:5]}")
        job.judge(outcome, fault, detected, STEPS)
    finally:
        job.kill()


def planted_job(folder: Path, tree: dict[str, Any]) -> Job:
    """Return a run with a secret where a user might put one: by reference, in tags, in the environment."""
    tree["data"] = {**tree["data"], "storage_options": {"token": "$PLANTED_TOKEN"}}
    tree["tracking"] = {"tags": {"api_key": PLANTED, "note": f"https://user:{PLANTED}@example.org/"}}
    return Job(folder, tree, {"PLANTED_TOKEN": PLANTED, "AWS_SECRET_ACCESS_KEY": PLANTED})


def places_of_the_secret(job: Job) -> list[str]:
    """Return the files of the run that contain the secret, and "the output" if that does."""
    left = (path for path in (job.folder / "runs").rglob("*") if path.is_file())
    files = [str(path.relative_to(job.folder)) for path in left if PLANTED.encode() in path.read_bytes()]
    return files + (["the output"] if PLANTED in job.output else [])


def _failing(folder: Path, tree: dict[str, Any], outcome: Outcome, share: float) -> None:
    """A share of all requests fails from the first checkpoint on; the run finishes and its records are complete."""
    with FaultyS3() as server:
        job = S3Job(folder, fault_tree(tree, STEPS), server).start()
        try:
            job.wait_checkpoint()
            server.failing, fault = share, time.time()
            outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
            server.failing = 0.0
            outcome.expect(server.harmed > 0, "requests failed")
            outcome.fault += f" ({server.harmed} requests)"
            outcome.expect(job.steps()[-1] == STEPS, "the last checkpoint is there")
            job.judge(outcome, fault, None, STEPS)
        finally:
            job.kill()


@scenario("object store fails at 1 %")
def store_fails_rarely(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """See `_failing`."""
    _failing(folder, tree, outcome, 0.01)


@scenario("object store fails at 5 %")
def store_fails(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """See `_failing`."""
    _failing(folder, tree, outcome, 0.05)


@scenario("object store fails at 20 %")
def store_fails_often(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """See `_failing`."""
    _failing(folder, tree, outcome, 0.2)


@scenario("object store stalls for 20 s")
def store_stalls(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """No request is answered for 20 s: training continues, and no worker is restarted."""
    steps = 300
    with FaultyS3() as server:
        job = S3Job(folder, fault_tree(tree, steps), server).paced().start()
        try:
            job.wait_checkpoint()
            server.answering.clear()
            fault = time.time()
            job.wait(lambda: time.time() - fault > STALL_S, "end of the stall")
            server.answering.set()
            outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
            outcome.expect(server.harmed > 0, "requests were delayed")
            times = [row["time"] - fault for row in job.history() if "train/loss" in row]
            outcome.expect(done := sum(STALL_S / 2 < t < STALL_S for t in times), "training continued while it stalled")
            outcome.fault += f" ({done} steps in its second half)"
            outcome.expect(not job.said("restarting the workers"), "no worker was restarted")
            job.judge(outcome, fault, None, steps)
        finally:
            job.kill()


@scenario("worker SIGKILL between checkpoints, slow store")
def killed_between_checkpoints(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The newest checkpoint in storage is many steps old: the workers start from the one in memory."""
    steps = 100
    with FaultyS3() as server:
        tree = fault_tree(tree, steps, checkpoint_memory_every=MEMORY_EVERY)
        job = S3Job(folder, tree, server).paced().start()
        try:
            before = job.wait_checkpoint()
            server.delay_s = DELAY_S

            def late() -> bool:
                last = job.recorded[-1][1] if job.recorded else 0
                return last > before + 6 * MEMORY_EVERY and last % MEMORY_EVERY == MEMORY_EVERY - 2

            job.poll_s = 0.05
            job.wait(late, "step")
            stored = job.steps()[-1]
            fault = send(job.worker(1), signal.SIGKILL)
            detected = job.wait_line("worker 1 failed")
            resumed = job.wait(
                lambda: next((line for _, line in job.lines if "resumed at step" in line), ""), "restart"
            )
            server.delay_s = 0.0
            expect_finished(job, outcome)
            outcome.expect(resumed.endswith("from memory"), f"started from memory: {resumed}")
            job.judge(outcome, fault, detected, steps)
            lost = outcome.steps_lost
            outcome.expect(lost is not None and lost <= MEMORY_EVERY, f"at most {MEMORY_EVERY} steps lost: {lost}")
            outcome.expect(int(resumed.split()[3]) > stored, f"the checkpoint in storage, of step {stored}, was older")
            starts = [(start["step"], start["origin"]) for start in job.facts()["starts"]]
            outcome.expect(starts == [(0, "storage"), (int(resumed.split()[3]), "memory")], f"run.json: {starts}")
        finally:
            server.delay_s = 0.0
            job.kill()


@scenario("object store never answers (hang)")
def store_hangs(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """A save in the background does not end; the store answers again once that is found."""
    steps = 600
    tree = fault_tree(tree, steps)
    tree["cluster"]["hang_long_s"] = SAVE_S
    with FaultyS3() as server:
        job = S3Job(folder, tree, server).paced().start()
        try:
            job.wait_checkpoint()
            server.answering.clear()
            fault = time.time()
            detected = job.wait_line("has not ended a save for")
            server.answering.set()
            outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
            outcome.expect(job.said("resumed at step"), "the workers resumed from a checkpoint")
            outcome.expect(list(job.folder.rglob("logs/hang-*/rank-*.txt")), "the stacks are kept")
            job.judge(outcome, fault, detected, steps)
        finally:
            job.kill()


@scenario("store refuses credentials in mid-run")
def credentials_refused(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The run stops within 30 s, names URL and identity, and does not retry."""
    with FaultyS3() as server:
        job = S3Job(folder, fault_tree(tree, 1000, ledger=False), server).paced().start()
        try:
            job.wait_checkpoint()
            server.refusing.set()
            fault = time.time()
            outcome.expect(job.end() == 2, f"exit code 2\n{job.output}")
            found = job.said(f"refuses access key ...{IDENTITY[-4:]}")
            outcome.detected_s = found - fault if found else None
            outcome.expect(found and found - fault <= REFUSED_WITHIN_S, f"stopped within 30 s\n{job.output}")
            outcome.expect(f"s3://{BUCKET}/runs/small-001/checkpoints" in job.output, "URL named")
        finally:
            job.kill()
