"""Where a run happens: an address to connect to, or a Ray of its own on this machine."""

import contextlib
import logging
import math
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from perceiver.config import Config, UserError
from perceiver.tracking.redaction import redact_text

log = logging.getLogger(__name__)

# What Ray and the libraries read from the environment; set before they are imported, unless the user set them.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Else Ray ends idle data processes after a second and starts them again: stalls of seconds on few CPUs.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    # A start brings up a dozen processes that mostly wait for each other; Ray's default is one a CPU at a time.
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Training workers rank with Ray's own processes; data tasks step back by themselves (`pipelines.feed.samples`).
    "RAY_worker_niceness": "0",
    # Else glibc gives each thread a heap whose memory goes back to the system at every step: 2 to 5 % of a small one.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
}


SHARED_MEMORY = Path("/dev/shm")
LEAST_STORE_MB, STORE_MB = 80, 400
"""Ray starts no object store below 75 MiB. What waits for a worker, by default, takes up to 360 MB of large samples."""
SMALLEST_SHARE = 0.05
"""The least part of a CPU that a worker is placed with, and the step of default shares."""


class ClusterConfig(Config):
    """Workers and what each of them holds (recipe key ``cluster``)."""

    address: str | None = Field(
        default=None,
        description="address of a running Ray; default: RAY_ADDRESS, else a Ray of its own on this machine",
    )
    workers: PositiveInt = Field(default=1, description="training workers, one process each")
    min_workers: PositiveInt | None = Field(
        default=None,
        description="on a cluster: train with as few as this while nodes are missing, and with up to cluster.workers "
        "as they come; numbers that do not share out the global batch are left out; default: never fewer",
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


def set_quiet_environment() -> None:
    """Turn telemetry off and chatter down, unless the user's environment says otherwise."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start_ray(config: ClusterConfig, one_run: bool = True) -> dict[str, Any]:
    """Connect to the cluster, or start a Ray of its own on this machine; return facts about it for the log.

    Args:
        config: the recipe's ``cluster`` section.
        one_run: whether a Ray of its own serves one run only, and ends with it.

    Raises:
        UserError: the address does not answer.
    """
    import ray

    address = config.resolved_address()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        use_token()
        # One machine of our own is not taken away: without the watcher there is one process less to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        with _lean(config.dashboard or not one_run):
            context = ray.init(
                address="local",
                num_cpus=machine_cpus(),
                object_store_memory=config.store_mb * 1_000_000,
                include_dashboard=config.dashboard,
                dashboard_host="127.0.0.1",
                **quiet,
            )
    else:
        check_reachable(address)
        try:
            context = ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = redact_text((str(error).strip().splitlines() or [type(error).__name__])[0])
            raise UserError(
                f"no Ray cluster answers at {redact_text(address)} ({reason}): check cluster.address or RAY_ADDRESS"
            ) from None
    import ray._private.worker as worker

    session = worker.global_worker.node.get_session_dir_path() if worker.global_worker.node else ""
    return {"dashboard": context.dashboard_url if config.dashboard else "", "session": session}


@contextlib.contextmanager
def _lean(server: bool) -> Iterator[None]:
    """Have ``ray.init`` leave out processes that a Ray of one machine has no use for.

    These are the autoscaler's monitor, the one that would bring the workers' output to this terminal and, without
    ``server``, the dashboard's server, which ``include_dashboard=False`` starts all the same and waits for.
    """
    from ray._private import ray_constants
    from ray._private.node import Node

    def nowhere(node: Any, **_: Any) -> None:
        # Ray's agent asks for the server's address each second, with a trace in its log, until it is given one.
        key, space = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
        node.get_gcs_client().internal_kv_put(key, b"127.0.0.1:0", True, space)

    def nothing(node: Any) -> None:
        pass

    instead: dict[str, Callable[..., None]] = {"start_monitor": nothing, "start_log_monitor": nothing}
    if not server:
        instead["start_api_server"] = nowhere
    kept = {name: getattr(Node, name) for name in instead if hasattr(Node, name)}  # another version may rename them
    for name in kept:
        setattr(Node, name, instead[name])
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


class EarlyRay:
    """Starts Ray in a thread, so that it comes up while this process imports what it needs and checks the recipe."""

    def __init__(self, section: Any, one_run: bool = True) -> None:
        """Begin, if the recipe's ``cluster`` section (a plain tree) is in order; a mistake in it is reported later.

        Args:
            section: as it was read.
            one_run: see `start_ray`.
        """
        self.used = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="start-ray")
        try:
            config = ClusterConfig.model_validate(section or {})
        except ValidationError:
            self._future = None
        else:
            self._future = self._pool.submit(start_ray, config, one_run)

    def facts(self) -> dict[str, Any]:
        """Wait for Ray; return what ``start_ray`` does.

        Raises:
            UserError: the address does not answer.
        """
        assert self._future is not None, "the recipe was not checked"
        self.used = True
        return self._future.result()


def check_reachable(address: str) -> None:
    """Refuse an address at which nothing listens; Ray itself would try for a minute."""
    host, _, port = address.rsplit("/", 1)[-1].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {redact_text(address)} ({error.strerror or error}): check cluster.address or "
            "RAY_ADDRESS, or unset them to run on this machine"
        ) from None


def free_port(host: str, wanted: int = 0) -> int:
    """Return the wanted port if it is free, else another that no worker process is given.

    Raises:
        UserError: none is free.
    """
    for port in (wanted, 0):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise UserError(f"no port is free on {host}")


def shared_memory_mb() -> int:
    """Free megabytes where Ray keeps its objects, 0 if there is no such place: then they lie on the disk."""
    return shutil.disk_usage(SHARED_MEMORY).free // 1_000_000 if SHARED_MEMORY.is_dir() else 0


def use_token() -> None:
    """Make the token that a Ray of our own asks for (Ray turns that on itself, unless the mode says otherwise)."""
    if os.environ.get("RAY_AUTH_MODE") != "disabled":
        make_token()


def make_token() -> None:
    """Make Ray's token, in a file only this user can read, unless there is one."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
    path.chmod(0o600)


def cluster_cpus() -> float:
    """Return the logical CPUs of the connected cluster."""
    import ray

    return float(ray.cluster_resources().get("CPU", 0))
