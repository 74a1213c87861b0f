"""The faults: each starts a real run, harms it, and says what became of it."""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.faults.job import Job, Outcome, fault_tree, send

STEPS = 60
PLANTED = "planted-7c1f9ab2e04d"
"""A secret without a known form: it must be kept out by its place."""
Scenario = Callable[[Path, dict[str, Any]], Outcome]
SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str) -> Callable[[Scenario], Scenario]:
    """Enter a function into the table."""

    def enter(function: Scenario) -> Scenario:
        SCENARIOS[name] = function
        return function

    return enter


def _worker_fault(name: str, folder: Path, tree: dict[str, Any], harm: Callable[[Job], float], said: str) -> Outcome:
    """Harm worker 1 once there is a checkpoint; the group must start again and finish."""
    job, outcome = Job(folder, tree).start(), Outcome(name)
    try:
        job.wait_checkpoint()
        fault = harm(job)
        detected = job.wait_line(said)
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        outcome.expect(job.said("resumed at step"), "the workers went on from a checkpoint")
        job.judge(outcome, fault, detected, STEPS)
        outcome.expect(not job.leftovers(), "no process left behind")
        return outcome
    finally:
        job.kill()


@scenario("worker SIGKILL")
def worker_killed(folder: Path, tree: dict[str, Any]) -> Outcome:
    """A worker is gone without a word."""
    harm = lambda job: send(job.worker(1), signal.SIGKILL)
    outcome = _worker_fault("worker SIGKILL", folder, fault_tree(tree, STEPS), harm, "worker 1 failed")
    outcome.expect((outcome.detected_s or 0) <= 15, "detected within 15 s")
    return outcome


@scenario("worker SIGSTOP (hang)")
def worker_stopped(folder: Path, tree: dict[str, Any]) -> Outcome:
    """A worker stands still, so that the others wait for it in a collective operation."""
    tree = fault_tree(tree, STEPS)
    tree["cluster"]["hang_s"] = float(os.environ.get("FAULT_HANG_S", "60"))
    harm = lambda job: send(job.worker(1), signal.SIGSTOP)
    outcome = _worker_fault("worker SIGSTOP (hang)", folder, tree, harm, "worker 1 (process")
    outcome.expect((outcome.detected_s or 0) <= 120, "detected within 120 s")
    return outcome


@scenario("worker out of memory (rlimit)")
def worker_out_of_memory(folder: Path, tree: dict[str, Any]) -> Outcome:
    """A worker gets no more memory: an ordinary exception, or its end."""

    def harm(job: Job) -> float:
        process = job.worker(1)
        used = process.memory_info().vms
        process.rlimit(psutil.RLIMIT_AS, (used, used))
        return time.time()

    return _worker_fault("worker out of memory (rlimit)", folder, fault_tree(tree, STEPS), harm, "worker 1 failed")


@scenario("data task killed")
def data_task_killed(folder: Path, tree: dict[str, Any]) -> Outcome:
    """Ray runs the task again; training does not notice."""
    tree = fault_tree(tree, STEPS)
    tree["data"] |= {"run_samples": 32}
    job, outcome = Job(folder, tree).start(), Outcome("data task killed")
    try:
        job.wait_checkpoint()
        fault = send(job.wait(job.data_tasks, "data task")[0], signal.SIGKILL)
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        job.judge(outcome, fault, None, STEPS)
        outcome.expect(not job.said("failed"), "no worker failed")
        return outcome
    finally:
        job.kill()


@scenario("driver SIGKILL, then --resume")
def driver_killed(folder: Path, tree: dict[str, Any]) -> Outcome:
    """The lease of the dead driver must not stand in the way; what it left behind must end by itself."""
    job, outcome = Job(folder, fault_tree(tree, STEPS)).start(), Outcome("driver SIGKILL, then --resume")
    try:
        job.wait_checkpoint()
        assert job.process is not None
        job.process.kill()
        fault = time.time()
        job.end()
        until = time.monotonic() + 60
        while (left := job.leftovers()) and time.monotonic() < until:
            time.sleep(0.2)
        outcome.expect(not left, f"processes left behind: {[p.name() for p in left]}")
        code = job.start("--resume").end()
        outcome.expect(code == 0, f"exit code 0\n{job.output}")
        return job.judge(outcome, fault, fault, STEPS)
    finally:
        job.kill()


@scenario("SIGTERM with grace, then --resume")
def terminated(folder: Path, tree: dict[str, Any]) -> Outcome:
    """A checkpoint is committed before the end, so that no step is lost."""
    job, outcome = Job(folder, fault_tree(tree, STEPS)).start(), Outcome("SIGTERM with grace, then --resume")
    try:
        job.wait_checkpoint()
        assert job.process is not None
        job.process.send_signal(signal.SIGTERM)
        fault = time.time()
        detected = job.wait_line("stopping: the workers save")
        outcome.expect(job.end() == 130, f"exit code 130\n{job.output}")
        stopped = job.steps()[-1]
        outcome.expect(job.facts().get("step") == stopped, "the last step is saved")
        code = job.start("--resume").end()
        outcome.expect(code == 0, f"exit code 0\n{job.output}")
        outcome.expect(job.said(f"resumed at step {stopped} "), "went on from there")
        job.judge(outcome, fault, detected, STEPS)
        outcome.steps_lost = 0 if job.said(f"resumed at step {stopped} ") else None
        return outcome
    finally:
        job.kill()


@scenario("checkpoint truncated and flipped")
def checkpoint_damaged(folder: Path, tree: dict[str, Any]) -> Outcome:
    """The newest two checkpoints are harmed while the run stands; the one before them is used."""
    name = "checkpoint truncated and flipped"
    job, outcome = Job(folder, fault_tree(tree, STEPS, keep_checkpoints=4)).start(), Outcome(name)
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
        code = job.start("--resume").end()
        outcome.expect(code == 0, f"exit code 0\n{job.output}")
        outcome.expect(job.said(f"resumed at step {steps[-3]} "), f"went on from step {steps[-3]}\n{job.output}")
        log = (job.run / "logs" / "driver.log").read_text()
        for step in steps[-2:]:
            outcome.expect(f"step-{step:08d} is not used" in log, f"step {step} named in the log")
        return job.judge(outcome, fault, fault, STEPS)
    finally:
        job.kill()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


@scenario("disk full for a while (file size limit)")
def disk_full(folder: Path, tree: dict[str, Any]) -> Outcome:
    """No checkpoint can be written, then again: training goes on, the next ones count."""
    name = "disk full for a while (file size limit)"
    tree = fault_tree(tree, STEPS, checkpoint_misses=1000)
    job, outcome = planted_job(folder, tree).start(), Outcome(name)
    try:
        before = job.wait_checkpoint()
        workers = [job.worker(rank) for rank in (0, 1)]
        fault = time.time()
        for worker in workers:
            worker.rlimit(psutil.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        detected = job.wait_line("was not saved")
        for worker in workers:
            worker.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        outcome.expect(job.steps()[-1] == STEPS > before, "the last checkpoint is there")
        outcome.expect(not job.said("the workers start again"), "training went on")
        outcome.expect(not (found := places_of_the_secret(job)), f"the secret stands in {found[:5]}")
        return job.judge(outcome, fault, detected, STEPS)
    finally:
        job.kill()


def planted_job(folder: Path, tree: dict[str, Any]) -> Job:
    """A run that is given a secret in each way that a user might: by reference, in a tag, in the environment."""
    tree["data"] = {**tree["data"], "storage_options": {"token": "$PLANTED_TOKEN"}}
    tree["tracking"] = {"tags": {"api_key": PLANTED, "note": f"https://user:{PLANTED}@example.org/"}}
    return Job(folder, tree, {"PLANTED_TOKEN": PLANTED, "AWS_SECRET_ACCESS_KEY": PLANTED})


def places_of_the_secret(job: Job) -> list[str]:
    """The files that the run left behind with the secret in them, and the screen if it was there."""
    left = (path for path in (job.folder / "runs").rglob("*") if path.is_file())
    files = [str(path.relative_to(job.folder)) for path in left if PLANTED.encode() in path.read_bytes()]
    return files + (["the screen"] if PLANTED in job.output else [])


@scenario("MLflow down for the whole run")
def tracker_down(folder: Path, tree: dict[str, Any]) -> Outcome:
    """Nothing listens: the run finishes, and all figures wait in the spool."""
    tree = {**fault_tree(tree, STEPS), "tracking": {"uri": "http://127.0.0.1:9"}}
    job, outcome = Job(folder, tree).start(), Outcome("MLflow down for the whole run")
    try:
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        outcome.expect(job.said("mlflow does not answer"), "said so")
        spooled = "".join(path.read_text() for path in (job.run / "tracking").glob("*.jsonl"))
        held = sum('"train/loss"' in line for line in spooled.splitlines())
        outcome.expect(held == STEPS, f"{held} of {STEPS} steps are in the spool")
        outcome.samples_wrong = len(job.audit(STEPS).lost)
        return outcome
    finally:
        job.kill()


@scenario("two drivers, one name")
def two_drivers(folder: Path, tree: dict[str, Any]) -> Outcome:
    """The second is refused at once and told who holds the run; the first does not notice."""
    tree, outcome = fault_tree(tree, STEPS), Outcome("two drivers, one name")
    job, second = Job(folder, tree).start(), Job(folder, tree)
    try:
        job.wait_checkpoint()
        assert job.process is not None
        fault = time.time()
        code = second.start("--resume").end()
        outcome.expect(code == 2, f"exit code 2\n{second.output}")
        found = second.said(f"is in use by process {job.process.pid} ")
        outcome.expect(found, f"the owner is named\n{second.output}")
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        return job.judge(outcome, fault, found, STEPS)
    finally:
        job.kill()
        second.kill()


@scenario("store refuses credentials in mid-run")
def credentials_refused(folder: Path, tree: dict[str, Any]) -> Outcome:
    """The run stops within 30 s, names URL and identity, and does not try again."""
    import fsspec

    from tests.faults.refusing_s3 import RefusingS3

    server, outcome = RefusingS3(), Outcome("store refuses credentials in mid-run")
    keys = {"AWS_ACCESS_KEY_ID": "testing-1234", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": server.url}
    tree = {**fault_tree(tree, 4000, ledger=False), "output": "s3://bucket/runs"}
    job = Job(folder, tree, keys)
    options = {"key": keys["AWS_ACCESS_KEY_ID"], "secret": "testing", "endpoint_url": server.url}
    fs = fsspec.filesystem("s3", **options, skip_instance_cache=True, use_listings_cache=False)
    try:
        fs.mkdir("bucket")
        job.start()
        job.wait(lambda: fs.glob("bucket/runs/small-001/checkpoints/step-*/manifest.json"), "checkpoint")
        server.refusing.set()
        fault = time.time()
        code = job.end()
        found = job.said("refuses access key ...1234")
        outcome.detected_s = found - fault if found else None
        outcome.expect(code == 2, f"exit code 2\n{job.output}")
        outcome.expect(found and found - fault <= 30, f"stopped within 30 s\n{job.output}")
        outcome.expect("s3://bucket/runs/small-001/checkpoints" in job.output, "URL named")
        return outcome
    finally:
        job.kill()
        server.close()


@scenario("kill at each stage of a checkpoint write")
def killed_while_saving(folder: Path, tree: dict[str, Any]) -> Outcome:
    """A process of its own saves and is killed before its n-th touch of the disk, for every n; nothing is ever half."""
    from tests.faults.stages import killed_at_each_stage

    outcome = Outcome("kill at each stage of a checkpoint write")
    stages, wrong = killed_at_each_stage(folder)
    outcome.fault += f" ({stages})"
    outcome.expect(stages > 5 and not wrong, f"after a kill at stage {wrong}: not whole")
    return outcome
