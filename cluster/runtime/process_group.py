"""The process group of a run's workers: NCCL or Gloo, at the nodes' addresses in Ray, on one machine on loopback."""

import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import ray.util
from ray.train.torch import TorchConfig

from cluster.recipe.resources import ClusterConfig
from cluster.runtime.ray_internals import LOOPBACK


def use_node_interface() -> None:
    """Set `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME` to the interface of this node's address in Ray, unless set.

    By default Gloo uses the address that the host's name resolves to, which on many machines (Debian's /etc/hosts) is
    127.0.1.1: workers on different machines then do not find each other. If no interface has the node's address,
    nothing is set. NCCL chooses for itself, except on one machine, where it uses loopback too.
    """
    here = ray.util.get_node_ip_address()
    families = (socket.AF_INET, socket.AF_INET6)
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family in families and each.address == here for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if here == LOOPBACK:
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return


def join_by_file(path: str, backend: str, timeout_s: float) -> None:
    """Join the process group of workers on one machine, which meet at a file."""
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    ranks = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": context.get_local_rank()}
    ranks |= {"LOCAL_WORLD_SIZE": context.get_local_world_size(), "NODE_RANK": context.get_node_rank()}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=world, timeout=timeout)


class NodeAddressBackend(TorchConfig().backend_cls):
    """Ray Train's backend for torch with Gloo at the nodes' addresses."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Choose the interface on each worker, then start the process group. Ray calls this in the controller."""
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


class LoopbackBackend(NodeAddressBackend):
    """Ray Train's backend for torch on one machine, where the workers meet at a file.

    A TCPStore of torch would listen on all interfaces and ask for no password.
    """

    _folder = ""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Start the process group. Ray calls this in the controller, at each start of the workers with a new file."""
        worker_group.execute(use_node_interface)
        self._folder = tempfile.mkdtemp(prefix="perceiver-")
        path = str(Path(self._folder, "rendezvous"))
        worker_group.execute(join_by_file, path, str(backend_config.backend), backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """End the process group, and remove the folder of its file."""
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


@dataclass
class NodeAddressTorchConfig(TorchConfig):
    """`ray.train.torch.TorchConfig` with `NodeAddressBackend`, or `LoopbackBackend` on one machine.

    Attributes:
        one_machine: whether all workers run on the driver's machine.
    """

    one_machine: bool = False

    @property
    def backend_cls(self) -> type:
        """Return the class of the backend."""
        return LoopbackBackend if self.one_machine else NodeAddressBackend


def torch_config(cluster: ClusterConfig) -> TorchConfig:
    """Return the torch backend of a run's workers: NCCL on GPUs, otherwise Gloo."""
    backend = "nccl" if cluster.gpus_per_worker else "gloo"
    return NodeAddressTorchConfig(backend=backend, one_machine=cluster.resolved_address() is None)
