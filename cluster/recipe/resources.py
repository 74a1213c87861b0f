"""The recipe's ``cluster`` section: workers, the resources of each, and their shares of a machine's CPUs."""

import math
import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from perceiver.config import Config, Real, Resource, UserError
from perceiver.tracking.redaction import redact_text

SHARED_MEMORY = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")
"""The container's control group (version 2)."""
LEAST_STORE_MB, STORE_MB = 80, 400
"""Ray needs an object store of at least 75 MiB. By default up to 360 MB of large samples wait for a worker."""
SMALLEST_SHARE = 0.05
"""The smallest share of a CPU that a worker reserves, and the step of default shares."""


Workers = Annotated[int, Field(ge=1, le=100_000)]
"""A number of workers."""


class ClusterConfig(Config):
    """Workers and the resources of each (recipe key ``cluster``)."""

    address: str | None = Field(
        default=None,
        description="address of a running Ray cluster; default: RAY_ADDRESS, otherwise a local Ray instance",
    )
    workers: Workers = Field(default=1, description="training workers, one process each")
    min_workers: Workers | None = Field(
        default=None,
        description="on a cluster: train with at least this many workers while nodes are missing, and with up to "
        "cluster.workers as nodes join; default: cluster.workers",
    )
    cpus_per_worker: Resource | None = Field(
        default=None,
        description="logical CPUs per worker; default: on this machine an equal share of what data tasks leave",
    )
    gpus_per_worker: Real = Field(default=0, ge=0, le=1000, description="GPUs per worker")
    worker_resources: dict[str, Resource] = Field(
        default={}, description="custom resources per worker, in addition to CPUs and GPUs"
    )
    worker_labels: dict[str, str] = Field(
        default={}, description="labels that a worker's node must have, such as role: train"
    )
    placement: Literal["pack", "spread"] = Field(
        default="pack", description="workers on as few nodes as possible, or on as many as possible"
    )
    autoscaling: bool = Field(
        default=False, description="the cluster adds nodes on demand: accept resources that no node has yet"
    )
    stop_wait_s: int = Field(
        default=600, gt=0, le=86_400, description="seconds for a stopped job to save its checkpoint before it is killed"
    )
    max_failures: int = Field(default=3, ge=0, le=1_000_000, description="worker failures after which the run fails")
    hang_s: Real = Field(
        default=60,
        ge=0.1,
        le=1e6,
        description="seconds without a heartbeat, without a batch that others got, or in which no worker makes "
        "progress, until a worker is killed",
    )
    hang_long_s: Real = Field(
        default=1800,
        ge=0.1,
        le=1e6,
        description="the same for phases that may take long: the start with its first two steps, evaluations, "
        "checkpoints, hooks",
    )
    straggler_factor: Real = Field(
        default=1.5,
        gt=1,
        le=1e6,
        description="a worker is slow if its forward passes take this many times the median of the workers",
    )
    straggler_s: Real = Field(
        default=60, ge=0, le=1e6, description="seconds for which a worker must be slow until it is named"
    )
    on_straggler: Literal["warn", "restart"] = Field(
        default="warn",
        description="when a worker is slow: name it with its node; or also save a checkpoint and start the workers "
        "again without that node, if the others have room",
    )
    avoid: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        default=(),
        max_length=1000,
        description="on a cluster: nodes without workers, each by its id, its name or its IP address",
    )
    mtbf_hours: Real = Field(
        default=24,
        ge=0.001,
        le=1e6,
        description="mean hours between failures of a run, for train.checkpoint_every=auto",
    )
    dashboard: bool = Field(
        default=False, description="dashboard of a local Ray instance, on loopback: ten processes, 1 GB of memory"
    )
    object_store_mb: int | None = Field(
        default=None,
        ge=LEAST_STORE_MB,
        le=100_000_000,
        description=f"size of the object store of a local Ray instance, in MB; default: {STORE_MB} per worker, as far "
        "as they fit into /dev/shm",
    )

    @property
    def store_mb(self) -> int:
        """Size of the object store of a local Ray instance, in MB; by default at most what fits into shared memory."""
        if self.object_store_mb:
            return self.object_store_mb
        wanted, free = STORE_MB * self.workers, shared_memory_mb()
        return min(wanted, free * 9 // 10) if free > STORE_MB else wanted

    def resolved_address(self) -> str | None:
        """Return the address to connect to, or None for a local Ray instance.

        Raises:
            UserError: it is a URL. Ray Client (`ray://`) runs no training, and a dashboard takes jobs.
        """
        address = self.address or os.environ.get("RAY_ADDRESS") or None
        if address and "://" in address:
            raise UserError(
                f"{'cluster.address' if self.address else 'RAY_ADDRESS'}={redact_text(address)}: wanted HOST:PORT of "
                "the cluster, such as HEAD:6379; from outside the cluster use perceiver submit --address "
                "http://HEAD:8265"
            )
        return address


def visible_cpus() -> int:
    """Return the number of CPUs on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """Return the CPUs whose time the container may use (`docker run --cpus`, a Kubernetes limit), or None."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
        return int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file outside containers, and "max"
        return None


def machine_cpus() -> int:
    """Return the number of CPUs that this process may use: those that it sees, at most its container's quota."""
    quota = cpu_quota()
    return visible_cpus() if quota is None else max(1, min(visible_cpus(), int(quota)))


def worker_threads(workers: int, node_cpus: float, wanted: int | None = None) -> int:
    """Return the threads of each worker on this machine.

    Args:
        workers: on this machine, of all concurrent runs.
        node_cpus: CPUs of the Ray node, which may be less than the machine's, or 0.
        wanted: by the user; replaces the default.
    """
    cores = min(machine_cpus(), int(node_cpus) or machine_cpus())
    return wanted or max(1, cores // workers)


def worker_cpus(config: ClusterConfig, cpus: float, data_cpus: float) -> float:
    """Return the logical CPUs of one worker so that data tasks keep ``data_cpus`` of the ``cpus``.

    Ray places a worker only where its share is free, and data tasks get only what the workers leave: if the workers
    reserved everything, training would wait for data for ever. The shares only control placement; the number of threads
    of a worker is decided by `worker_threads`.

    Raises:
        UserError: there are more workers than CPUs, or too little is left for the data tasks.
    """
    if config.workers > cpus:
        raise UserError(
            f"cluster.workers = {config.workers}, but there are {cpus:g} CPUs: set cluster.workers to at most {cpus:g}"
        )
    most = (cpus - data_cpus) / config.workers
    if most < SMALLEST_SHARE:
        raise UserError(
            f"data tasks need {data_cpus:g} of {cpus:g} CPUs, too few are left for cluster.workers = "
            f"{config.workers}: lower data.tasks or data.cpus_per_task"
        )
    if config.cpus_per_worker is None:
        return math.floor(most / SMALLEST_SHARE + 1e-9) * SMALLEST_SHARE
    if config.cpus_per_worker > most:
        raise UserError(
            f"cluster.cpus_per_worker = {config.cpus_per_worker:g} with {config.workers} workers leaves less than "
            f"{data_cpus:g} of {cpus:g} CPUs, which data tasks need: set it to at most {most:g}"
        )
    return config.cpus_per_worker


def shared_memory_mb() -> int:
    """Return the free megabytes of the shared memory that Ray's object store uses, 0 if there is none."""
    return shutil.disk_usage(SHARED_MEMORY).free // 1_000_000 if SHARED_MEMORY.is_dir() else 0
