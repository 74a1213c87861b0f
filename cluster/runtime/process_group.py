"""How the workers of a run find each other: by the address under which Ray knows their nodes.

Ray Train has a backend for torch, too, which makes the controller import torch: two seconds before the workers start,
and 200 MB. This one imports it in the workers only.
"""

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray.util
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from cluster.runtime.local import ClusterConfig, free_port

log = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=30)
"""Of the process group's operations, as in Ray Train and torch."""
LEAVE_S = 30.0
"""Workers get so long to leave the process group before they are ended."""


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


def meeting_place() -> tuple[str, int]:
    """Return this node's address and a free port."""
    address = ray.util.get_node_ip_address()
    return address, free_port(address)


def join(backend: str, address: str, port: int) -> None:
    """Join the process group of the run's workers, with the variables of torch's elastic launcher set."""
    import ray.train
    import torch.distributed as dist

    use_node_interface()
    place = ray.train.get_context()
    rank, world = place.get_world_rank(), place.get_world_size()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(place.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(place.get_local_world_size()),
        "NODE_RANK": str(place.get_node_rank()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if backend == "nccl":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world, timeout=JOIN_TIMEOUT)


def leave() -> None:
    """Leave the process group and give back what the GPU's cache holds."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TorchBackend(Backend):
    """Joins the workers before they train, and parts them afterwards; called by Ray Train in the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: "TorchConfig") -> None:
        """Have all workers join, at the first one's address."""
        address, port = worker_group.execute_single(0, meeting_place)
        worker_group.execute(join, backend_config.backend, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: "TorchConfig") -> None:
        """Have all workers leave."""
        try:
            ray.get(worker_group.execute_async(leave), timeout=LEAVE_S)
        except GetTimeoutError:
            log.warning("the workers did not leave the process group within %s s", LEAVE_S)


@dataclass
class TorchConfig(BackendConfig):
    """How the workers of a run are joined.

    Attributes:
        backend: torch's name of it, "nccl" or "gloo".
    """

    backend: str

    @property
    def backend_cls(self) -> type[TorchBackend]:
        """See Ray Train."""
        return TorchBackend


def torch_config(cluster: ClusterConfig) -> TorchConfig:
    """Return how the workers of a run are joined: by NCCL on GPUs, else by Gloo."""
    return TorchConfig("nccl" if cluster.gpus_per_worker else "gloo")
