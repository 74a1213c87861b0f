"""How the workers of a run find each other: by the address under which Ray knows their nodes."""

import os
import socket
from typing import Any

import psutil
import ray.util
from ray.train.torch.config import TorchConfig, _TorchBackend

from cluster.local import ClusterConfig


def use_node_interface() -> None:
    """Have Gloo meet the other workers at this node's address in Ray, unless `GLOO_SOCKET_IFNAME` says where.

    Gloo alone takes what the host's name resolves to, which on many machines (Debian's /etc/hosts) is 127.0.1.1: then
    workers of two machines do not find each other. Where no interface has the node's address nothing is set.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    here = ray.util.get_node_ip_address()
    families = (socket.AF_INET, socket.AF_INET6)
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family in families and each.address == here for each in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


class NodeTorchConfig(TorchConfig):
    """Ray Train's torch backend over the interfaces of the nodes' addresses."""

    @property
    def backend_cls(self) -> type[_NodeBackend]:
        """See Ray Train."""
        return _NodeBackend


def torch_config(cluster: ClusterConfig) -> NodeTorchConfig:
    """Return how the workers of a run are joined: by NCCL on GPUs, else by Gloo."""
    return NodeTorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo")
