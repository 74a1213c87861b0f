"""The driver of a training run: check, start Ray and MLflow side by side, train, report."""

import logging
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from cluster import local
from cluster.conclude import conclude
from cluster.console import RunConsole
from cluster.failures import failure_reason, one_line
from cluster.lease import Lease, hold
from cluster.metrics import RunMetrics, find_peak, ray_export
from cluster.preflight import Preflight, check
from cluster.recipe import Recipe, build_recipe, kind_of, zero_stage
from cluster.run_folder import RunFolder, find_run, named_run, new_run, redacted_recipe
from cluster.trainer import Share, build_trainer
from cluster.watchdog import Watchdog, end
from perceiver.config import UserError
from perceiver.train.mlflow import (
    RunHandle,
    TrackingConfig,
    create_run,
    load_handle,
    prewarm,
    spool_folder,
)
from perceiver.train.redaction import redact_text
from pipelines.warm import warm_up

log = logging.getLogger(__name__)

REFUSED_GRACE_S = 3.0
STOPPING = "stopping: the workers save a checkpoint first (again to leave at once)"


@dataclass
class Launch:
    """One start of a run: its recipe, folder, what the checks found, and where its lines go."""

    recipe: Recipe
    folder: RunFolder
    preflight: Preflight
    console: RunConsole
    resume: bool
    began: float
    command: str
    background: ThreadPoolExecutor
    lease: Lease


def launch_training(
    path: str,
    tree: Mapping[str, Any],
    ray_start: local.EarlyRay,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    run: str | None = None,
    as_json: bool = False,
) -> int:
    """Train a recipe to its end; return the exit code (0 done, 1 failed, 130 stopped).

    Args:
        path: the recipe's file, for messages.
        tree: what ``read_tree`` made of it and the overrides.
        ray_start: Ray, on its way up.
        overrides: those already in the tree, for the commands that are shown.
        resume: go on with the newest run of the recipe, or with ``run``.
        run: name of the run's folder.
        as_json: print the outcome as one JSON line at the end.

    Raises:
        UserError: a mistake in the recipe, the data or the resources, before any worker starts.
    """
    began = time.monotonic()
    recipe = build_recipe(tree, source=path)
    if recipe.cluster.resolved_address():
        ray_start.facts()  # a cluster that does not answer is said before a run folder is made
    if resume:
        folder = find_run(recipe.output, recipe.name, run)
    else:
        folder = named_run(recipe.output, run) if run else new_run(recipe.output, recipe.name)
    preflight = check(recipe, folder, resume)
    with RunConsole() as console, ExitStack() as stack:
        lease = stack.enter_context(hold(folder.url))
        stack.enter_context(log_file(folder))
        background = stack.enter_context(ThreadPoolExecutor(2))
        command = " ".join(["perceiver train", path, *map(shlex.quote, overrides)])
        launch = Launch(recipe, folder, preflight, console, resume, began, command, background, lease)
        folder.write("recipe.yaml", yaml.safe_dump(redacted_recipe(recipe.model_dump(mode="json")), sort_keys=False))
        if preflight.checkpoint and preflight.checkpoint.step >= preflight.total_steps:
            console.say(f"{folder.url} is finished (step {preflight.checkpoint.step}); raise train.epochs to go on")
            return 0
        outcome = logged(lambda: _train(launch, ray_start))
        return conclude(launch, outcome, as_json)


def logged(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work; what goes wrong in it stands in full in the log, and becomes one line for the user."""
    try:
        return work()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  anything else is our mistake or the machine's
        log.exception("the run could not be started")
        return {"status": "failed", "error": one_line(error)}


def _train(launch: Launch, ray_start: local.EarlyRay) -> dict[str, Any]:
    """Run the workers to their end; return what they say, with ``status`` finished, stopped, refused or failed."""
    console, folder = launch.console, launch.folder
    sidecar = prewarm(_tracking(launch), folder.local)
    _say_header(launch)
    tracking = launch.background.submit(_create_run, launch, sidecar)
    facts = ray_start.facts()
    handle = tracking.result()
    try:
        warm_up(launch.recipe.cluster.workers * launch.recipe.data.tasks, launch.recipe.data.cpus_per_task)
        folder.note(ray_session=facts["session"])
        _say_tracking(launch, handle)
        console.say(f"logs {folder.local / 'logs' / 'driver.log'} and {facts['session']}/logs")
        return {**_fit(launch, handle), "handle": handle}
    finally:
        # Ray goes down while the report is written.
        launch.background.submit(stop_ray, folder, facts["session"])


def _say_header(launch: Launch) -> None:
    recipe, preflight, console = launch.recipe, launch.preflight, launch.console
    splits = preflight.manifest.splits
    rows = {name: split.samples for name, split in splits.items()}
    epochs = preflight.total_steps / preflight.epoch_steps
    console.say(f"{launch.folder.url}: {kind_of(recipe.model)}, {preflight.parameters:,} parameters")
    console.say(
        f"data {recipe.data.url} ({', '.join(f'{n:,} {name}' for name, n in rows.items())}) · "
        f"{recipe.cluster.workers} worker{'s' * (recipe.cluster.workers > 1)}, ZeRO stage {zero_stage(recipe)} · "
        f"{preflight.total_steps:,} steps of {recipe.train.global_batch} ({epochs:.4g} epochs)"
    )
    if preflight.start:
        console.say(preflight.start)
    if launch.resume:
        place = (
            f"the checkpoint at step {preflight.checkpoint.step}"
            if preflight.checkpoint
            else "the start: no checkpoint yet"
        )
        console.say(f"resuming {launch.folder.name} from {place}")


def _say_tracking(launch: Launch, handle: RunHandle | None) -> None:
    if handle is None:
        return
    if handle.run_id is None:
        launch.console.say(
            f"mlflow does not answer at {redact_text(handle.uri)}: figures wait in {spool_folder(launch.folder.local)}"
        )
        return
    before = launch.folder.facts().get("mlflow_run") == handle.run_id
    launch.console.say(f"mlflow run {handle.run_id}{' goes on' if before else ''}, experiment {handle.experiment}")
    launch.folder.note(mlflow_run=handle.run_id)


def _tracking(launch: Launch) -> TrackingConfig:
    """Return the recipe's tracking section; without a URI, one SQLite file for all runs of the output folder."""
    config = launch.recipe.tracking
    if config.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return config
    return config.model_copy(update={"uri": f"sqlite:///{launch.folder.local.parent.resolve() / 'mlflow.db'}"})


def _create_run(launch: Launch, sidecar: Any) -> RunHandle | None:
    """Create the MLflow run, or reopen the one that this run folder belongs to."""
    recipe, config = launch.recipe, _tracking(launch)
    experiment = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or recipe.name
    return create_run(
        config.model_copy(update={"experiment": experiment}),
        launch.folder.name,
        output=launch.folder.local,
        params=recipe.model_dump(mode="json"),
        # A driver on another machine knows the run only from what lies at its output.
        resume=load_handle(launch.folder.local) or launch.folder.facts().get("mlflow_run"),
        prewarmed=sidecar,
    )


def _fit(launch: Launch, handle: RunHandle | None) -> dict[str, Any]:
    """Run Ray Train in a thread, so that this one shows progress and takes the user's signals."""
    import ray

    from cluster.monitor import pump, start_monitor

    monitor = start_monitor()
    share = Share(local.cluster_cpus())
    trainer = build_trainer(launch.recipe, launch.folder, monitor, handle, share)
    outcome: dict[str, Any] = {}
    refused: list[float] = []
    dog = Watchdog(launch.recipe.cluster.hang_s)
    figures = RunMetrics(ray_export(launch.folder.name))

    def show(event: dict[str, Any]) -> None:
        dog.note(event, time.monotonic())
        figures.note(event)
        if event["kind"] == "ready":
            _note_worker(launch.folder, event)
            if event["rank"] == 0:
                find_peak(figures, launch.recipe, len(launch.preflight.manifest.classes) or None, event["device"])
        if event["kind"] == "refused":
            outcome.update(status="refused", error=event["error"])
            refused.append(time.monotonic())
        launch.console.show(event)

    def fit() -> None:
        try:
            outcome.update(trainer.fit().return_value or {})
        except Exception as error:  # noqa: BLE001  whatever Ray raises becomes one line for the user
            log.exception("training failed")
            outcome.update(status="failed", error=failure_reason(error))

    thread = threading.Thread(target=fit, daemon=True)
    with stop_on_signal(monitor, launch.console.say, STOPPING):
        thread.start()
        # A worker that refuses to go on leaves the others waiting for it: they end with Ray, a moment later.
        while thread.is_alive() and not (refused and time.monotonic() - refused[0] > REFUSED_GRACE_S):
            pump(monitor, show)
            if (hanging := dog.suspect(time.monotonic())) is not None:
                launch.console.show({"kind": "hang", **asdict(hanging)})
                end(hanging)
            if launch.lease.lost:
                raise UserError(f"{launch.folder.url}: {launch.lease.lost}; this one stops, what it did since is void")
            thread.join(0.1)
        pump(monitor, show)
    launch.console.close()
    ray.kill(monitor)
    return outcome


def _note_worker(folder: RunFolder, event: Mapping[str, Any]) -> None:
    """Keep in run.json which process on which node is which rank."""
    workers = {**folder.facts().get("workers", {}), str(event["rank"]): {"pid": event["pid"], "node": event["node"]}}
    folder.note(workers=workers)


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
