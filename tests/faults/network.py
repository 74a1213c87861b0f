"""A real network cut: one node runs in a separate network namespace, whose link is taken down. Requires root."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.runtime import local_cluster as local
from cluster.runtime.local import make_token
from tests.faults.job import PACE, RUN, Job, Outcome, fault_tree, home
from tests.faults.nodes import STEPS, Nodes, place_of
from tests.faults.table import scenario
from tests.faults.workers import HUNG_WITHIN_S
from tests.perceiver.tracking.mlflow_server import free_port

NET = "10.77.0"
HERE, AWAY, SPARE = f"{NET}.3", f"{NET}.2", f"{NET}.4"


@contextmanager
def namespace() -> Iterator[str]:
    """Yield the name of a network namespace connected to this one, and of its interface."""
    name = f"cut{secrets.token_hex(3)}"
    near = f"{name}n"
    inside = ["ip", "netns", "exec", name, "ip"]
    commands = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", near, "type", "veth", "peer", "name", name],
        ["ip", "link", "set", name, "netns", name],
        *[["ip", "addr", "add", f"{ip}/24", "dev", near] for ip in (f"{NET}.1", HERE, SPARE)],
        ["ip", "link", "set", near, "up"],
        [*inside, "addr", "add", f"{AWAY}/24", "dev", name],
        [*inside, "link", "set", name, "up"],
        [*inside, "link", "set", "lo", "up"],
    ]
    try:
        for command in commands:
            subprocess.run(command, check=True, timeout=30)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", near], check=False, timeout=30)
        subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)


def cut(name: str) -> float:
    """Take the link down; return the time."""
    subprocess.run(["ip", "netns", "exec", name, "ip", "link", "set", name, "down"], check=True, timeout=30)
    return time.time()


def start(folder: Path, name: str) -> None:
    """Start a cluster of a head, a node here, one in the namespace and a spare one (in a process with its own home)."""
    make_token()
    group = local.NodeGroup(count=3, cpus=1, resources={"slot": 1})
    ports = {"port": free_port(), "dashboard_port": free_port()}
    plan = local.plan_cluster(local.NodesConfig(nodes=(local.NodeGroup(cpus=1), group), object_store_mb=100, **ports))
    ips = [f"{NET}.1", HERE, AWAY, SPARE]
    planned: list[local.StartedNode] = [{**node, "ip": ip} for node, ip in zip(plan.nodes, ips, strict=True)]
    cluster = replace(plan, nodes=planned, address=f"{NET}.1:{plan.address.rpartition(':')[2]}")
    local.state_file().parent.mkdir(parents=True, exist_ok=True)
    local.state_file().write_text(json.dumps(asdict(cluster)))
    head, here, away, _ = planned
    for node in (head, here):
        assert not (reason := local.start_node(cluster, node, print)), reason
    within = ["ip", "netns", "exec", name, *_away_command(cluster, away)]
    subprocess.run(within, env=local.node_environment(cluster), check=True, timeout=local.START_TIMEOUT_S)


def _away_command(cluster: local.LocalCluster, node: local.StartedNode) -> list[str]:
    """Return the command of a node in the other namespace; free ports for it cannot be found from this one."""
    words = local.start_command(cluster, {**node, "ip": HERE})
    return [word.replace(f"--node-ip-address={HERE}", f"--node-ip-address={node['ip']}") for word in words]


@scenario("network of a node cut")
def network_cut(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """Packets to the node of one worker are dropped without an error; a spare node takes over.

    The watchdog is disabled: here it could kill the worker, which is a process of the same machine.
    """
    if os.geteuid() != 0:
        outcome.expect(False, "network namespaces, which require root")
        return
    nodes, job = Nodes(folder, 3), Job(folder, fault_tree(tree, STEPS))
    job.tree["cluster"] |= {"worker_resources": {"slot": 1}, "placement": "spread", "hang_s": 600}
    job.words = ["submit", "--run", RUN]
    with namespace() as name:
        command = [sys.executable, "-m", "tests.faults.network", str(folder), name]
        subprocess.run(command, check=True, env=home(folder) | PACE, timeout=400, stdout=subprocess.DEVNULL)
        try:
            job.start().wait_checkpoint()
            places = {place_of(job.worker(rank)) for rank in (0, 1)}
            outcome.expect(places == {HERE, AWAY}, f"one worker on each node: {places}")
            nodes.command("cluster", "up")  # the spare one
            fault = cut(name)
            detected = job.wait_line("; restarting the workers")
            outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
            job.judge(outcome, fault, detected, STEPS)
            outcome.expect((outcome.detected_s or 0) <= HUNG_WITHIN_S, "detected within 120 s")
        finally:
            job.kill()
            nodes.command("cluster", "down")


if __name__ == "__main__":
    start(Path(sys.argv[1]), sys.argv[2])
