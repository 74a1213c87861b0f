"""A local cluster: several real Ray nodes on this machine, to try out what a large cluster would do."""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

import psutil
from pydantic import Field, TypeAdapter, model_validator
from typing_extensions import TypedDict

from cluster.recipe.file import read_yaml_config
from cluster.recipe.resources import LEAST_STORE_MB, STORE_MB, machine_cpus
from cluster.runtime.local import QUIET_ENVIRONMENT, free_port, kill, make_token, token_file
from perceiver.config import Config, CountOrZero, Resource, UserError
from perceiver.storage import cache_folder, write_whole

MARK = "PERCEIVER_CLUSTER"
"""Environment variable that identifies all processes of a cluster."""

START_TIMEOUT_S = 180
TRIES = 3
MOST_NODES = 250
END_TIMEOUT_S = 15


class NodeGroup(Config):
    """Nodes of one kind. Their resources are what Ray's scheduler assumes, not what the machine has."""

    count: int = Field(default=1, ge=1, le=MOST_NODES, description="nodes of this kind")
    cpus: CountOrZero | None = Field(default=None, description="logical CPUs of each; default: the machine's")
    gpus: CountOrZero = Field(default=0, description="GPUs of each; they need not exist")
    resources: dict[str, Resource] = Field(default={}, description="custom resources of each")
    labels: dict[str, str] = Field(default={}, description="labels of each, such as role: train")


class NodesConfig(Config):
    """A local cluster (`perceiver cluster up FILE`). The first node of the first group is the head."""

    nodes: tuple[NodeGroup, ...] = Field(default=(NodeGroup(count=3),), min_length=1, description="groups of nodes")
    object_store_mb: int = Field(
        default=STORE_MB, ge=LEAST_STORE_MB, le=100_000_000, description="size of the object store of each node, in MB"
    )
    port: int = Field(default=6379, ge=1, le=65535, description="port of the head; another if it is in use")
    dashboard_port: int = Field(default=8265, ge=1, le=65535, description="port of dashboard and jobs; likewise")

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        if (count := sum(group.count for group in self.nodes)) > MOST_NODES:
            raise ValueError(f"nodes: {count} in all, wanted at most {MOST_NODES}")
        return self


class StartedNode(TypedDict):
    """A node as recorded in the state file: its address and `ray start` options."""

    ip: str
    options: list[str]


@dataclass(frozen=True)
class LocalCluster:
    """A cluster that `up` started, as recorded in the state file.

    Attributes:
        name: value of the variable `MARK` of its processes.
        address: of the head, for RAY_ADDRESS.
        dashboard: URL of dashboard and jobs.
        folder: Ray's session folder.
        nodes: address and `ray start` options of each node, head first.
    """

    name: str
    address: str
    dashboard: str
    folder: str
    nodes: Annotated[list[StartedNode], Field(min_length=1)]

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the cluster, including those of its jobs."""
        return marked_processes(MARK, self.name)

    def raylets(self) -> dict[str, int]:
        """Return the process id of each live node's raylet, by the node's address."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    option = next(a for a in process.cmdline() if a.startswith("--node_ip_address="))
                    found[option.partition("=")[2]] = process.pid
        return found


def marked_processes(name: str, value: str) -> list[psutil.Process]:
    """Return the processes that were started with a value of an environment variable, and all their descendants."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == value:
                found |= {child.pid: child for child in [process, *process.children(recursive=True)]}
    return list(found.values())


def state_file() -> Path:
    """Return the path of the file that records the local cluster."""
    return cache_folder("cluster.json")


def running_cluster() -> LocalCluster | None:
    """Return the local cluster if its head is alive, otherwise None."""
    cluster = _recorded()
    return cluster if cluster and cluster.nodes[0]["ip"] in cluster.raylets() else None


def _recorded() -> LocalCluster | None:
    """Return the cluster of the state file, alive or not; None without one."""
    try:
        cluster = TypeAdapter(LocalCluster).validate_json(state_file().read_bytes())
    except (OSError, ValueError):
        return None
    return cluster if Path(cluster.folder).name == _folder_name(cluster.name) else None  # `down` deletes it


def read_nodes(path: str | Path) -> NodesConfig:
    """Read a file of node groups.

    Raises:
        UserError: no such file, or a key or value that does not fit.
    """
    return read_yaml_config(path, NodesConfig, "see recipes/cluster/")


def up(config: NodesConfig | None = None, say: Callable[[str], None] = print) -> LocalCluster:
    """Start a cluster, or restart its dead nodes; return when all nodes have joined.

    Every node requires the token. The dashboard and each node's address are on the loopback interface; Ray binds some
    of its worker ports on all interfaces, and has no option to change that.

    Args:
        config: the nodes; default: those of the running cluster, otherwise three.
        say: prints a line for each node that has joined.

    Raises:
        UserError: this is not Linux, a cluster of other nodes runs, or a node does not start. A new cluster is then
            stopped; one that ran before keeps running.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(f"several nodes on one machine need Linux's 127.0.0.0/8, this is {sys.platform}: use one node")
    running = running_cluster()
    if running is None:
        down()
        _check_writable()
        try:
            return _start_all(config or NodesConfig(), say)
        except KeyboardInterrupt:
            say("stopping the nodes that have started")
            down()
            raise
    if config is not None and (wanted := _nodes(config)) != running.nodes:
        raise UserError(
            f"the local cluster {running.name} at {running.dashboard} has {_described(running.nodes)}, wanted "
            f"{_described(wanted)}: stop it first with perceiver cluster down, or restart its dead nodes with "
            "perceiver cluster up without a file"
        )
    _revive(running, say)
    return running


def down() -> int:
    """Stop the local cluster and everything that runs on it; return the number of stopped processes, 0 without one."""
    cluster = _recorded()
    if cluster is None:
        return 0
    ended = 0
    while processes := cluster.processes():
        ended += len(processes)
        # The nodes first: they stop their workers and remove their shared memory themselves. Ray's autoscaler, too: it
        # ignores signals once the head's store is gone.
        _end([process for process in processes if _ends_first(process)])
        _end(processes)
    shutil.rmtree(cluster.folder, ignore_errors=True)
    state_file().unlink(missing_ok=True)
    return ended


def _check_writable() -> None:
    """Create the token and the folder of the state file, which later commands read, before a node is started."""
    try:
        make_token()
        state_file().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}: set RAY_AUTH_TOKEN_PATH={token_file()} and "
            f"PERCEIVER_CACHE={state_file().parent} to places that can be written"
        ) from None


def _ends_first(process: psutil.Process) -> bool:
    """Return whether a process is a node or the autoscaler."""
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()[:3]
        return process.name() == "raylet" or any(part.endswith("autoscaler/_private/monitor.py") for part in command)
    return False


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, END_TIMEOUT_S)
    kill(alive)
    psutil.wait_procs(alive, END_TIMEOUT_S)


def plan_cluster(config: NodesConfig) -> LocalCluster:
    """Choose the addresses, ports and options of the nodes."""
    name = secrets.token_hex(4)
    nodes = _nodes(config)
    head = nodes[0]["ip"]
    port = free_port(head, config.port)
    dashboard = free_port("127.0.0.1", config.dashboard_port)
    return LocalCluster(
        name=name,
        address=f"{head}:{port}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        # Short, because the paths of Unix sockets below it have at most 107 characters.
        folder=str(Path(tempfile.gettempdir()) / _folder_name(name)),
        nodes=nodes,
    )


def _folder_name(name: str) -> str:
    return f"perceiver-{name}"


def _nodes(config: NodesConfig) -> list[StartedNode]:
    """Return address and `ray start` options of each node."""
    groups = [group for group in config.nodes for _ in range(group.count)]
    return [{"ip": f"127.0.0.{2 + number}", "options": _options(group, config)} for number, group in enumerate(groups)]


def _described(nodes: list[StartedNode]) -> str:
    """Return the number of nodes of each kind, as text."""
    kinds = Counter(" ".join(node["options"]) for node in nodes)
    return f"{len(nodes)} nodes ({'; '.join(f'{count} with {options}' for options, count in kinds.items())})"


def _options(group: NodeGroup, config: NodesConfig) -> list[str]:
    cpus = machine_cpus() if group.cpus is None else group.cpus
    options = [f"--num-cpus={cpus:g}", f"--object-store-memory={config.object_store_mb * 1_000_000}"]
    if group.gpus:
        options.append(f"--num-gpus={group.gpus}")
    if group.resources:
        options.append(f"--resources={json.dumps(group.resources)}")
    if group.labels:
        options.append("--labels=" + ",".join(f"{key}={value}" for key, value in group.labels.items()))
    return options


def start_command(cluster: LocalCluster, node: StartedNode) -> list[str]:
    """Return the `ray start` command of a node."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={node['ip']}"]
    ports = [f"--dashboard-agent-listen-port={free_port(node['ip'])}", "--disable-usage-stats"]
    if node is not cluster.nodes[0]:
        # One log monitor per machine: a second one would repeat every line.
        return [*ray, f"--address={cluster.address}", "--include-log-monitor=false", *ports, *node["options"]]
    host, _, port = cluster.address.partition(":")
    # If asked for explicitly, a dashboard that does not start is an error: jobs need it.
    head = ["--head", f"--port={port}", f"--temp-dir={cluster.folder}", "--include-dashboard=true"]
    head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={cluster.dashboard.rsplit(':', 1)[1]}"]
    head += [f"--ray-client-server-port={free_port(host)}"]
    return [*ray, *head, *ports, *node["options"]]


def node_environment(cluster: LocalCluster) -> dict[str, str]:
    """Return the environment of the nodes and their jobs: this Python first on PATH, the token required."""
    environment = {**QUIET_ENVIRONMENT, **os.environ, MARK: cluster.name, "RAY_AUTH_MODE": "token"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return environment


def _start_all(config: NodesConfig, say: Callable[[str], None]) -> LocalCluster:
    """Start the nodes of a new cluster one after the other, the head first.

    Raises:
        UserError: one does not start; then nothing is left running.
    """
    line, reason = "node {} did not start ({}); nothing is left running: try fewer nodes", ""
    for _ in range(TRIES):  # the head; each attempt chooses its ports again, since others may take them first
        cluster = plan_cluster(config)
        write_whole(state_file(), json.dumps(asdict(cluster), indent=1))
        if not (reason := _try(cluster, cluster.nodes[0], say)):
            break
        down()  # otherwise the next attempt would find the old object store
    else:
        raise UserError(line.format(cluster.nodes[0]["ip"], reason))
    for node in cluster.nodes[1:]:
        if reason := start_node(cluster, node, say):
            down()
            raise UserError(line.format(node["ip"], reason))
    return cluster


def _revive(cluster: LocalCluster, say: Callable[[str], None]) -> None:
    """Restart the dead nodes; live nodes and their jobs are not touched.

    Raises:
        UserError: some do not start.
    """
    alive = cluster.raylets()
    dead = [node for node in cluster.nodes if node["ip"] not in alive]
    failed = {node["ip"]: reason for node in dead if (reason := start_node(cluster, node, say))}
    if failed:
        reasons = ", ".join(f"{ip} ({reason})" for ip, reason in failed.items())
        raise UserError(
            f"node {reasons} did not start; the other {len(cluster.nodes) - len(failed)} keep running: see "
            f"{cluster.folder}/start-{next(iter(failed))}.log, then repeat perceiver cluster up"
        )


def start_node(cluster: LocalCluster, node: StartedNode, say: Callable[[str], None]) -> str:
    """Start a node; return the reason if it did not start, empty if it did.

    It gets several attempts, because Ray waits at most 30 s for a slow machine.
    """
    reason = ""
    for _ in range(TRIES):
        reason = _try(cluster, node, say)
        if not reason:
            break
        raylet = cluster.raylets().get(node["ip"])
        _end([psutil.Process(raylet)] if raylet else [])
    return reason


def _try(cluster: LocalCluster, node: StartedNode, say: Callable[[str], None]) -> str:
    """Make one attempt to start a node; return the reason if it did not start, empty if it did."""
    Path(cluster.folder).mkdir(mode=0o700, exist_ok=True)
    log = Path(cluster.folder) / f"start-{node['ip']}.log"
    if not run_start(cluster, node, log):
        return _reason(log)
    say(f"node {node['ip']} is up ({' '.join(node['options'])})")
    return ""


def run_start(cluster: LocalCluster, node: StartedNode, log: Path) -> bool:
    """Run `ray start` for a node; return whether it succeeded."""
    with log.open("w") as sink:
        process = subprocess.Popen(
            start_command(cluster, node),
            env=node_environment(cluster),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(timeout=START_TIMEOUT_S) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        return False


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no message")[:200]


def equivalent(cluster: LocalCluster) -> Iterator[str]:
    """Yield the commands that start the same cluster on real machines."""
    plain = [
        [option for option in node["options"] if not option.startswith("--object-store-memory")]
        for node in cluster.nodes
    ]
    port = cluster.address.rpartition(":")[2]
    head = f"ray start --head --port={port} --dashboard-host=127.0.0.1"
    yield f"HEAD    RAY_AUTH_MODE=token {head} {' '.join(map(shlex.quote, plain[0]))}"
    for options in sorted({tuple(options) for options in plain[1:]}):
        quoted = " ".join(map(shlex.quote, options))
        yield f"others  RAY_AUTH_MODE=token ray start --address=HEAD:{port} {quoted}"
    yield "here    ssh -N -L 8265:127.0.0.1:8265 HEAD & perceiver submit RECIPE --address http://127.0.0.1:8265"
