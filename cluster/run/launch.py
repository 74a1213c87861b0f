"""The driver of a training run: check, start Ray and MLflow side by side, train, report."""

import logging
import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import yaml

from cluster.recipe.config import Recipe, build_recipe, kind_of, zero_stage
from cluster.recipe.origin import data_facts
from cluster.recipe.preflight import Preflight, check
from cluster.record.failures import failure_reason
from cluster.record.lease import Lease, hold
from cluster.record.run_folder import RunFolder, choose_run, redacted_recipe
from cluster.run.console import RunConsole
from cluster.run.evaluation import Evaluations
from cluster.run.metrics import RunMetrics, find_peak, ray_export
from cluster.run.result import conclude, send_waiting
from cluster.run.trainer import Share, build_trainer
from cluster.run.watchdog import Watchdog, end
from cluster.runtime import local
from cluster.runtime.session import (
    Tracked,
    log_file,
    logged,
    ray_and_mlflow,
    sigterm_as_interrupt,
    stop_on_signal,
    tracking_of,
)
from perceiver.config import UserError
from perceiver.tracking.runs import RunHandle
from pipelines.feed.warm import warm_up

log = logging.getLogger(__name__)

REFUSED_GRACE_S = 3.0
LOOK_S = 0.25
"""Between two looks at what the workers say."""
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

    @property
    def saved_at(self) -> float | None:
        """When the checkpoint that the run goes on from was saved, in seconds since the epoch; None without one."""
        return self.preflight.checkpoint.created if self.preflight.checkpoint else None


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
    folder = choose_run(recipe.output, recipe.name, resume, run)
    preflight = check(recipe, folder, resume)
    with RunConsole() as console, ExitStack() as stack:
        stack.enter_context(sigterm_as_interrupt())
        lease = stack.enter_context(hold(folder.url))
        stack.enter_context(log_file(folder))
        background = stack.enter_context(ThreadPoolExecutor(2))
        command = " ".join(["perceiver train", path, *map(shlex.quote, overrides)])
        launch = Launch(recipe, folder, preflight, console, resume, began, command, background, lease)
        folder.write("recipe.yaml", yaml.safe_dump(redacted_recipe(recipe.model_dump(mode="json")), sort_keys=False))
        folder.note(data=data_facts(preflight.manifest))
        if preflight.checkpoint and preflight.checkpoint.step >= preflight.total_steps:
            console.say(f"{folder.url} is finished (step {preflight.checkpoint.step}); raise train.epochs to go on")
            send_waiting(launch, tracking_of(recipe.tracking, folder, recipe.name))
            return 0
        outcome = logged(lambda: _train(launch, ray_start))
        return conclude(launch, outcome, as_json)


def _train(launch: Launch, ray_start: local.EarlyRay) -> dict[str, Any]:
    """Run the workers to their end; return what they say, with ``status`` finished, stopped, refused or failed."""
    recipe, folder = launch.recipe, launch.folder
    _say_header(launch)
    run = Tracked(tracking_of(recipe.tracking, folder, recipe.name), recipe.model_dump(mode="json"))

    warm = partial(warm_up, recipe.cluster.workers * recipe.data.tasks, recipe.data, launch.preflight.manifest)
    with ray_and_mlflow(folder, run, ray_start, launch.background, launch.console.say, warm) as handle:
        return {**_fit(launch, handle), "handle": handle}


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


def _fit(launch: Launch, handle: RunHandle | None) -> dict[str, Any]:
    """Run Ray Train in a thread, so that this one shows progress and takes the user's signals."""
    import ray

    from cluster.run.monitor import pump, start_monitor

    monitor = start_monitor()
    trainer = build_trainer(launch.recipe, launch.folder, monitor, handle, Share(local.cluster_cpus()))
    outcome: dict[str, Any] = {}
    refused: list[float] = []
    dog = Watchdog(launch.recipe.cluster.hang_s)
    beside = Evaluations(launch.recipe, launch.folder, monitor, launch.console.show)
    figures = RunMetrics(ray_export(launch.folder.name), saved_at=launch.saved_at)

    def show(event: dict[str, Any]) -> None:
        dog.note(event, time.monotonic())
        figures.note(event)
        beside.note(event)
        if event["kind"] == "ready":
            _note_worker(launch, figures, event)
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
            beside.tend()
            if (hanging := dog.suspect(time.monotonic())) is not None:
                launch.console.show({"kind": "hang", **asdict(hanging)})
                end(hanging)
            if launch.lease.lost:
                raise UserError(f"{launch.folder.url}: {launch.lease.lost}; this one stops, what it did since is void")
            thread.join(LOOK_S)
        pump(monitor, show)
    beside.cancel()
    launch.console.close()
    ray.kill(monitor)
    return outcome


def _note_worker(launch: Launch, figures: RunMetrics, event: Mapping[str, Any]) -> None:
    """Keep in run.json which process on which node is which rank; with the first one the device is known."""
    folder = launch.folder
    workers = {**folder.facts().get("workers", {}), str(event["rank"]): {"pid": event["pid"], "node": event["node"]}}
    folder.note(workers=workers)
    if event["rank"] == 0:
        classes = len(launch.preflight.manifest.classes) or None
        find_peak(figures, launch.recipe, classes, event["device"], event["world"])
