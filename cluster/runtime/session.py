"""What the drivers of a run and of a search share: Ray and MLflow, the log file, and signals."""

import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.recipe.config import Recipe
from cluster.recipe.resources import ClusterConfig
from cluster.record.failures import one_line
from cluster.record.run_folder import DRIVER_LOG, RunFolder
from cluster.runtime.local import ENDS, RaySession, check_reachable, start_ray
from perceiver.config import UserError
from perceiver.storage import shortened
from perceiver.tracking.printable import SafeFormatter
from perceiver.tracking.record import HISTORY
from perceiver.tracking.redaction import redact_text
from perceiver.tracking.runs import Datasets, RunHandle, TrackingConfig, create_run, load_handle

log = logging.getLogger(__name__)

ASK_S = 2.0
CONTINUE_COMMAND = "PERCEIVER_CONTINUE_COMMAND"
"""Environment variable of a job: the command that continues its run."""


def continue_command(command: str, folder: RunFolder) -> str:
    """Return the command that continues a run: the job's, otherwise `command` with ``--resume``."""
    return os.environ.get(CONTINUE_COMMAND) or f"{command} --resume --run {folder.name}"


def mlflow_place(uri: str) -> str:
    """Return the address of an MLflow server or the reference to it, or the command that opens another store."""
    scheme, found, place = redact_text(uri).rpartition("sqlite:///")
    store = scheme + found + (shortened(place) if found else place)
    return (
        store
        if uri.startswith(("http", "databricks", "env:", "file:"))
        else f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    )


@dataclass(frozen=True)
class Tracked:
    """The MLflow run of a driver: its tracking section (see `tracking_of`), parameters, tags and data sets.

    `changes` are tags that a run gets also if it is continued.
    """

    config: TrackingConfig
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)
    datasets: Datasets = ()


def tracking_of(config: TrackingConfig, folder: RunFolder, name: str) -> TrackingConfig:
    """Return a recipe's tracking section with store and experiment filled in.

    Args:
        config: the section.
        folder: of the run; without a URI all runs in the same output folder share one SQLite file.
        name: the experiment, unless the section or MLFLOW_EXPERIMENT_NAME names another.
    """
    uri = config.store_uri(folder.local.parent.resolve()) if config.enabled else config.uri
    experiment = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
    return config.model_copy(update={"uri": uri, "experiment": experiment})


class JoinedRay(RaySession):
    """A Ray that the calling program has initialised: it is used, and stays when the run ends."""

    def stop(self, keep_logs: Path) -> None:
        """Do nothing."""


def is_joined() -> bool:
    """Return whether this process has initialised Ray, or is a Ray task or actor; does not import Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def open_ray(config: ClusterConfig) -> RaySession:
    """Return the Ray that this process has initialised, otherwise connect to a cluster or start a local instance.

    Raises:
        UserError: the address does not answer.
    """
    return JoinedRay(own=False, folder="", dashboard="") if is_joined() else start_ray(config)


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Connect to Ray in a `with` block, see `open_ray`; a Ray that the calling program has initialised stays.

    Raises:
        RuntimeError: Ray raised an error inside: its cause in one line, and the folder of Ray's logs.
    """
    import ray
    from ray.exceptions import RayError

    joined = is_joined()
    session = open_ray(config)
    try:
        yield
    except RayError as error:
        if isinstance(error, UserError):  # Ray raises a task's error as both types
            raise
        place = f"; Ray's logs: {session.folder}/logs" if session.folder else ""
        raise RuntimeError(f"{one_line(error)}{place}") from error
    finally:
        if not joined:
            ray.shutdown()


def on_joined_ray(recipe: Recipe) -> Recipe:
    """Return a recipe with the address of the Ray that this process has initialised, if that has several nodes.

    With one node the workers are placed as on a local instance.
    """
    if not is_joined() or recipe.cluster.resolved_address() is not None:
        return recipe
    import ray

    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return recipe
    address = ray.get_runtime_context().gcs_address
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"address": address})})


def held_cpus() -> float:
    """Return the logical CPUs that the calling Ray task or actor reserves; 0 in a driver."""
    import ray

    try:
        return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0))
    except AssertionError:  # this is a driver; asking for the task would print a warning there
        return 0.0


class Head:
    """Whether the head of the connected cluster answers, without which no process starts.

    Args:
        say: gets a line when it no longer does.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self._away, self._asked = say, False, -math.inf

    def away(self) -> bool:
        """Return whether it does not answer; it is asked every `ASK_S` seconds at most."""
        import ray

        now = time.monotonic()
        if now - self._asked < ASK_S:
            return self._away
        before, self._asked = self._away, now
        try:
            check_reachable(ray.get_runtime_context().gcs_address)
            self._away = False
        except UserError:
            self._away = True
        if self._away and not before:
            self.say("the head of the Ray cluster does not answer: workers that wait are not taken for hanging")
        return self._away


@contextmanager
def ray_and_mlflow(
    config: ClusterConfig,
    folder: RunFolder,
    run: Tracked,
    background: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> Iterator[tuple[RaySession, RunHandle | None]]:
    """Connect to Ray and open the MLflow run, both at the same time; on exit, stop Ray in the background.

    Args:
        config: the recipe's ``cluster`` section.
        folder: of the run; its run.json records Ray's session and the MLflow run.
        run: the MLflow run, created or reopened.
        background: executor for the work that the caller does not wait for.
        say: prints a line.

    Raises:
        UserError: the cluster or a required MLflow server does not answer.
    """
    created = background.submit(_create_run, folder, run)
    ray_session = open_ray(config)
    try:
        handle = created.result()
        folder.note(ray_session=ray_session.folder)
        _say_tracking(folder, handle, say)
        say(f"logs {folder.local / DRIVER_LOG}" + (f" and {ray_session.folder}/logs" if ray_session.folder else ""))
        if ray_session.dashboard:
            say(f"dashboard http://{ray_session.dashboard}")
        yield ray_session, handle
    finally:
        background.submit(ray_session.stop, folder.local / "logs" / "ray")  # while the report is written


def _create_run(folder: RunFolder, run: Tracked) -> RunHandle | None:
    """Create the MLflow run of a folder, or reopen it."""
    return create_run(
        run.config,
        folder.name,
        output=folder.local,
        params=run.params,
        tags=run.tags,
        changes=run.changes,
        datasets=run.datasets,
        # A driver on another machine finds the run's id only in the output folder.
        resume=load_handle(folder.local) or folder.facts().get("mlflow_run"),
    )


def _say_tracking(folder: RunFolder, handle: RunHandle | None, say: Callable[[str], None]) -> None:
    if handle is None:
        return
    if handle.run_id is None:
        say(f"mlflow does not answer at {redact_text(handle.uri)}: metrics wait in {folder.local / HISTORY}")
        return
    before = folder.facts().get("mlflow_run") == handle.run_id
    say(f"mlflow run {handle.run_id}{' continues' if before else ''}, experiment {handle.experiment}")
    folder.note(mlflow_run=handle.run_id)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle Ctrl-C, SIGTERM and SIGHUP (a closed terminal; not under `nohup`, which ignores it) by a function.

    Only the main thread may set handlers; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    previous = {number: signal.signal(number, handler) for number in {signal.SIGINT, *ENDS} - ignored}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def stop_on_signal(request_stop: Callable[[], None], say: Callable[[str], None], line: str) -> Iterator[None]:
    """Call `request_stop` and print `line` at the first Ctrl-C or SIGTERM; raise KeyboardInterrupt at the second.

    A signal within a second of the first one is ignored, because some wrappers send one Ctrl-C twice.
    """
    asked: list[float] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(time.monotonic())
            request_stop()
            say(line)
        elif time.monotonic() - asked[0] > 1.0:
            raise KeyboardInterrupt

    with handled(handler):
        yield


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C and SIGTERM while a run starts, so that its lease is released."""

    def handler(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with handled(handler):
        yield


@contextmanager
def log_file(folder: RunFolder) -> Iterator[None]:
    """Write the log of this process to ``logs/driver.log`` instead of the terminal."""
    path = folder.local / DRIVER_LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
