"""The function of each Ray Train worker: build model, engine, data, recording and hooks; train; write the results.

Ray Train calls it at the start, after a failure and with another number of workers. It always resumes from the newest
checkpoint that verifies.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray.train
import torch

from cluster.recipe.config import Recipe
from cluster.recipe.placement import this_node_cpus
from cluster.recipe.resources import worker_threads
from cluster.record.failures import is_final, one_line
from cluster.runtime.ray_internals import quiet_data_progress, rest_data_scheduler
from cluster.runtime.stages import Stages
from cluster.worker.hooks import Recording, WorkerHooks, open_recording
from cluster.worker.monitor import make_client
from cluster.worker.peers import end_start
from cluster.worker.ray_train import exit_preempted
from cluster.worker.restore import restore
from cluster.worker.results import write_predictions, write_weights
from cluster.worker.setup import Setup, WorkerRank, open_setup, where
from perceiver.config import UserError
from perceiver.export.parts import load_parts
from perceiver.export.weights import load_weights, open_weights
from perceiver.factory import build_model
from perceiver.optim.freezing import freeze
from perceiver.optim.schedules import build_schedule
from perceiver.tasks import Task, build_task, output_count
from perceiver.train.checkpoint.ledger import SampleLog
from perceiver.train.engine.deepspeed_config import BatchPlan
from perceiver.train.engine.deepspeed_engine import DeepSpeedEngine
from perceiver.train.engine.protocol import Engine
from perceiver.train.loop import Span, train
from pipelines.feed.ingest import TrainShare, train_batches
from pipelines.shards.manifest import Manifest
from pipelines.shards.quarantine import Quarantine

log = logging.getLogger(__name__)


def train_worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train until the last step of the recipe, or until a stop.

    Args:
        config: see `cluster.run.trainer.worker_config`.

    Returns:
        ``{"status": "finished" | "stopped" | "refused", ...}``; an error that a restart cannot avoid is returned, not
        raised, because Ray would restart the workers: a UserError, or see `is_final` before the first step.
    """
    began, stages = time.perf_counter(), Stages()
    stages.end("process")
    # A converged model has gradients and moments below 1e-38, which make a CPU 10 times slower.
    torch.set_flush_denormal(True)
    me = find_rank(config["runs"], config["threads"])
    monitor = make_client(config["monitor"], me.rank)
    stepped = threading.Event()
    try:
        with contextlib.ExitStack() as resources:
            # The recipe, its data, and the checkpoint to continue from.
            setup = open_setup(config, me, monitor, stages, resources)
            recipe, manifest, start, span = setup.recipe, setup.manifest, setup.start, setup.span

            # Model and engine.
            task = build_task(recipe.task, classes=len(manifest.classes))
            model = first_model(recipe, len(manifest.classes), setup.classes, restored=start.step > 0)
            engine = build_engine(recipe, model, task, span, me)
            stages.end("model and engine")
            sample_log = SampleLog()
            if start.step:
                resume(setup, engine, sample_log)
            stages.end("restore")

            # Data.
            rest_data_scheduler()
            quiet_data_progress()
            batches = training_batches(recipe, manifest, me, (span.start_step, span.total_steps), setup.quarantine)
            resources.callback(batches.close)
            stages.end("data pipeline")
            facts = {"step": start.step, "origin": start.origin, "stages": stages.seconds, "world": me.world}
            monitor.send("ready", {"seconds": time.perf_counter() - began, **facts, **where()}, urgent=True)

            # Recording and hooks.
            recording = open_recording(setup, config, resources)
            hooks = WorkerHooks(setup, engine, task, recording, sample_log, setup.first and config["on_cluster"])

            # Train, then write the results.
            step, early_stop = span.start_step, hooks.early_stop
            ended = engine.sum([float(early_stop.over(step))])[0] > 0
            if not ended:
                hooks.begin()
                counted = setup.pulse.count(batches)
                step = train(engine, counted, hooks.ordered(stepped), span, poll=hooks.flags, restore=hooks.roll_back)
            if setup.first and early_stop.ended:
                monitor.send("early_stop", {"step": step, "reason": early_stop.reason}, urgent=True)
                recording.tracker.set_tag("early_stop", early_stop.reason)
            monitor.flush()
            if step < span.total_steps and not (ended or early_stop.ended):
                if hooks.preemption.announced and engine.sum([float(monitor.stop_requested())])[0] == 0:
                    exit_preempted(step)
                recording.close("stopped")
                return {"status": "stopped", "step": step, "total_steps": span.total_steps}
            figures = write_results(setup, task, engine, hooks, recording, step)
            found = {"step": step, "total_steps": span.total_steps, "evaluation": figures}
            early = early_stop.reason if ended or early_stop.ended else ""
            return {"status": "finished", **found, "best_step": hooks.saver.best(), "early_stop": early}
    except Exception as error:
        reason = refusal_reason(error, me.rank, stepped.is_set())
        if not reason:
            raise
        monitor.send("refused", {"error": reason}, urgent=True)
        monitor.flush()
        return {"status": "refused", "error": reason}


def resume(setup: Setup, engine: Engine, sample_log: SampleLog) -> None:
    """Load the checkpoint from which the run starts; every rank calls this."""
    start = setup.start
    restore(engine, start.store, start.step)
    if setup.first:
        start.samples(sample_log)
        setup.monitor.send("resumed", {"step": start.step, "checkpoint": start.place}, urgent=True)
    end_start(start, engine, setup.me.leads)


def write_results(
    setup: Setup, task: Task, engine: Engine, hooks: WorkerHooks, recording: Recording, step: int
) -> Mapping[str, float]:
    """Write predictions and weights after the last step, and return the metrics of its evaluation."""
    folder = setup.folder
    with setup.pulse.during("results"):
        figures = hooks.evaluation.latest or engine.evaluate(hooks.evaluation_batches())
        with engine.averaged():
            write_predictions(folder, setup.me.rank, setup.me.world, task, engine, hooks.evaluation_batches())
            write_weights(folder, setup.recipe, engine, setup.classes, {"step": step, "evaluation": figures})
        recording.close("finished")
    return figures


def refusal_reason(error: Exception, rank: int, stepped: bool) -> str:
    """Return why a restart of the workers would fail in the same way; empty if it may not."""
    if isinstance(error, UserError):
        return str(error)
    if stepped or not is_final(error):
        return ""
    log.error("worker %d failed before the first step", rank, exc_info=error)
    return f"worker {rank} failed before the first step, and would fail again: {one_line(error)}"


def find_rank(runs: int, threads: int | None = None) -> WorkerRank:
    """Return this worker's rank and device, and set its number of threads.

    By default the workers of ``runs`` concurrent runs share the CPUs of their node.
    """
    context = ray.train.get_context()
    device = torch.device("cuda", context.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    local_world = context.get_local_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(worker_threads(local_world * runs, this_node_cpus(), threads))
    leads = context.get_local_rank() == 0
    return WorkerRank(context.get_world_rank(), context.get_world_size(), local_world, device, leads)


def first_model(recipe: Recipe, classes: int, names: Sequence[str] = (), restored: bool = False) -> torch.nn.Module:
    """Return the initial model: random weights by the seed, then those of ``train.init_from``, if set.

    The parameters of ``train.freeze`` are frozen.

    Args:
        recipe: with the model, the seed, ``train.init_from`` and ``train.freeze``.
        classes: number of classes of the data.
        names: their names, with which those of ``train.init_from`` are compared.
        restored: whether a checkpoint is loaded afterwards, so that ``train.init_from`` is not read.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, classes=output_count(recipe.task, classes))
    start = None if restored else recipe.train.init_from
    if isinstance(start, dict):
        load_parts(model, start, names)
    elif start:
        load_weights(model, open_weights(start), names)
    freeze(model, recipe.train.freeze)
    return model


def build_engine(recipe: Recipe, model: torch.nn.Module, task: Task, span: Span, me: WorkerRank) -> Engine:
    """Return the DeepSpeed engine of a worker."""
    training = recipe.train
    return DeepSpeedEngine(
        model,
        task,
        recipe.optim,
        build_schedule(recipe.optim.schedule, span.total_steps, span.steps_per_epoch),
        recipe.deepspeed,
        BatchPlan(training.micro(me.world), training.accumulation(me.world), me.world, training.global_batch),
        device=me.device,
        precision=training.precision,
        compile=training.compile,
        half_residual=training.bf16_residual,
        replay_every=training.replay_every,
        ema=training.ema,
    )


def training_batches(
    recipe: Recipe, manifest: Manifest, me: WorkerRank, steps: tuple[int, int], quarantine: Quarantine
) -> Any:
    """Return a generator of the worker's micro-batches for the steps [first, last)."""
    training = recipe.train
    share = TrainShare(
        seed=recipe.seed,
        global_batch=training.global_batch,
        micro_batch=training.micro(me.world),
        start_step=steps[0],
        stop_step=steps[1],
        rank=me.rank,
        world=me.world,
    )
    return train_batches(recipe.data, manifest, share, me.device, quarantine)
