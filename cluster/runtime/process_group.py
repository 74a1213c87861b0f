"""How the workers of a run find each other: at the addresses under which Ray knows their nodes."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig

from cluster.recipe.resources import ClusterConfig


def use_node_interface() -> None:
    """Have Gloo connect to the other workers at this node's address in Ray, unless `GLOO_SOCKET_IFNAME` is set.

    By itself Gloo takes the address that the host's name resolves to, which on many machines (Debian's /etc/hosts) is
    127.0.1.1: then workers of two machines do not find each other. If no interface has the node's address nothing is
    set.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    here = ray.util.get_node_ip_address()
    families = (socket.AF_INET, socket.AF_INET6)
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family in families and each.address == here for each in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


class NodeAddressBackend(TorchConfig().backend_cls):
    """Ray Train's backend for torch, with Gloo at the nodes' addresses; called in the controller."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Choose the interface on each worker, then let Ray Train join them."""
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class NodeAddressTorchConfig(TorchConfig):
    """`ray.train.torch.TorchConfig` with `NodeAddressBackend`."""

    @property
    def backend_cls(self) -> type:
        """Return the backend's class."""
        return NodeAddressBackend


def torch_config(cluster: ClusterConfig) -> TorchConfig:
    """Return how the workers of a run are joined: by NCCL on GPUs, otherwise by Gloo."""
    return NodeAddressTorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo")
