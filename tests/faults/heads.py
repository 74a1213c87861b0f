"""The head of a Ray cluster lost while its state is in a real Redis: a new head continues it, and so does the run."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.faults.job import Outcome
from tests.faults.nodes import Nodes, job_on_nodes
from tests.faults.table import scenario
from tests.perceiver.tracking.mlflow_server import free_port

STEPS = 150
JOIN_S = 120
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
START = """
import pydantic, subprocess, sys
from cluster.runtime import local_cluster as local
cluster = pydantic.TypeAdapter(local.LocalCluster).validate_json(local.state_file().read_bytes())
if sys.argv[1] == "head":
    sys.exit(local.start_node(cluster, cluster.nodes[0], print) or 0)
words = local.start_command(cluster, {"ip": "127.0.0.3", "options": sys.argv[4:]})
own = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', sys.argv[3], cluster.folder]
with open(cluster.folder + "/start-127.0.0.3.log", "w") as log:
    subprocess.Popen([*sys.argv[2].split(), *own, *words, "--block"], env=local.node_environment(cluster),
                     stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
"""
NODE = ["--num-cpus=2", "--object-store-memory=100000000", '--resources={"slot": 2, "driver": 1}']


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """Start a Redis that writes no file; yield its port."""
    port = free_port()
    words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as server:
        try:
            yield port
        finally:
            server.terminate()


class Pods(Nodes):
    """A head, and one node for the driver and two workers that sees only its own processes and files, as a pod does.

    Ray connects a driver to a head that runs on the same host, which it finds in the list of processes, and nodes with
    one session folder delete each other's runtime environments there.
    """

    def __init__(self, folder: Path, redis: int) -> None:
        super().__init__(folder, 0, environment={"RAY_REDIS_ADDRESS": f"127.0.0.1:{redis}"})
        self.files = folder / "node"
        self.files.mkdir()

    def up(self) -> None:
        """Start the head, then the other node; wait until it has joined."""
        super().up()
        self.start("node", " ".join(NAMESPACE), str(self.files), *NODE)
        until = time.monotonic() + JOIN_S
        while len(self.cluster.raylets()) < 2 and time.monotonic() < until:
            time.sleep(0.2)

    def start(self, *words: str) -> None:
        """Start the head again, or a node."""
        command = [sys.executable, "-c", START, *words]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def kill_head(self) -> None:
        """Kill all processes of the head, which are those that the other node does not see.

        A head in a pod of its own does not see the other node's processes either, by whose addresses `ray start --head`
        decides that the cluster of this file is running.
        """
        (other,) = (pid for ip, pid in self.cluster.raylets().items() if ip != self.cluster.nodes[0]["ip"])
        kept = Path(f"/proc/{other}/ns/pid").readlink()
        lost = []
        for process in self.cluster.processes():
            with contextlib.suppress(psutil.Error, OSError):
                if Path(f"/proc/{process.pid}/ns/pid").readlink() != kept and process.name() != "unshare":
                    lost.append(process)
        for process in lost:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(lost, 30)
        Path(self.cluster.folder, "ray_current_cluster").unlink()


@scenario("head lost, its state in Redis")
def head_restarted(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """All processes of the head are killed, and `ray start --head` runs again, as when Kubernetes restarts its pod.

    The driver is on another node, as in what `perceiver cluster render kuberay` writes with `gcs_fault_tolerance`. The
    workers save a checkpoint without a head, and are not restarted: they wait for data, whose tasks need new processes,
    for less than the default of `hang_s`.
    """
    if shutil.which("redis-server") is None or os.geteuid() != 0:
        outcome.expect(False, "redis-server (apt-get install redis-server), and root for a PID namespace")
        return
    with redis_server(folder) as port:
        options = ("--entrypoint-resources", '{"driver": 1}')
        with job_on_nodes(folder, tree, Pods(folder, port), outcome, STEPS, options, hang_s=60) as (nodes, job):
            assert isinstance(nodes, Pods)
            fault, before = time.time(), job.steps()[-1]
            nodes.kill_head()
            job.wait_checkpoint(before)
            nodes.start("head")
            outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
            outcome.expect("SUCCEEDED" in nodes.command("jobs"), "the job has succeeded")
            outcome.expect(not job.said("restarting the workers"), "the workers were not restarted")
            job.judge(outcome, fault, None, STEPS)
