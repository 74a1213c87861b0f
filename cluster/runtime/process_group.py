"""The process group of a run's workers: NCCL or Gloo, at the nodes' addresses in Ray."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig

from cluster.recipe.resources import ClusterConfig


def use_node_interface() -> None:
    """Set `GLOO_SOCKET_IFNAME` to the interface of this node's address in Ray, unless it is set.

    By default Gloo uses the address that the host's name resolves to, which on many machines (Debian's /etc/hosts) is
    127.0.1.1: workers on different machines then do not find each other. If no interface has the node's address,
    nothing is set.
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
    """Ray Train's backend for torch with Gloo at the nodes' addresses."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Choose the interface on each worker, then start the process group. Ray calls this in the controller."""
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class NodeAddressTorchConfig(TorchConfig):
    """`ray.train.torch.TorchConfig` with `NodeAddressBackend`."""

    @property
    def backend_cls(self) -> type:
        """Return the class of the backend."""
        return NodeAddressBackend


def torch_config(cluster: ClusterConfig) -> TorchConfig:
    """Return the torch backend of a run's workers: NCCL on GPUs, otherwise Gloo."""
    return NodeAddressTorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo")
