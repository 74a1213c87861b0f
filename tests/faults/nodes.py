"""Faults of nodes: several real Ray nodes on this machine, of which one is killed, drained, or the head is lost."""

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.runtime.local_cluster import LocalCluster
from tests.faults.job import PACE, PERCEIVER, RUN, Job, Outcome, fault_tree, home, title
from tests.faults.table import scenario
from tests.perceiver.tracking.mlflow_server import free_port

STEPS = 150
ELASTIC_STEPS = 900
SLOW_STEPS = 300
GRACE_S = 30
LOST_WITHIN_S = 15


class Nodes:
    """A local cluster below a folder: a head that no worker fits on, and nodes that take one worker each.

    Args:
        folder: also the home of its commands.
        count: number of those nodes.
        environment: variables of all nodes.
    """

    def __init__(self, folder: Path, count: int, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.file = folder, folder / "nodes.yaml"
        self.environment = {**home(folder), **PACE, **(environment or {})}
        nodes = [{"cpus": 1}, *[{"count": count, "cpus": 1, "resources": {"slot": 1}}][:count]]
        # Separate ports: another cluster that starts at the same time may use the default ones.
        ports = {"port": free_port(), "dashboard_port": free_port()}
        self.file.write_text(yaml.safe_dump({"nodes": nodes, "object_store_mb": 100, **ports}))

    def command(self, *words: str) -> str:
        """Run a `perceiver` command with this folder as home."""
        done = subprocess.run(
            [PERCEIVER, *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def up(self) -> None:
        """Start the cluster, or its nodes that have died."""
        self.command("cluster", "up", str(self.file))

    @property
    def cluster(self) -> LocalCluster:
        """The record of the cluster."""
        return LocalCluster(**json.loads((self.folder / ".cache" / "perceiver" / "cluster.json").read_text()))

    def raylet(self, ip: str) -> psutil.Process:
        """Return the raylet process of a node."""
        return psutil.Process(self.cluster.raylets()[ip])

    def placement_groups(self) -> list[str]:
        """Return the states of the placement groups that are not removed."""
        code = (
            "import ray; from ray.util import placement_group_table\n"
            f"ray.init(address={self.cluster.address!r}, log_to_driver=False)\n"
            "print(*{group['state'] for group in placement_group_table().values()} - {'REMOVED'})"
        )
        environment = home(self.folder) | {"RAY_AUTH_MODE": "token"}
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=environment, check=True, timeout=120, capture_output=True, text=True)
        return done.stdout.split()

    def drain(self, ip: str) -> None:
        """Announce to Ray that a node will be removed in 30 s."""
        option = next(part for part in self.raylet(ip).cmdline() if part.startswith("--node_id="))
        words = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.cluster.address]
        words += ["--node-id", option.partition("=")[2], "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        words += ["--reason-message", "fault test", "--deadline-remaining-seconds", str(GRACE_S)]
        environment = home(self.folder) | {"RAY_AUTH_MODE": "token"}
        subprocess.run(words, env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)


@contextmanager
def job_on_nodes(
    folder: Path,
    tree: dict[str, Any],
    nodes: int | Nodes,
    outcome: Outcome,
    steps: int = STEPS,
    options: Sequence[str] = (),
    **cluster: Any,
) -> Iterator[tuple[Nodes, Job]]:
    """Start a cluster, submit the run to it and wait for a checkpoint; check that nothing of it is left at the end."""
    nodes = Nodes(folder, nodes) if isinstance(nodes, int) else nodes
    job = Job(folder, fault_tree(tree, steps, keep_checkpoints=steps))
    job.tree["cluster"] |= {"worker_resources": {"slot": 1}, "max_failures": 3, **cluster}
    job.words = ["submit", "--run", RUN, *options]
    nodes.up()
    try:
        job.start().wait_checkpoint()
        yield nodes, job
        outcome.expect(not (groups := nodes.placement_groups()), f"placement groups left behind: {groups}")
    finally:
        job.kill()
        processes = nodes.cluster.processes()
        nodes.command("cluster", "down")
        left = [process for process in processes if process.is_running() and process.status() != "zombie"]
        outcome.expect(not left, f"processes left behind: {[(process.pid, title(process)[:80]) for process in left]}")
        outcome.expect(not (files := job.shared_left()), f"left in /dev/shm: {sorted(files)[:5]}")


def place_of(worker: psutil.Process) -> str:
    """Return the address of the node of a worker."""
    option = next(part for part in worker.parent().cmdline() if part.startswith("--node_ip_address="))  # type: ignore[union-attr]
    return option.partition("=")[2]


@scenario("node lost, another takes over")
def node_lost(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The node of worker 1 is killed; a spare one takes its place."""
    with job_on_nodes(folder, tree, 3, outcome) as (nodes, job):
        raylet = nodes.raylet(place_of(job.worker(1)))
        fault = time.time()
        raylet.kill()
        detected = job.wait_line("; restarting the workers")
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        job.judge(outcome, fault, detected, STEPS)
        outcome.expect((outcome.detected_s or 0) <= LOST_WITHIN_S, "detected within 15 s")


@scenario("node lost, none to spare; a node joins")
def node_joins(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The run waits until a node joins, then resumes. The time to the first step includes the node's start."""
    with job_on_nodes(folder, tree, 2, outcome) as (nodes, job):
        raylet = nodes.raylet(place_of(job.worker(1)))
        fault = time.time()
        raylet.kill()
        detected = job.wait_line("; restarting the workers")
        nodes.up()
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        job.judge(outcome, fault, detected, STEPS)


@scenario("node lost, none to spare: one worker continues; a node joins")
def elastic(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """With `cluster.min_workers` the run continues on the other node, and on both again when one joins.

    Ray Train stops the workers to use a node that joins: the steps since the last checkpoint run twice.
    """
    with job_on_nodes(folder, tree, 2, outcome, ELASTIC_STEPS, min_workers=1) as (nodes, job):
        raylet = nodes.raylet(place_of(job.worker(1)))
        fault = time.time()
        raylet.kill()
        detected = job.wait_line("; restarting the workers")
        job.wait_line("training continues with 1 worker instead of 2")
        nodes.up()
        job.wait_line("training continues with 2 workers instead of 1")
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        job.judge(outcome, fault, detected, ELASTIC_STEPS, resume=0)


@scenario("node drained with 30 s grace")
def node_drained(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The workers save and exit before the deadline, at which the node is killed; no step is lost."""
    with job_on_nodes(folder, tree, 3, outcome) as (nodes, job):
        worker = job.worker(1)
        ip = place_of(worker)
        fault = time.time()
        nodes.drain(ip)
        detected = job.wait_line("is about to be preempted, step")
        resumed = job.wait_line("resumed at step")
        outcome.expect(place_of(job.worker(1)) != ip, "the worker is on another node")
        manifest = job.run / "checkpoints" / f"step-{_step_of(job, resumed):08d}" / "manifest.json"
        outcome.expect(manifest.stat().st_mtime - fault <= GRACE_S, "a checkpoint is committed before the deadline")
        if raylet := nodes.cluster.raylets().get(ip):  # an idle node may have exited by itself
            psutil.Process(raylet).kill()
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        job.judge(outcome, fault, detected, STEPS, graceful=True)
        outcome.expect(outcome.steps_lost == 0, "no step lost")


def _step_of(job: Job, resumed: float) -> int:
    """Return the step in the line of a resume."""
    return next(int(line.split()[3]) for when, line in job.lines if when == resumed)


@scenario("worker slowed down, restart without its node")
def node_slow(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """Worker 1 is stopped for most of the time; the workers save, and start again on the other nodes."""
    with job_on_nodes(folder, tree, 3, outcome, SLOW_STEPS, on_straggler="restart", straggler_s=5) as (nodes, job):
        worker = job.worker(1)
        ip, fault = place_of(worker), time.time()

        def slow() -> float | None:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.suspend()
                time.sleep(0.05)
                worker.resume()
            return job.said("restarting the workers without its node")

        detected = job.wait(slow, "slow worker")
        outcome.expect(job.said(f"worker 1 on {platform.node()} ({ip}) is slow"), f"it is named\n{job.output}")
        job.wait_line("resumed at step")
        job.wait(lambda: job.worker(1).pid != worker.pid, "new worker")
        outcome.expect(ip not in {place_of(job.worker(rank)) for rank in (0, 1)}, "no worker is on that node")
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        job.judge(outcome, fault, detected, SLOW_STEPS, graceful=True)
        outcome.expect(outcome.steps_lost == 0, "no step lost")


@scenario("head lost, cluster started again, job submitted again")
def head_lost(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The job ends with the head; the same command on the new cluster resumes the run."""
    with job_on_nodes(folder, tree, 2, outcome) as (nodes, job):
        fault = time.time()
        for process in nodes.cluster.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it exited with its parent
                process.kill()
        job.kill()  # the follower of the job, which would wait for the head
        nodes.command("cluster", "down")
        nodes.up()
        again = time.time()
        job.start()
        outcome.expect(
            job.end() == 0, f"exit code 0\n{job.output}"
        )  # the cluster's processes keep running, as they should
        job.judge(outcome, fault, again, STEPS)
        outcome.detected_s = None  # by the user
