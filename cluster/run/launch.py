"""The driver of a training run: check, start Ray and MLflow, train, report."""

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import yaml
from ray.train.torch import TorchTrainer

from cluster.recipe.config import Recipe, kind_of, zero_stage
from cluster.recipe.placement import connected_nodes
from cluster.recipe.preflight import Preflight, check, check_new, data_facts, place_some, tracked_data
from cluster.recipe.resume import longer
from cluster.record.failures import one_line
from cluster.record.lease import Lease, hold
from cluster.record.run_folder import RunFolder, choose_run
from cluster.record.sessions import begin_session
from cluster.run.console import RunConsole, Show, straggler_line
from cluster.run.context import Launch
from cluster.run.driver import Fit
from cluster.run.metrics import RunMetrics, find_peak, ray_export
from cluster.run.result import RunEnd, conclude, is_concluded, note_end, send_waiting
from cluster.run.stragglers import Stragglers
from cluster.run.trainer import Share, build_trainer, keep_reference
from cluster.runtime.local import cluster_cpus
from cluster.runtime.session import (
    Head,
    Tracked,
    continue_command,
    held_cpus,
    log_file,
    on_joined_ray,
    raise_on_signal,
    ray_and_mlflow,
    stop_on_signal,
    tracking_of,
)
from cluster.worker.evaluation import EvaluationTasks
from cluster.worker.monitor import ActorMonitor, Event
from cluster.worker.peers import Holders
from cluster.worker.watchdog import Watchdog, end, keep_stacks
from perceiver.config import UserError
from perceiver.tasks import output_count
from perceiver.tracking.code import code_facts
from perceiver.tracking.redaction import redact
from perceiver.tracking.runs import load_handle

log = logging.getLogger(__name__)

MOST_STARTS = 999
"""Earlier starts of the workers that run.json keeps."""
STOPPING = "stopping: the workers save a checkpoint first (again to leave at once)"


def launch_training(
    recipe: Recipe, *, command: str, resume: bool = False, run: str | None = None, show: Show = "shell"
) -> RunEnd:
    """Train a recipe: `perceiver train`, `perceiver.train` and `perceiver.build_trainer`; return how the run has ended.

    Uses the Ray that this process has initialised, if there is one.

    Args:
        recipe: the recipe.
        command: the command as typed, without ``--resume`` and ``--run``, for the commands that are shown.
        resume: resume the newest run of the recipe, or ``run``.
        run: name of the run's folder; default: the recipe's name and the next free number.
        show: what to print.

    Raises:
        UserError: a mistake in the recipe, the data or the resources, before any worker starts.
    """
    began = time.time()
    recipe = on_joined_ray(recipe)
    folder = choose_run(recipe.output, recipe.name, resume, run)
    preflight = check(recipe, folder, resume)
    recipe = preflight.recipe
    with RunConsole(show=show) as console, ExitStack() as stack:
        stack.enter_context(raise_on_signal())
        lease = stack.enter_context(hold(folder.url))
        stack.enter_context(log_file(folder))
        folder, preflight = _take_over(folder, lease, preflight, resume)
        background = stack.enter_context(ThreadPoolExecutor(2))
        launch = Launch(recipe, folder, preflight, console, resume, command, background, lease)
        if launch.trained and is_concluded(launch):
            _say_finished(launch)
            send_waiting(launch, tracking_of(recipe.tracking, folder, recipe.name))
            return RunEnd(folder, "finished", facts={"step": launch.start_step, "total_steps": preflight.total_steps})
        begin_session(folder, began, preflight.checkpoint)
        _note_start(launch)
        _say_header(launch)
        try:
            outcome = run_workers(launch)
        except UserError:
            lease.check()
            note_end(launch, {}, "refused")
            raise
        except KeyboardInterrupt:
            outcome = {"status": "stopped", "handle": load_handle(folder.local)}
        except Exception as error:  # noqa: BLE001  a bug, or a failure of the machine
            log.exception("the run failed")
            outcome = {"status": "failed", "error": one_line(error)}
        lease.check()
        return conclude(launch, outcome)


def run_workers(launch: Launch) -> dict[str, Any]:
    """Run the workers; return their result, with ``status`` finished, stopped, refused or failed."""
    recipe, folder, console = launch.recipe, launch.folder, launch.console
    tracked = Tracked(
        tracking_of(recipe.tracking, folder, recipe.name),
        recipe.model_dump(mode="json"),
        changes=launch.change_tag,
        datasets=tracked_data(recipe.data, launch.preflight.manifest),
    )
    with ray_and_mlflow(recipe.cluster, folder, tracked, launch.background, console.say) as (session, handle):
        holders = Holders(recipe, launch.preflight.state)
        while True:
            monitor = ActorMonitor()
            share = Share(cluster_cpus(), held_cpus())
            trainer = build_trainer(launch.recipe, folder, monitor.address, handle, share, holders.addresses)
            fit = Fit(ThreadPoolExecutor(1, "fit").submit(trainer.fit), monitor, session.ended)
            without = _follow(launch, fit, trainer, monitor)
            if without is None:
                if not fit.lost:
                    holders.close()
                return {**fit.outcome, "handle": handle, "result": fit.result}
            launch = replace(launch, recipe=without)


def _follow(launch: Launch, fit: Fit, trainer: TorchTrainer, monitor: ActorMonitor) -> Recipe | None:
    """Handle the workers' events until their end; return a recipe with which they shall start again, if any."""
    recipe, folder, console = launch.recipe, launch.folder, launch.console
    watchdog = Watchdog(recipe.cluster.hang_s, recipe.cluster.hang_long_s, Head(console.say).away)
    stragglers = Stragglers(recipe.cluster.straggler_factor, recipe.cluster.straggler_s)
    evaluations = EvaluationTasks(recipe, folder, monitor, console.show)
    figures = RunMetrics(ray_export(folder.name), saved_at=launch.saved_at)
    without: Recipe | None = None
    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        monitor.request_stop()

    with stop_on_signal(stop, console.say, STOPPING):
        for event in fit.events():
            now = time.monotonic()
            watchdog.note(event, now)
            figures.note(event)
            evaluations.note(event)
            console.show(event)
            if event["kind"] == "checkpoint":
                keep_reference(trainer, event)
            if event["kind"] == "ready":
                _note_worker(launch, figures, event)
            if (slow := stragglers.note(event, now)) is not None:
                without = without or _handle_straggler(launch, slow)
                if without is not None:
                    monitor.request_stop()
            if event["kind"] == "polled":
                evaluations.collect()
                _check(launch, watchdog, now)
    console.close()
    if not fit.lost:
        evaluations.cancel()
        monitor.close()
    return without if fit.outcome.get("status") == "stopped" and not stopping.is_set() else None


def _check(launch: Launch, watchdog: Watchdog, now: float) -> None:
    """Kill a worker that hangs; raise `TakenOverError` if another driver has the lease."""
    folder = launch.folder
    if (hanging := watchdog.suspect(now)) is not None:
        hanging = keep_stacks(hanging, folder.local / "logs")
        launch.console.show({"kind": "hang", **asdict(hanging)})
        end(hanging)
    if launch.lease.taken_by:
        launch.lease.check()


def _handle_straggler(launch: Launch, slow: Event) -> Recipe | None:
    """Name a slow worker and note it in run.json; return the recipe with which the workers shall start again, if any.

    That is the recipe without the worker's node, with `cluster.on_straggler: restart` on a cluster whose other nodes
    have room.
    """
    recipe, folder, console = launch.recipe, launch.folder, launch.console
    console.show(slow)
    folder.note(stragglers=[*folder.facts().get("stragglers", []), straggler_line(slow)])
    if recipe.cluster.resolved_address() is None:
        return None
    avoid = (*recipe.cluster.avoid, slow["node_id"])
    without = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"avoid": avoid})})
    if recipe.cluster.on_straggler == "warn":
        console.say(f"  cluster.avoid=[{slow['ip']}] leaves its node out at the next start")
        return None
    try:
        place_some(without, connected_nodes())
    except UserError as error:
        console.say(f"  the workers stay: {error}")
        return None
    console.say("  restarting the workers without its node: they save a checkpoint first")
    return without


def _take_over(folder: RunFolder, lease: Lease, preflight: Preflight, resume: bool) -> tuple[RunFolder, Preflight]:
    """Record where this driver starts, before its workers do; return the folder as it may be written, and the checks.

    Until it had the lease, another driver may have written further checkpoints.
    """
    folder = replace(folder, fence=lease.fence)
    if not resume:
        check_new(folder)
    steps = folder.checkpoints.steps()
    if steps and (preflight.checkpoint is None or steps[-1] != preflight.checkpoint.step):
        preflight = replace(preflight, checkpoint=folder.checkpoints.newest())
    lease.start_at(preflight.checkpoint.step if preflight.checkpoint else 0)
    return folder, preflight


def _note_start(launch: Launch) -> None:
    """Write the recipe, the data, and what has changed since the last start to the run's folder."""
    folder, preflight = launch.folder, launch.preflight
    if not launch.resume:
        folder.set_aside_record()
    recipe = redact(launch.recipe.model_dump(mode="json"))
    folder.write("recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    data = asdict(data_facts(launch.recipe.data, preflight.manifest))
    changes = {**folder.facts().get("changes", {}), **launch.change_tag}
    folder.note(status="running", data=data, code=code_facts(), **({"changes": changes} if changes else {}))


def _say_finished(launch: Launch) -> None:
    """Print that a run is finished, and how it could be trained on."""
    step, samples = launch.start_step, launch.preflight.manifest.split(launch.recipe.data.train_split).samples
    launch.console.say(
        f"{launch.folder.url} is finished (step {step}); to train on: "
        f"{continue_command(launch.command, launch.folder)} {longer(launch.recipe, step, samples)}"
    )


def _say_header(launch: Launch) -> None:
    recipe, preflight, console = launch.recipe, launch.preflight, launch.console
    splits = preflight.manifest.splits
    rows = {name: split.samples for name, split in splits.items()}
    epochs = preflight.total_steps / preflight.epoch_steps
    workers, batch = recipe.cluster.workers, recipe.train.global_batch
    padding = recipe.train.rows(workers) * workers - batch
    console.say(f"{launch.folder.url}: {kind_of(recipe.model)}, {preflight.size}")
    console.say(
        f"data {recipe.data.url} ({', '.join(f'{n:,} {name}' for name, n in rows.items())}) · "
        f"{workers} worker{'s' * (workers > 1)}, ZeRO stage {zero_stage(recipe)} · "
        f"{preflight.total_steps:,} steps of {batch} ({epochs:.4g} epochs)"
        + (f" and {padding} row{'s' * (padding > 1)} of padding" if padding else "")
    )
    for note in preflight.notes:
        console.say(f"note: {note}")
    if preflight.start:
        console.say(preflight.start)
    if launch.resume:
        place = (
            f"the checkpoint at step {preflight.checkpoint.step}"
            if preflight.checkpoint
            else "the start: no checkpoint yet"
        )
        console.say(f"resuming {launch.folder.name} from {place}")
        for change in preflight.changes:
            console.say(f"  {change}")
        if launch.trained:
            console.say("  all steps are done: evaluating again, and writing what the last start did not finish")


def _note_worker(launch: Launch, figures: RunMetrics, event: Mapping[str, Any]) -> None:
    """Record a worker's process and node, and the start, in run.json; rank 0's device determines the peak FLOPs."""
    folder = launch.folder
    workers = {**folder.facts().get("workers", {}), str(event["rank"]): {"pid": event["pid"], "node": event["node"]}}
    folder.note(workers=workers)
    if event["rank"] == 0:
        start = {name: event[name] for name in ("step", "origin", "stages")}
        folder.note(starts=[*folder.facts().get("starts", [])[-MOST_STARTS:], {"time": time.time(), **start}])
        classes = output_count(launch.recipe.task, len(launch.preflight.manifest.classes)) or None
        find_peak(figures, launch.recipe, classes, event["device"], event["world"])
