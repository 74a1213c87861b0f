"""Placement of workers and data tasks on the nodes of a cluster, and what is missing if they do not fit."""

import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.recipe.resources import SMALLEST_SHARE, ClusterConfig
from perceiver.config import UserError

RESERVED = "PERCEIVER_RESERVED"
"""Environment variable of a job's driver: a JSON object of the resources that its entrypoint reserves."""

PROBES, PROBE_S = 32, 1.0
"""Nodes that are probed at a time, and the timeout of a probe in seconds."""
LARGEST_DEFAULT_SHARE = 1.0
"""CPUs that a worker reserves on a cluster by default. Its number of threads does not depend on it."""


@dataclass(frozen=True)
class Node:
    """A node as Ray's scheduler sees it.

    Attributes:
        name: its address.
        resources: total logical resources, such as ``{"CPU": 8.0, "GPU": 1.0}``.
        labels: Ray's own (``ray.io/...``) and those that it was started with.
        head: whether the cluster's control plane runs there.
        node_id: its id in Ray.
        host: its host name.
    """

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    head: bool = False
    node_id: str = ""
    host: str = ""

    def has(self, labels: Mapping[str, str]) -> bool:
        """Return whether the node has all of these labels."""
        return all(self.labels.get(key) == value for key, value in labels.items())

    def room(self, need: Mapping[str, float]) -> int:
        """Return how many times a need fits on the empty node."""
        return min((math.floor(self.resources.get(k, 0) / v + 1e-9) for k, v in need.items() if v), default=0)

    def less(self, taken: Mapping[str, float]) -> "Node":
        """Return the node without the resources that are taken."""
        left = {name: max(amount - taken.get(name, 0.0), 0.0) for name, amount in self.resources.items()}
        return replace(self, resources=left)


@dataclass(frozen=True)
class DataNeed:
    """Resources of the concurrent data tasks of a run.

    Attributes:
        cpus: CPUs of all tasks.
        cpus_per_task: CPUs of one task.
        labels: labels of the nodes that they run on.
        memory_per_task: bytes that one task reserves; 0 for none.
    """

    cpus: float
    cpus_per_task: float
    labels: Mapping[str, str] = field(default_factory=dict)
    memory_per_task: int = 0

    @property
    def tasks(self) -> int:
        """Number of concurrent tasks."""
        return round(self.cpus / self.cpus_per_task)


def reserved() -> dict[str, float]:
    """Return the resources that this process reserves as a job's entrypoint; empty if it is not one."""
    return json.loads(os.environ.get(RESERVED) or "{}")


def this_node_cpus() -> float:
    """Return the CPUs of the Ray node of this process; 0 without Ray."""
    import ray

    if not ray.is_initialized():
        return 0.0
    own = ray.get_runtime_context().get_node_id()
    return next((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == own), 0.0)


def connected_nodes(*, answering: bool = False) -> list[Node]:
    """Return the live nodes of the connected cluster, without the resources that this process reserves as a job.

    Args:
        answering: only the nodes that accept a connection now. Ray needs about ten seconds to mark a node as dead.
    """
    import ray

    own = ray.get_runtime_context().get_node_id() if reserved() else None
    alive = [node for node in ray.nodes() if node["Alive"]]
    if answering:
        with ThreadPoolExecutor(PROBES) as pool:
            alive = [node for node, there in zip(alive, pool.map(_answers, alive), strict=True) if there]
    nodes = [(node, reserved() if node["NodeID"] == own else {}) for node in alive]
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"],
            node.get("Labels") or {},
            "node:__internal_head__" in node["Resources"],
            node["NodeID"],
            node.get("NodeManagerHostname") or "",
        ).less(taken)
        for node, taken in nodes
    ]


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), PROBE_S).close()
    except OSError:
        return False
    return True


def worker_need(config: ClusterConfig, cpus: float) -> dict[str, float]:
    """Return the resources of one worker."""
    return {"CPU": cpus, "GPU": config.gpus_per_worker, **config.worker_resources}


def avoided(config: ClusterConfig, nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes that `cluster.avoid` names.

    Raises:
        UserError: an entry matches no node, or no node is left.
    """
    names = {name: [node for node in nodes if name in (node.node_id, node.host, node.name)] for name in config.avoid}
    there = ", ".join(f"{node.name} ({node.host})" for node in nodes[:8])
    for name, found in names.items():
        if not found:
            raise UserError(
                f"cluster.avoid = {name!r} matches no node; wanted the id, the host name or the IP address of one of "
                f"{len(nodes)}: {there}"
            )
    named = [node for node in nodes if any(node in found for found in names.values())]
    if named and len(named) == len(nodes):
        raise UserError(f"cluster.avoid names every node ({there}): no node is left for the workers, remove an entry")
    return named


def worker_labels(config: ClusterConfig, nodes: Sequence[Node]) -> dict[str, str]:
    """Return Ray's label selector of the workers: `cluster.worker_labels`, without the nodes of `cluster.avoid`.

    Raises:
        UserError: see `avoided`.
    """
    ids = ", ".join(node.node_id for node in avoided(config, nodes))
    return {**config.worker_labels, **({"ray.io/node-id": f"!in({ids})"} if ids else {})}


def check_task_memory(nodes: Sequence[Node], data: DataNeed) -> None:
    """Refuse data tasks that reserve more memory than their nodes have, and would wait for ever.

    Raises:
        UserError: the tasks do not fit.
    """
    if not data.memory_per_task:
        return
    feeding = _labelled(nodes, data.labels, "data.task_labels")
    room = sum(node.room({"memory": data.memory_per_task}) for node in feeding)
    if room < data.tasks:
        total = sum(node.resources.get("memory", 0) for node in feeding) / 1e9
        raise UserError(
            f"{data.tasks} data tasks of data.task_memory = {data.memory_per_task} bytes each do not fit into the "
            f"{total:.1f} GB of their {len(feeding)} node{'s' * (len(feeding) > 1)} (room for {room}): lower "
            "data.task_memory or data.tasks"
        )


def check_evaluation(config: ClusterConfig, nodes: Sequence[Node]) -> None:
    """Refuse asynchronous evaluation (`train.eval_async`) if the workers leave no GPU for it.

    Raises:
        UserError: no GPU is left.
    """
    each = config.gpus_per_worker
    if not each:
        return
    training = _labelled(nodes, config.worker_labels, "cluster.worker_labels")
    if sum(node.room({"GPU": each}) for node in training) <= config.workers:
        total = sum(node.resources.get("GPU", 0) for node in training)
        raise UserError(
            f"train.eval_async needs {each:g} GPU in addition to cluster.workers = {config.workers}; the nodes have "
            f"{total:g}: lower cluster.workers, or set train.eval_async=false"
        )


def place(config: ClusterConfig, nodes: Sequence[Node], data: DataNeed) -> float:
    """Return the logical CPUs of one worker so that all workers and the data tasks fit on the nodes.

    With ``cluster.autoscaling`` missing nodes may still join, so only `cluster.cpus_per_worker` counts.

    Raises:
        UserError: they do not fit; the message names the missing resource and its key.
    """
    if config.autoscaling:
        return config.cpus_per_worker or LARGEST_DEFAULT_SHARE
    without = avoided(config, nodes)
    training = _labelled([n for n in nodes if n not in without], config.worker_labels, "cluster.worker_labels")
    feeding = _labelled(nodes, data.labels, "data.task_labels")
    _check_data(feeding, data)
    if config.cpus_per_worker is not None:
        _check_workers(config, training, config.cpus_per_worker)
        if not _feeds(config, training, feeding, data, config.cpus_per_worker):
            raise UserError(_starved(config, feeding, data))
        return config.cpus_per_worker
    _check_workers(config, training, SMALLEST_SHARE)
    for twentieths in range(round(LARGEST_DEFAULT_SHARE / SMALLEST_SHARE), 0, -1):
        share = twentieths * SMALLEST_SHARE
        if _room(config, training, share) >= config.workers and _feeds(config, training, feeding, data, share):
            return share
    raise UserError(_starved(config, feeding, data))


def _labelled(nodes: Sequence[Node], labels: Mapping[str, str], key: str) -> list[Node]:
    found = [node for node in nodes if node.has(labels)]
    if not found:
        wanted = _pairs(labels)
        there = "; ".join(f"{n.name} {_pairs(n.labels) or 'none'}" for n in nodes[:5]) or "no node at all"
        raise UserError(f"{key} asks for nodes labelled {wanted or 'anyhow'}, no node is; labels there: {there}")
    return found


def _pairs(labels: Mapping[str, str]) -> str:
    """Return labels as text, without Ray's own."""
    return ",".join(f"{key}={value}" for key, value in labels.items() if not key.startswith("ray.io/"))


def _room(config: ClusterConfig, nodes: Sequence[Node], cpus: float) -> int:
    return sum(node.room(worker_need(config, cpus)) for node in nodes)


def _check_workers(config: ClusterConfig, nodes: Sequence[Node], cpus: float) -> None:
    """Refuse workers that do not fit on the nodes, naming the scarcest resource."""
    room = _room(config, nodes, cpus)
    if room >= config.workers:
        return
    need = {name: amount for name, amount in worker_need(config, cpus).items() if amount}
    short = min(need, key=lambda name: sum(node.room({name: need[name]}) for node in nodes))
    total = sum(node.resources.get(short, 0) for node in nodes)
    most = max((node.resources.get(short, 0) for node in nodes), default=0)
    there = f"{len(nodes)} node{'s' * (len(nodes) > 1)} with {total:g} {short} in all, {most:g} at most on one"
    labels = f" labelled {_pairs(config.worker_labels)}" if config.worker_labels else ""
    key = {"CPU": "cluster.cpus_per_worker", "GPU": "cluster.gpus_per_worker"}.get(
        short, f"cluster.worker_resources.{short}"
    )
    fix = f"set cluster.workers to at most {room}" if room else f"lower {key} or add such nodes"
    raise UserError(
        f"cluster.workers = {config.workers} with {need[short]:g} {short} each need {config.workers * need[short]:g} "
        f"{short}; there {'is' if len(nodes) == 1 else 'are'} {there}{labels}: {fix} "
        "(or cluster.autoscaling=true if nodes are added on demand)"
    )


def _check_data(nodes: Sequence[Node], data: DataNeed) -> None:
    """Refuse data tasks that are larger than any node."""
    largest = max(node.resources.get("CPU", 0) for node in nodes)
    if data.cpus and data.cpus_per_task > largest:
        raise UserError(
            f"data.cpus_per_task = {data.cpus_per_task:g}, but the largest node for data tasks has {largest:g} CPUs: "
            f"set it to at most {largest:g}"
        )


def _feeds(
    config: ClusterConfig, training: Sequence[Node], feeding: Sequence[Node], data: DataNeed, share: float
) -> bool:
    """Return whether CPUs are left for the data tasks wherever the workers are placed."""
    shared = [node for node in feeding if node in training]
    apart = sum(node.resources.get("CPU", 0) for node in feeding if node not in training)
    taken = sum(sorted((node.room(worker_need(config, share)) * share for node in shared), reverse=True))
    taken = min(taken, config.workers * share)
    return apart + sum(node.resources.get("CPU", 0) for node in shared) - taken >= data.cpus - 1e-9


def _starved(config: ClusterConfig, feeding: Sequence[Node], data: DataNeed) -> str:
    cpus = sum(node.resources.get("CPU", 0) for node in feeding)
    return (
        f"data tasks need {data.cpus:g} CPUs in addition to cluster.workers = {config.workers}; their "
        f"{len(feeding)} node{'s' * (len(feeding) > 1)} have {cpus:g}, and the workers leave less: lower "
        "cluster.cpus_per_worker, data.tasks or data.cpus_per_task, or use separate nodes for data tasks "
        "(data.task_labels)"
    )
