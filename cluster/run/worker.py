"""What each Ray Train worker runs: build model, engine, data and hooks from the recipe, then the training loop."""

import contextlib
import itertools
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cluster.predict.outputs import parquet, predicted
from cluster.recipe.config import Recipe, build_recipe, eval_rows, zero_stage
from cluster.recipe.preflight import epoch_steps_of
from cluster.record.run_folder import RunFolder, redacted_recipe
from cluster.run.guard import build_beside, build_guard
from cluster.run.monitor import Client, connect
from cluster.run.watchdog import Pulse
from cluster.runtime.drain import leave
from perceiver.config import UserError
from perceiver.export.weights import open_weights, start_from
from perceiver.factory import build_model
from perceiver.optim.schedules import build_schedule
from perceiver.tasks import build_task
from perceiver.tracking.runs import RunHandle, open_tracker
from perceiver.tracking.tracker import NullTracker, Tracker
from perceiver.train.checkpoint.evaluation import BesideHook
from perceiver.train.checkpoint.store import Snapshot
from perceiver.train.engine.deepspeed_engine import BatchPlan, DeepSpeedEngine
from perceiver.train.engine.protocol import Engine, Task
from perceiver.train.hooks import EvalHook, History, MetricsHook
from perceiver.train.loop import Batch, Hook, Span, StepInfo
from pipelines.feed.ingest import EvalShare, TrainShare, eval_batches, load_data, train_batches
from pipelines.shards.manifest import Manifest
from pipelines.shards.quarantine import Quarantine

log = logging.getLogger(__name__)

SWITCH_S = 0.0005
"""After so long a thread that waits for the interpreter gets it: training must not wait 5 ms for Ray's threads."""
LIBRARIES = ("torch", "ray", "deepspeed", "mlflow", "pyarrow", "numpy")


@dataclass(frozen=True)
class Place:
    """Where this worker stands in the group."""

    rank: int
    world: int
    local_world: int
    device: torch.device


EngineMaker = Callable[[Recipe, torch.nn.Module, Task, Manifest, Place], Engine]
"""Makes a worker's engine from recipe, model and task, for data of a manifest, at the worker's place."""


@dataclass
class Job:
    """All that a worker builds once and uses throughout."""

    recipe: Recipe
    folder: RunFolder
    manifest: Manifest
    place: Place
    engine: Engine
    history: History
    monitor: Client
    tracker: Tracker
    batches: Iterator[Batch]
    start_step: int
    quarantine: Quarantine
    pulse: Pulse | None = None

    @property
    def epoch_steps(self) -> float:
        """Return the optimizer steps of one pass over the training data."""
        return epoch_steps_of(self.recipe, self.manifest)

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run."""
        return self.recipe.train.total_steps(self.epoch_steps)

    def evaluation(self) -> Iterator[Batch]:
        """Return the batches of the evaluation split that fall to this worker."""
        data, place = self.recipe.data, self.place
        share = EvalShare(data.eval_split, eval_rows(self.recipe, place.world), place.rank, place.world)
        batches = eval_batches(data, self.manifest, share, place.device, self.quarantine)
        return self.counted(batches)

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Have the worker's pulse count the batches that it gets."""
        return batches if self.pulse is None else self.pulse.count(batches)


def train_worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train until the recipe's end or a stop; the same function starts, resumes and recovers a run.

    Returns:
        ``{"status": "finished" | "stopped" | "refused", ...}``; a mistake of the user's is returned, not raised,
        because Ray would restart the workers to meet it again.
    """
    return work(config, build_engine)


def work(config: Mapping[str, Any], make_engine: EngineMaker) -> dict[str, Any]:
    """Do what `train_worker` does, with an engine of the caller's making."""
    began = time.perf_counter()
    sys.setswitchinterval(SWITCH_S)
    # Of this thread and of those that it starts. A model that has nothing left to learn has gradients and moments below
    # 1e-38, with which a CPU computes ten times slower.
    torch.set_flush_denormal(True)
    place = find_place(config["runs"])
    monitor = connect(config["monitor"], place.rank)
    try:
        with contextlib.ExitStack() as resources:
            job = _build(config, place, monitor, resources, make_engine)
            facts = {"seconds": time.perf_counter() - began, "world": place.world, **_whereabouts()}
            monitor.send("ready", facts, urgent=True)
            pulse = Pulse(connect(config["monitor"], place.rank), quarantined=lambda: len(job.quarantine.problems))
            job.pulse = pulse
            resources.callback(job.pulse.stop)
            job.batches = job.counted(job.batches)
            outcome = _run(job)
            if (config["mlflow"] or {}).get("worker_closes"):
                job.tracker.close(outcome["status"])
            return outcome
    except UserError as error:
        monitor.send("refused", {"error": str(error)}, urgent=True)
        monitor.flush()
        return {"status": "refused", "error": str(error)}


def _whereabouts() -> dict[str, Any]:
    """Which process this is, on which machine, and how Ray calls that."""
    import ray

    node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"pid": os.getpid(), "node": platform.node(), "node_id": node_id, "device": device}


def _build(
    config: Mapping[str, Any], place: Place, monitor: Client, resources: contextlib.ExitStack, make_engine: EngineMaker
) -> Job:
    """Build everything and restore the newest checkpoint.

    The data pipeline starts first: its tasks come up while DeepSpeed is imported and the engine is built.
    """
    recipe = build_recipe(config["recipe"])
    folder = RunFolder(recipe.output, config["run"])
    manifest = load_data(recipe.data)
    quarantine = Quarantine(recipe.data.max_bad_fraction)
    resources.callback(_write_quarantine, quarantine, folder, place.rank)
    done = _newest_step(folder, place)
    total = recipe.train.total_steps(epoch_steps_of(recipe, manifest))
    batches = started(training_batches(recipe, manifest, place, (done, total), quarantine))
    resources.callback(batches.close)
    classes = len(manifest.classes)
    model = first_model(recipe, classes, restored=done > 0)
    engine = make_engine(recipe, model, build_task(recipe.task, classes=classes), manifest, place)
    history = _restore(engine, folder, done, monitor)
    tracker: Tracker = NullTracker()
    if place.rank == 0:
        tracker = _tracker(config, history)
        resources.callback(tracker.detach)
        history.sinks.append(lambda step, metrics: tracker.log_metrics(step, metrics, history.rows[-1]["time"]))
        history.sinks.append(partial(_tell_metrics, monitor))
    return Job(recipe, folder, manifest, place, engine, history, monitor, tracker, batches, done, quarantine)


def first_model(recipe: Recipe, classes: int, restored: bool = False) -> torch.nn.Module:
    """Return the model as training begins: drawn from the seed, then filled from ``train.init_from`` if that is set.

    Args:
        recipe: with the model, the seed and the weights to start from.
        classes: of the data.
        restored: a checkpoint follows, so the weights are not read.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, classes=classes)
    if recipe.train.init_from and not restored:
        start_from(model, open_weights(recipe.train.init_from))
    return model


def started(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """Have the first batch made from now on, in a thread; return an iterator over all."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="first-batch")
    first = pool.submit(lambda: list(itertools.islice(batches, 1)))
    pool.shutdown(wait=False)

    def iterate() -> Generator[Batch, None, None]:
        yield from first.result()
        yield from batches

    return iterate()


def training_batches(
    recipe: Recipe, manifest: Manifest, place: Place, steps: tuple[int, int], quarantine: Quarantine
) -> Iterator[Batch]:
    """Return the worker's micro-batches of the steps [first, last)."""
    share = TrainShare(
        seed=recipe.seed,
        global_batch=recipe.train.global_batch,
        micro_batch=recipe.train.micro(place.world),
        start_step=steps[0],
        stop_step=steps[1],
        rank=place.rank,
        world=place.world,
    )
    return train_batches(recipe.data, manifest, share, place.device, quarantine)


def _write_quarantine(quarantine: Quarantine, folder: RunFolder, rank: int) -> None:
    """Leave the bad samples that this worker met, with their reasons, below ``quarantine/``."""
    if quarantine.problems:
        quarantine.write(folder.location("quarantine", f"part-{rank:05d}"))


def find_place(runs: int) -> Place:
    """Find this worker's place; ``runs`` that share the machine share its cores."""
    import ray.train

    context = ray.train.get_context()
    device = torch.device("cuda", context.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    local_world = context.get_local_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (local_world * runs)))
    return Place(context.get_world_rank(), context.get_world_size(), local_world, device)


def build_engine(recipe: Recipe, model: torch.nn.Module, task: Task, manifest: Manifest, place: Place) -> Engine:
    """Return the DeepSpeed engine of a worker."""
    epoch_steps = epoch_steps_of(recipe, manifest)
    schedule = build_schedule(recipe.optim.schedule, recipe.train.total_steps(epoch_steps), epoch_steps)
    batch = BatchPlan(recipe.train.micro(place.world), recipe.train.accumulation(place.world), place.world)
    return DeepSpeedEngine(
        model,
        task,
        recipe.optim,
        schedule,
        recipe.deepspeed,
        batch,
        device=place.device,
        precision=recipe.train.precision,
    )


def _tracker(config: Mapping[str, Any], history: History) -> Tracker:
    """Return rank 0's tracker, whose record in the run's local folder begins with the metrics recorded so far."""
    handle = RunHandle.from_json(config["mlflow"]) if config["mlflow"] else None
    return open_tracker(handle, Path(config["local"]), history=history.text(), system_metrics_node="")


def _newest_step(folder: RunFolder, place: Place) -> int:
    """Return the step of the newest checkpoint that verifies, 0 for none; rank 0 chooses for all."""
    chosen = torch.zeros(1, dtype=torch.int64, device=place.device)
    if place.rank == 0 and (manifest := folder.checkpoints.newest()) is not None:
        chosen.fill_(manifest.step)
    torch.distributed.broadcast(chosen, 0)
    return int(chosen)


def _restore(engine: Engine, folder: RunFolder, step: int, monitor: Client) -> History:
    """Load the checkpoint of a step, if there is one; return the metrics recorded up to it."""
    if step == 0:
        return History()
    store = folder.checkpoints
    with store.fetch(step) as local:
        engine.load(local)
    if engine.rank == 0:
        monitor.send("resumed", {"step": step, "checkpoint": store.location(step)}, urgent=True)
    return History(store.history(step))


def _run(job: Job) -> dict[str, Any]:
    """Run the loop with its hooks, then leave behind predictions and weights."""
    training = job.recipe.train
    every = math.inf if training.eval_beside else training.eval_every
    evaluation = EvalHook(job.history, job.engine, job.evaluation, every)
    span = Span(
        start_step=job.start_step,
        total_steps=job.total_steps,
        global_batch=training.global_batch,
        accumulation=training.accumulation(job.place.world),
        steps_per_epoch=job.epoch_steps,
        seed=job.recipe.seed,
    )
    newest = partial(_newest_step, job.folder, job.place)
    beside = build_beside(job) if training.eval_beside else None
    guard = build_guard(job, evaluation, partial(_snapshot, job), partial(_saved, job), newest, beside)
    step = guard.train(_hooks(job, evaluation, beside), span)
    if step < job.total_steps:
        job.monitor.flush()
        if job.engine.sum([float(job.monitor.stop_requested())])[0] == 0:
            leave(step)
        return {"status": "stopped", "step": step, "total_steps": job.total_steps}
    figures = evaluation.latest or job.engine.evaluate(job.evaluation())
    _leave_behind(job)
    job.monitor.flush()
    return {"status": "finished", "step": step, "total_steps": job.total_steps, "evaluation": figures}


def _hooks(job: Job, evaluation: EvalHook, beside: BesideHook | None) -> list[Hook]:
    """The hooks that report on a step."""
    evaluations: list[Hook] = [evaluation] if beside is None else [beside, evaluation]
    if job.place.rank > 0:
        return evaluations
    return [partial(_progress, job), MetricsHook(job.history, job.recipe.train.log_every), *evaluations]


def _tell_metrics(monitor: Client, step: int, metrics: Mapping[str, float]) -> None:
    """Tell the driver of a recorded row: of each with an evaluation or a skipped step, of the others now and then."""
    urgent = bool(metrics.get("train/skipped_steps")) or any(key.startswith("eval/") for key in metrics)
    monitor.send("metrics", {"step": step, "metrics": dict(metrics)}, urgent=urgent)


def _progress(job: Job, info: StepInfo) -> None:
    payload = {
        "step": info.step,
        "total_steps": info.total_steps,
        "epoch": info.epoch,
        "loss": info.result.loss,
        "metrics": info.result.metrics,
        "seconds": info.seconds,
        "wait_seconds": info.wait_seconds,
        "samples": info.samples,
    }
    job.monitor.send("progress", payload, urgent=info.last)


def _saved(job: Job, step: int, url: str) -> None:
    """Tell the driver and MLflow of a new checkpoint."""
    job.monitor.send("checkpoint", {"step": step, "url": url}, urgent=True)
    job.tracker.set_tag("checkpoint_uri", url)


def _snapshot(job: Job, info: StepInfo, metrics: Mapping[str, float], number: int) -> Snapshot:
    return Snapshot(
        step=info.step,
        samples=info.step * job.recipe.train.global_batch,
        engine={"kind": type(job.engine).__name__, "zero_stage": zero_stage(job.recipe)},
        parameters=parameter_shapes(job.engine.module),
        recipe=redacted_recipe(job.recipe.model_dump(mode="json")),
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        history=job.history.text(),
        metrics=metrics,
        number=number,
    )


def parameter_shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    """Return each parameter's name and full shape, also where ZeRO-3 has partitioned it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def _leave_behind(job: Job) -> None:
    """Write this worker's predictions on the evaluation split, and the weights (rank 0) as safetensors."""
    import safetensors.torch

    _write_predictions(job)
    weights = job.engine.weights()
    if weights is not None:
        model = json.dumps(job.recipe.model.model_dump(mode="json"))
        metadata = {"format": "pt", "recipe": job.recipe.name, "model": model}
        blob = safetensors.torch.save(weights, metadata)
        job.folder.write("model.safetensors", blob)


def _write_predictions(job: Job) -> None:
    """Write ``predictions/part-<rank>.parquet``: one row a valid sample with id, label and the task's outputs."""
    import pyarrow as pa

    task = build_task(job.recipe.task, classes=len(job.manifest.classes))
    job.engine.module.eval()
    with torch.inference_mode():
        rows = pa.concat_tables([predicted(task, job.engine.module, batch) for batch in job.evaluation()])
    job.folder.write(f"predictions/part-{job.place.rank:05d}.parquet", parquet(rows))
