"""The driver of a training run: check, start Ray and MLflow side by side, train, report."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from cluster import local
from cluster.console import RunConsole
from cluster.preflight import Preflight, check
from cluster.recipe import Recipe, load_recipe
from cluster.run_folder import RunFolder, find_run, new_run, redacted_recipe
from perceiver.config import UserError
from perceiver.train.mlflow import RunHandle, TrackingConfig, create_run, load_handle, open_tracker, prewarm, spool_folder

log = logging.getLogger(__name__)

EXIT_STOPPED = 130


@dataclass
class Launch:
    """One start of a run: its recipe, folder, what the checks found, and where its lines go."""

    recipe: Recipe
    folder: RunFolder
    preflight: Preflight
    console: RunConsole
    resume: bool
    began: float


def launch_training(
    path: str, overrides: Sequence[str], *, resume: bool = False, run: str | None = None, as_json: bool = False
) -> int:
    """Train a recipe to its end; return the exit code (0 done, 1 failed, 130 stopped).

    Raises:
        UserError: a mistake in the recipe, the data or the resources, before any worker starts.
    """
    began = time.monotonic()
    recipe = load_recipe(path, overrides)
    if resume:
        folder = find_run(recipe.output, recipe.name, run)
    else:
        folder = RunFolder(recipe.output, run) if run else new_run(recipe.output, recipe.name)
    preflight = check(recipe, folder, resume)
    with RunConsole() as console, ExitStack() as stack:
        launch = Launch(recipe, folder, preflight, console, resume, began)
        stack.enter_context(_log_file(folder))
        if preflight.checkpoint and preflight.checkpoint.step >= preflight.total_steps:
            console.say(f"{folder.url} is finished (step {preflight.checkpoint.step}); raise train.epochs to go on")
            return 0
        outcome = _train(launch)
        return _conclude(launch, outcome, as_json, path)


def _train(launch: Launch) -> dict[str, Any]:
    """Run the workers to their end; return what they say, with ``status`` finished, stopped, refused or failed."""
    console, folder = launch.console, launch.folder
    sidecar = prewarm(_tracking(launch), folder.local)
    _say_header(launch)
    with ThreadPoolExecutor(1) as pool:
        tracking = pool.submit(_create_run, launch, sidecar)
        facts = local.start_ray(launch.recipe.cluster)
        handle = tracking.result()
    try:
        folder.note(ray_session=facts["session"])
        console.say(f"logs {folder.local / 'logs' / 'driver.log'} and {facts['session']}/logs")
        return {**_fit(launch, handle), "handle": handle}
    finally:
        _stop_ray(folder, facts["session"])


def _say_header(launch: Launch) -> None:
    recipe, preflight, console = launch.recipe, launch.preflight, launch.console
    splits = preflight.manifest.splits
    rows = {name: sum(shard.rows for shard in shards) for name, shards in splits.items()}
    console.say(f"{launch.folder.url}: {recipe.model.kind}, {preflight.parameters:,} parameters")
    console.say(
        f"data {recipe.data.url} ({', '.join(f'{n:,} {name}' for name, n in rows.items())}) · "
        f"{recipe.cluster.workers} workers, ZeRO stage {recipe.deepspeed.zero_stage} · "
        f"{preflight.total_steps:,} steps of {recipe.train.global_batch} ({preflight.total_steps / preflight.epoch_steps:g} epochs)"
    )
    if launch.resume:
        place = f"the checkpoint at step {preflight.checkpoint.step}" if preflight.checkpoint else "the start: no checkpoint yet"
        console.say(f"resuming {launch.folder.name} from {place}")


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
        resume=load_handle(launch.folder.local),
        prewarmed=sidecar,
    )


def _fit(launch: Launch, handle: RunHandle | None) -> dict[str, Any]:
    """Run Ray Train in a thread, so that this one shows progress and takes the user's signals."""
    import ray

    from cluster.monitor import pump, start_monitor

    monitor = start_monitor()
    trainer = _trainer(launch, monitor, handle)
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome.update(trainer.fit().return_value or {})
        except Exception as error:  # noqa: BLE001  whatever Ray raises becomes one line for the user
            log.exception("training failed")
            outcome.update(status="failed", error=failure_reason(error))

    thread = threading.Thread(target=fit, daemon=True)
    with _stop_on_signal(monitor, launch.console):
        thread.start()
        while thread.is_alive():
            pump(monitor, launch.console.show)
            thread.join(0.1)
        pump(monitor, launch.console.show)
    launch.console.close()
    ray.kill(monitor)
    return outcome


def _trainer(launch: Launch, monitor: Any, handle: RunHandle | None) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.callbacks import FailureReporter
    from cluster.worker import train_worker

    recipe, folder = launch.recipe, launch.folder
    cluster = recipe.cluster
    cpus = local.worker_cpus(cluster, local.cluster_cpus(), recipe.data.cpus_per_task)
    resources = {"CPU": cpus} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "run": folder.name,
            "monitor": monitor,
            "mlflow": handle.to_json() if handle else None,
            "spool": str(spool_folder(folder.local).resolve()),
        },
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, resources_per_worker=resources, use_gpu=cluster.gpus_per_worker > 0
        ),
        run_config=ray.train.RunConfig(
            # A name of its own for each start: our checkpoints say where to go on, not Ray's snapshot of the last time.
            name=f"start-{time.time_ns()}",
            storage_path=_absolute(folder.location("ray")),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailureReporter(monitor)],
        ),
    )


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).resolve())


def failure_reason(error: BaseException) -> str:
    """Return one line for what ended the workers: the first worker's own exception, without Ray's frames."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = sorted(failures.items())[0]
        cause = getattr(cause, "cause", None) or cause
        return f"worker {rank}: {one_line(cause)}"
    return one_line(getattr(error, "controller_failure", None) or error)


def one_line(error: BaseException) -> str:
    """Return an exception's kind and the last line of its text, which says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


@contextmanager
def _stop_on_signal(monitor: Any, console: RunConsole) -> Any:
    """First Ctrl-C or SIGTERM: have the workers save and end. Second: leave at once."""

    def handler(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.default_int_handler)
        console.say("stopping: the workers save a checkpoint first (again to leave at once)")
        monitor.request_stop.remote()

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _log_file(folder: RunFolder) -> Any:
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


def _stop_ray(folder: RunFolder, session: str) -> None:
    """Stop a Ray of our own, keeping the workers' logs beside the run."""
    import ray

    ray.shutdown()
    logs = Path(session, "logs")
    if logs.is_dir():
        kept = folder.local / "logs" / "ray"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept, ignore_dangling_symlinks=True, ignore=shutil.ignore_patterns("old"))


def _conclude(launch: Launch, outcome: Mapping[str, Any], as_json: bool, path: str) -> int:
    """Say how it ended and what to do next; write report and MLflow's last entries. Return the exit code."""
    raise NotImplementedError
