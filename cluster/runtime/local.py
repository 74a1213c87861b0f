"""Connecting to a Ray cluster, or starting a local Ray instance on this machine."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import perceiver_train
from cluster.recipe.resources import ClusterConfig, machine_cpus
from cluster.runtime.ray_internals import LOOPBACK, loopback_only
from perceiver.config import UserError
from perceiver.storage import first_line
from perceiver.tracking.redaction import redact_text

log = logging.getLogger(__name__)

# Set before Ray and other libraries are imported, unless the user has set them.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ray Train collects reports at each health check: with the default of 2 s a second report would wait that long.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # The driver names a lost process itself; Ray would print the last lines of the log.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^Raylet is terminated",
    # Otherwise Ray stops idle data processes after a second and restarts them: stalls of seconds on few CPUs.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    # Otherwise a local start creates a dozen mostly waiting processes, one per CPU at a time: 10 s more on two cores.
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Training workers run at the priority of Ray's own processes; data tasks lower theirs (`pipelines.feed.samples`).
    "RAY_worker_niceness": "0",
    # Otherwise OpenMP's threads wait for each other in a loop, on the cores that data tasks need. With two threads on
    # two cores a training of two frozen models waits 20 % of its time for data, and 4 % with this, and is 10 % faster.
    "OMP_WAIT_POLICY": "PASSIVE",
    # The workers import ours before Ray puts the driver's folder, which may have a `cluster.py`, first on their path.
    "RAY_preload_python_modules": "perceiver_train.pinned",
}


QUIET_INIT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
"""Arguments of `ray.init`: Ray's logs stay in its files."""

OUR_PACKAGES: dict[str, Any] = {"worker_process_setup_hook": perceiver_train.PIN}
"""Runtime environment on a running cluster, whose workers do not preload our packages.

A local instance has none: its idle workers could not be used, and the first tasks would start 3 s later on two cores.
"""

API_SERVER, NO_API_SERVER = "RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9"
"""Ray Train asks the API server whether a run's controller is alive, and ends the workers if it is not known there. An
instance without a dashboard records the default port, 8265, at which another instance may listen, such as that of
`perceiver cluster up`; at this address nothing answers, which Ray Train takes for temporary."""

PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Whether Ray Train starts a process per run that asks for preempted nodes. An instance of one machine has none."""

ENDS = {signal.SIGTERM, signal.SIGHUP}
"""Signals by which others end a run."""

CONNECT_S, SETTINGS_S = 5, 8
"""Seconds for a connection to a Ray cluster, and for the first bytes of its answer."""
HTTP2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""How a client of HTTP/2, and so of gRPC, begins: a fixed text and a frame with its (no) settings."""
SETTINGS = b"\x04"
"""Type of the frame with which a server of HTTP/2 begins; the three bytes before it are its length."""

LONGEST_TEMPORARY = 36
"""Longest temporary folder in bytes: the path of a socket has at most 107, of which Ray's part takes up to 70."""


def set_quiet_environment() -> None:
    """Turn telemetry off and reduce log output, unless the user's environment says otherwise."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class RaySession:
    """The Ray instance that this process is connected to.

    Attributes:
        own: whether this process started it.
        folder: session folder on this machine.
        dashboard: address of the dashboard; empty without one.
        processes: those without which a local instance does not work.
    """

    own: bool
    folder: str
    dashboard: str
    processes: tuple[psutil.Process, ...] = ()

    def ended(self) -> str:
        """Return the process of a local instance that has ended, empty if all are running.

        The others are killed at once then: Ray would print their logs to the terminal.
        """
        lost = next((each for each in self.processes if not _runs(each)), None)
        if lost is None:
            return ""
        kill(self.processes)
        return f"Ray's process {lost.pid} ({lost.name()}) has ended"

    def stop(self, keep_logs: Path) -> None:
        """Disconnect; stop a local instance and copy its logs to `keep_logs`, which is replaced if it exists."""
        import ray

        if self.ended():
            kill(writing_processes(self.folder))  # `ray.shutdown` would wait for the process
        else:
            if self.own:
                end_monitors()
            ray.shutdown()
        logs = Path(self.folder, "logs")
        if self.own and logs.is_dir():
            shutil.rmtree(keep_logs, ignore_errors=True)
            shutil.copytree(logs, keep_logs, ignore_dangling_symlinks=True, ignore=shutil.ignore_patterns("old"))


def start_ray(config: ClusterConfig) -> RaySession:
    """Connect to the cluster, or start a local Ray instance on this machine.

    Args:
        config: the recipe's ``cluster`` section.

    Raises:
        UserError: the address does not answer.
    """
    address = config.resolved_address()
    if address is not None or config.dashboard:
        # The dashboard's Train page reads what this actor collects.
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    return _start_instance(config) if address is None else _connect(address)


def _connect(address: str) -> RaySession:
    import ray

    check_reachable(address)
    try:
        with ends_blocked():
            context: Any = ray.init(address=address, runtime_env=OUR_PACKAGES, **QUIET_INIT)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = redact_text(first_line(error))
        raise UserError(
            f"no Ray cluster answers at {redact_text(address)} ({reason}): check cluster.address or RAY_ADDRESS"
        ) from None
    return RaySession(False, str(context.address_info.get("session_dir") or ""), context.dashboard_url or "")


def _start_instance(config: ClusterConfig) -> RaySession:
    import ray

    if os.environ.get("RAY_AUTH_MODE") != "disabled":  # by default Ray requires a token
        try:
            make_token()
        except OSError:  # such as a read-only home: this instance gets a token of its own
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if socket_folder() == "/tmp":
        os.environ["RAY_TMPDIR"] = "/tmp"
    inherited = {API_SERVER: None if config.dashboard else NO_API_SERVER, PREEMPTION_WATCHER: "0"}
    try:
        with environment(inherited), ends_blocked(), loopback_only():
            context: Any = ray.init(
                address="local",
                num_cpus=machine_cpus(),
                object_store_memory=config.store_mb * 1_000_000,
                include_dashboard=config.dashboard,
                dashboard_host=LOOPBACK,
                **QUIET_INIT,
            )
    except BaseException:
        end_ray_children()
        raise
    processes = [each for each in psutil.Process().children() if each.name() in ("gcs_server", "raylet")]
    return RaySession(
        own=True,
        folder=str(context.address_info.get("session_dir") or ""),
        dashboard=(context.dashboard_url or "") if config.dashboard else "",
        processes=tuple(processes),
    )


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables for the processes that this one starts, or remove those with None; restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set_environment(values)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def ends_blocked() -> Iterator[None]:
    """Block SIGTERM and SIGHUP in the processes that this one starts; afterwards this process handles them as before.

    Slurm's time limit, systemd and GNU timeout send SIGTERM to every process of a run, and a terminal that is closed
    sends SIGHUP. If Ray's processes and the workers ended with it, the driver could not save a checkpoint. Ray stops
    processes with SIGKILL after a second.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in ENDS}
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        yield
    except SystemExit:
        # Ray's own handler, which it sets while it starts; another thread may have received the signal.
        raise KeyboardInterrupt from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)


def end_ray_children() -> None:
    """Kill the processes of a local Ray instance that was interrupted while it started."""
    import ray

    folder = str(Path(ray.__file__).parent)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if line.startswith("ray::") or folder in line:
                process.kill()


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes, some of which may have ended."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def writing_processes(folder: str) -> list[psutil.Process]:
    """Return the other processes of this user that write to a file below a folder.

    Each of Ray's writes a log. Their environment cannot tell them apart: they replace it by their titles.
    """

    def writes(process: psutil.Process) -> bool:
        return any(file.path.startswith(f"{folder}/") and file.mode != "r" for file in process.open_files())

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and writes(process):
                found.append(process)
    return found


def end_monitors() -> None:
    """Kill the log and metrics monitors of a local Ray instance, for each of which `ray.shutdown` waits a second."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("/ray/" in word and word.endswith(".py") for word in process.cmdline()):
                process.kill()


def socket_folder() -> str:
    """Return the folder of Ray's sockets: RAY_TMPDIR, else the temporary folder, or /tmp if that is too long.

    Raises:
        UserError: /tmp cannot be used either, or RAY_TMPDIR is too long.
    """
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST_TEMPORARY:
        return folder
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    if name == "RAY_TMPDIR" or not os.access("/tmp", os.W_OK):
        raise UserError(
            f"{name}={folder} has {len(os.fsencode(folder))} bytes, which makes the names of Ray's sockets too long: "
            f"set RAY_TMPDIR to a folder of at most {LONGEST_TEMPORARY} bytes"
        )
    return "/tmp"


def check_reachable(
    address: str, fix: str = "check cluster.address or RAY_ADDRESS, or unset them to run on this machine"
) -> None:
    """Raise a UserError within seconds if no gRPC server answers at an address; Ray itself would try for minutes."""
    host, _, port = address.rsplit("/", 1)[-1].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return
            connection.sendall(HTTP2_START)
            connection.settimeout(SETTINGS_S)
            reason = "" if connection.recv(9)[3:4] == SETTINGS else "it is no gRPC server"
    except TimeoutError:
        reason = "no answer in time"
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error)
    if reason:
        raise UserError(f"no Ray cluster answers at {redact_text(address)} ({reason}): {fix}")


def free_port(host: str, wanted: int = 0) -> int:
    """Return the wanted port if it is free, otherwise any free port.

    Raises:
        UserError: no port is free.
    """
    for port in (wanted, 0):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise UserError(f"no port is free on {host}")


def token_file() -> Path:
    """Return the file of Ray's authentication token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def make_token() -> None:
    """Create Ray's authentication token, in a file that only this user can read, unless it exists.

    Raises:
        OSError: the file cannot be written.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_file()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o600)


def cluster_cpus() -> float:
    """Return the logical CPUs of the connected cluster."""
    import ray

    return float(ray.cluster_resources().get("CPU", 0))
