"""What the drivers of a run and of a search have in common: Ray and MLflow side by side, their log, and Ctrl-C."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.record.failures import one_line
from cluster.record.run_folder import RunFolder
from cluster.runtime.local import EarlyRay
from perceiver.config import UserError
from perceiver.tracking.record import HISTORY
from perceiver.tracking.redaction import redact_text
from perceiver.tracking.runs import RunHandle, TrackingConfig, create_run, load_handle, sqlite_uri

log = logging.getLogger(__name__)

GO_ON = "PERCEIVER_GO_ON"
"""Environment variable of a job: the command of its user that goes on with the run."""


def go_on_command(command: str, folder: RunFolder) -> str:
    """Return the command that goes on with a run: of the one that submitted this job, else the one that started it."""
    return os.environ.get(GO_ON) or f"{command} --resume --run {folder.name}"


@dataclass(frozen=True)
class Tracked:
    """The MLflow run of a driver: where it goes (`tracking_of`), and what it is created with."""

    config: TrackingConfig
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)


def tracking_of(config: TrackingConfig, folder: RunFolder, name: str) -> TrackingConfig:
    """Return a recipe's tracking section with store and experiment filled in.

    Args:
        config: the section.
        folder: of the run; without a URI all runs beside it share one SQLite file.
        name: the experiment unless the section or MLFLOW_EXPERIMENT_NAME says another.
    """
    store = folder.local.parent.resolve() / "mlflow.db"
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(store)
    experiment = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
    return config.model_copy(update={"uri": uri, "experiment": experiment})


@contextmanager
def ray_and_mlflow(
    folder: RunFolder,
    run: Tracked,
    ray_start: EarlyRay,
    background: ThreadPoolExecutor,
    say: Callable[[str], None],
    on_ray: Callable[[], Any],
) -> Iterator[RunHandle | None]:
    """Have Ray and the MLflow run while the body works; both come up side by side, Ray goes down in the background.

    Args:
        folder: of the run; is told Ray's session and the MLflow run.
        run: the MLflow run, created or reopened.
        ray_start: Ray, on its way up.
        background: does what the body need not wait for.
        say: prints a line.
        on_ray: called when Ray is there; MLflow may not be yet.
    """
    created = background.submit(_create_run, folder, run)
    facts = ray_start.facts()
    on_ray()
    handle = created.result()
    try:
        folder.note(ray_session=facts["session"])
        _say_tracking(folder, handle, say)
        say(f"logs {folder.local / 'logs' / 'driver.log'} and {facts['session']}/logs")
        if facts["dashboard"]:
            say(f"dashboard http://{facts['dashboard']}")
        yield handle
    finally:
        # Ray goes down while the report is written.
        background.submit(stop_ray, folder, facts["session"])


def _create_run(folder: RunFolder, run: Tracked) -> RunHandle | None:
    """Create the MLflow run, or reopen the one that this folder belongs to."""
    return create_run(
        run.config,
        folder.name,
        output=folder.local,
        params=run.params,
        tags=run.tags,
        # A driver on another machine knows the run only from what lies at its output.
        resume=load_handle(folder.local) or folder.facts().get("mlflow_run"),
    )


def _say_tracking(folder: RunFolder, handle: RunHandle | None, say: Callable[[str], None]) -> None:
    if handle is None:
        return
    if handle.run_id is None:
        say(f"mlflow does not answer at {redact_text(handle.uri)}: metrics wait in {folder.local / HISTORY}")
        return
    before = folder.facts().get("mlflow_run") == handle.run_id
    say(f"mlflow run {handle.run_id}{' goes on' if before else ''}, experiment {handle.experiment}")
    folder.note(mlflow_run=handle.run_id)


def logged(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work; what goes wrong in it stands in full in the log, and becomes one line for the user."""
    try:
        return work()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  anything else is our mistake or the machine's
        log.exception("the run could not be started")
        return {"status": "failed", "error": one_line(error)}


@contextmanager
def stop_on_signal(monitor: Any, say: Callable[[str], None], line: str) -> Any:
    """First Ctrl-C or SIGTERM: ask the workers, through their monitor, to save and end, and ``say`` the ``line``.

    Again, a second later or more: leave at once. The second is there because some wrappers pass one Ctrl-C on twice.
    """
    asked: list[float] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(time.monotonic())
            say(line)
            monitor.request_stop.remote()
        elif time.monotonic() - asked[0] > 1.0:
            raise KeyboardInterrupt

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """While a run starts up, take SIGTERM as Ctrl-C: an exception, on whose way out the run's lease is given back."""

    def handler(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def log_file(folder: RunFolder) -> Any:
    """Send all library chatter of this process to ``logs/driver.log`` instead of the terminal."""
    path = folder.local / "logs" / "driver.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def stop_ray(folder: RunFolder, session: str) -> None:
    """Stop a Ray of our own, keeping the workers' logs beside the run; leave a cluster that others use too."""
    import ray
    import ray._private.worker as worker

    own = worker.global_worker.node is not None and worker.global_worker.node.is_head()
    ray.shutdown()
    logs = Path(session, "logs")
    if own and logs.is_dir():
        kept = folder.local / "logs" / "ray"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept, ignore_dangling_symlinks=True, ignore=shutil.ignore_patterns("old"))
