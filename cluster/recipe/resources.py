"""The recipe's ``cluster`` section: workers, what each of them reserves, and how they share a machine's CPUs."""

import math
import os
import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from perceiver.config import Config, UserError

SHARED_MEMORY = Path("/dev/shm")
LEAST_STORE_MB, STORE_MB = 80, 400
"""Ray starts no object store below 75 MiB. What waits for a worker, by default, takes up to 360 MB of large samples."""
SMALLEST_SHARE = 0.05
"""The least part of a CPU that a worker is placed with, and the step of default shares."""


class ClusterConfig(Config):
    """Workers and what each of them holds (recipe key ``cluster``)."""

    address: str | None = Field(
        default=None,
        description="address of a running Ray cluster; default: RAY_ADDRESS, otherwise a local Ray instance",
    )
    workers: PositiveInt = Field(default=1, description="training workers, one process each")
    min_workers: PositiveInt | None = Field(
        default=None,
        description="on a cluster: train with as few as this while nodes are missing, and with up to cluster.workers "
        "as they join; default: never fewer",
    )
    cpus_per_worker: PositiveFloat | None = Field(
        default=None,
        description="logical CPUs of a worker; default: on this machine an equal share, less what data tasks need",
    )
    gpus_per_worker: NonNegativeFloat = Field(default=0, description="GPUs of a worker")
    worker_resources: dict[str, PositiveFloat] = Field(
        default={}, description="custom resources that a worker holds beside CPUs and GPUs"
    )
    worker_labels: dict[str, str] = Field(
        default={}, description="labels that a worker's node must have, such as role: train"
    )
    placement: Literal["pack", "spread"] = Field(
        default="pack", description="workers on as few nodes as hold them, or on as many as there are"
    )
    autoscaling: bool = Field(
        default=False, description="the cluster adds nodes on demand: do not refuse what no node has yet"
    )
    stop_wait_s: PositiveInt = Field(
        default=600, description="seconds that a stopped job has to save its checkpoint before it is killed"
    )
    max_failures: NonNegativeInt = Field(default=3, description="worker failures after which the run gives up")
    hang_s: PositiveFloat = Field(
        default=60, description="seconds without a sign of life, or without a batch that others got, that end a worker"
    )
    mtbf_hours: PositiveFloat = Field(
        default=24, description="mean hours between two failures of a run: how often checkpoints pay (train: auto)"
    )
    dashboard: bool = Field(
        default=False, description="Ray's dashboard for a Ray of its own, on loopback: ten processes, 1 GB of memory"
    )
    object_store_mb: int | None = Field(
        default=None,
        ge=LEAST_STORE_MB,
        description=f"size of the object store of a Ray of its own, in MB; default: {STORE_MB} for each worker, as far "
        "as they fit into /dev/shm",
    )

    @property
    def store_mb(self) -> int:
        """Size of the object store of a Ray of its own, in MB; by default no more than fits into shared memory."""
        if self.object_store_mb:
            return self.object_store_mb
        wanted, free = STORE_MB * self.workers, shared_memory_mb()
        return min(wanted, free * 9 // 10) if free > STORE_MB else wanted

    def resolved_address(self) -> str | None:
        """Return the address to connect to, or None for a Ray of its own."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


def machine_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def worker_cpus(config: ClusterConfig, cpus: float, data_cpus: float) -> float:
    """Return the logical CPUs of one worker so that data tasks keep ``data_cpus`` of the ``cpus``.

    Ray places a worker only where its share is free, and the data tasks start only with what the workers leave: if the
    workers took all, training would wait for data for ever. These are shares for placement; the threads of a worker are
    the machine's cores divided by its workers, whatever the share.

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
            f"data tasks need {data_cpus:g} of {cpus:g} CPUs, which leaves too little for cluster.workers = "
            f"{config.workers}: lower data.tasks or data.cpus_per_task"
        )
    if config.cpus_per_worker is None:
        return math.floor(most / SMALLEST_SHARE + 1e-9) * SMALLEST_SHARE
    if config.cpus_per_worker > most:
        raise UserError(
            f"cluster.cpus_per_worker = {config.cpus_per_worker:g} for {config.workers} workers leaves less of "
            f"{cpus:g} CPUs than the {data_cpus:g} that data tasks need: set it to at most {most:g}"
        )
    return config.cpus_per_worker


def shared_memory_mb() -> int:
    """Free megabytes where Ray keeps its objects, 0 if there is no such place: then they lie on the disk."""
    return shutil.disk_usage(SHARED_MEMORY).free // 1_000_000 if SHARED_MEMORY.is_dir() else 0
