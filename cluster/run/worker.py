"""The function of each Ray Train worker: build model, engine, data, recording and hooks; train; write the results.

Ray Train calls it at the start, after a failure and with another number of workers. It always resumes from the newest
checkpoint that verifies.
"""

import contextlib
import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from cluster.predict.outputs import parquet, predicted
from cluster.recipe.config import Recipe, build_recipe, eval_rows, zero_stage
from cluster.recipe.memory import COPIES
from cluster.recipe.targets import class_names, with_targets
from cluster.record.failures import is_final, one_line
from cluster.record.run_folder import WEIGHTS, RunFolder
from cluster.run.evaluation import RemoteEvaluator, build_blend, first_batches, read_scores
from cluster.run.monitor import ActorClient, Client, make_client
from cluster.run.peers import Start, connect, end_start, find_start, staging_store
from cluster.run.watchdog import Pulse
from cluster.runtime.ray_internals import quiet_data_progress, rest_data_scheduler
from cluster.runtime.stages import Stages
from perceiver.config import UserError
from perceiver.export.parts import load_parts
from perceiver.export.weights import load_weights, open_weights
from perceiver.factory import build_model
from perceiver.optim.freezing import freeze
from perceiver.optim.schedules import build_schedule
from perceiver.tasks import Batch, Task, build_task, output_count
from perceiver.tracking.redaction import redact
from perceiver.tracking.runs import RunHandle, open_tracker
from perceiver.tracking.tracker import NullTracker, Tracker
from perceiver.train.bad_loss import BadLossHook
from perceiver.train.checkpoint.hook import BackgroundSaver, CheckpointHook, EveryEpochs, Listeners, Measured
from perceiver.train.checkpoint.ledger import Ledger, SampleLog
from perceiver.train.checkpoint.memory import MemoryCheckpointHook, Peer
from perceiver.train.checkpoint.store import CheckpointStore, Snapshot
from perceiver.train.engine.deepspeed_config import BatchPlan
from perceiver.train.engine.deepspeed_engine import DeepSpeedEngine
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import AsyncEvalHook, EarlyStopHook, EvalHook, History, MetricsHook
from perceiver.train.loop import Flags, Hook, Span, StepInfo, train
from perceiver.train.offered_hooks import build_hooks
from perceiver.train.profiling import profiling
from perceiver.train.spikes import SpikeDetector
from pipelines.feed.ingest import EvalShare, TrainShare, eval_batches, load_data, train_batches
from pipelines.shards.manifest import Manifest
from pipelines.shards.quarantine import Quarantine

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "ray", "deepspeed", "mlflow", "pyarrow", "numpy")
ASK_S = 2.0
"""Seconds between two requests for preemption notices."""


@dataclass(frozen=True)
class WorkerRank:
    """The rank and device of this worker.

    Attributes:
        rank: rank among all workers.
        world: number of workers.
        local_world: number of workers on this machine.
        device: device of the model.
        leads: whether it is the first worker of its node.
    """

    rank: int
    world: int
    local_world: int
    device: torch.device
    leads: bool = True


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
    me = find_rank(config["runs"])
    first = me.rank == 0
    monitor = make_client(config["monitor"], me.rank)
    stepped = threading.Event()
    try:
        with contextlib.ExitStack() as resources:
            # The recipe, its data, and the checkpoint to continue from.
            recipe = build_recipe(config["recipe"].value)
            training = recipe.train
            if training.replay_every:  # torch's deterministic algorithms on GPUs require it
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            folder = RunFolder(recipe.output, config["run"], config["fence"])
            folder.check_owner()
            quarantine = Quarantine(recipe.data.max_bad_fraction)
            resources.callback(write_quarantine, quarantine, folder, me)
            where = _where()
            monitor.send("started", where, urgent=True)
            pulse = Pulse(
                make_client(config["monitor"], me.rank),
                recipe.cluster.hang_s,
                recipe.cluster.hang_long_s,
                quarantined=lambda: len(quarantine.problems),
            )
            resources.callback(pulse.stop)
            manifest = load_data(recipe.data)
            recipe = with_targets(recipe, manifest)
            samples, classes = manifest.split(recipe.data.train_split).samples, len(manifest.classes)
            stages.end("recipe and data set")
            peers = connect(config["holders"])
            start = find_start(folder, peers, me.rank, me.leads, me.device)
            stages.end("choice of checkpoint")
            span = Span(
                start_step=start.step,
                total_steps=max(start.step, training.total_steps(samples)),
                global_batch=training.global_batch,
                accumulation=training.accumulation(me.world),
                steps_per_epoch=samples / training.global_batch,
                seed=recipe.seed,
            )
            resumed = span.start_step > 0

            # Model and engine.
            task = build_task(recipe.task, classes=classes)
            model = first_model(recipe, classes, class_names(recipe, manifest), restored=resumed)
            engine = build_engine(recipe, model, task, span, me)
            stages.end("model and engine")
            sample_log = SampleLog()
            recorded = start.store.history(start.step) if resumed else ""
            spikes = build_spikes(recipe, start)
            if resumed:
                restore(engine, start.store, start.step)
                if first:
                    start.samples(sample_log)
                    monitor.send("resumed", {"step": start.step, "checkpoint": start.place}, urgent=True)
                end_start(start, engine, me.leads)
            stages.end("restore")

            # Data.
            rest_data_scheduler()
            quiet_data_progress()
            batches = training_batches(recipe, manifest, me, (span.start_step, span.total_steps), quarantine)
            resources.callback(batches.close)
            stages.end("data pipeline")
            facts = {"step": start.step, "origin": start.origin, "stages": stages.seconds, "world": me.world}
            monitor.send("ready", {"seconds": time.perf_counter() - began, **facts, **where}, urgent=True)

            def evaluation_batches() -> Iterator[Batch]:
                return pulse.count(evaluation_share(recipe, manifest, me, quarantine))

            def batches_of(split: str) -> Iterator[Batch]:
                place = (me.rank, me.world, me.device)
                return pulse.count(first_batches(recipe, manifest, *place, quarantine, split))

            # Recording. The process of a driver that was taken over must not replace the record of the next one.
            folder.check_owner()
            handle: RunHandle | None = config["mlflow"].value
            tracker: Tracker = NullTracker()
            if first:
                local, tracking = Path(config["local"]), recipe.tracking
                tracker = open_tracker(
                    handle,
                    local,
                    history=recorded,
                    system_metrics_node="",
                    tensorboard=tracking.tensorboard,
                    wandb=tracking.wandb and tracking.wandb.request(local, recipe.model_dump(mode="json")),
                )
            resources.callback(tracker.detach)
            history = History(recorded, [tracker.log_metrics, partial(send_metrics, monitor)] if first else [])
            reporter = RayReporter(history, on_ray=isinstance(monitor, ActorClient))

            # Hooks.
            evaluation = EvalHook(
                history,
                engine,
                evaluation_batches,
                epochs=math.inf if training.eval_async else training.eval_every,
                report=reporter.evaluated,
            )
            evaluations = build_async_evaluation(recipe, folder, history, monitor, span, me)
            early_stop = EarlyStopHook(training.early_stop, history)
            blend = build_blend(recipe, history, engine, task, batches_of)
            ledger = (
                Ledger(folder.location("ledger"), me.rank, sample_log, start.stored, folder.fence)
                if training.ledger
                else None
            )
            if ledger is not None and first:
                ledger.rewind(span.start_step)
            saver = BackgroundSaver(
                folder.checkpoints,
                training,
                before=ledger.record if ledger else None,
                scores=history.evaluations,
                in_use=evaluations.in_use if evaluations else tuple,
            )
            pulse.saving = saver.busy_s
            every = training.checkpoint_every
            checkpoints = CheckpointHook(
                engine,
                saver,
                Measured(engine, recipe.cluster.mtbf_hours * 3600, span.start_step)
                if every == "auto"
                else EveryEpochs(every),
                history,
                snapshot=partial(take_snapshot, recipe, engine, history, spikes),
                figures=evaluation.figures,
                listeners=Listeners(
                    saved=partial(announce_saved, monitor, tracker, evaluations),
                    best=lambda step, url: tracker.set_tag("best_checkpoint_uri", url),
                    missed=lambda reason: monitor.send("missed", {"reason": reason}, urgent=True),
                    committed=partial(note_committed, sample_log, reporter),
                ),
                wanted=evaluations.wanted if evaluations else lambda info: False,
            )

            in_memory = build_memory_checkpoints(
                recipe,
                engine,
                staging_store(folder),
                peers,
                history,
                complete=start.save,
                snapshot=lambda info: take_snapshot(recipe, engine, history, spikes, info, {}, 0),
                samples=lambda step: sample_log.table(0, step),
                failed=lambda reason: monitor.send("missed", {"reason": reason}, urgent=True),
            )

            def last_checkpoint() -> int | None:
                checkpoints.drain()
                return newest_step(folder.checkpoints, me) or None

            def keep_samples(first_step: int, last_step: int) -> None:
                name = f"bad-loss/steps-{first_step + 1:08d}-{last_step:08d}/rank-{me.rank:05d}.parquet"
                folder.write(name, sample_log.table(first_step, last_step))

            if spikes is not None and training.on_spike == "skip":
                engine.refuse = spikes.is_spike
            bad_loss = BadLossHook(
                training.on_bad_loss,
                training.bad_loss_limit,
                history,
                keep_samples,
                last_checkpoint,
                training.on_spike,
                spikes,
            )
            preemption = PreemptionHook(asks=first and config["on_cluster"])
            recording: list[Hook] = (
                [partial(send_progress, monitor), MetricsHook(history, training.log_every)] if first else []
            )
            asynchronous: list[Hook] = [evaluations] if evaluations else []
            hooks: list[Hook] = [
                *profiling(training.profile, me.rank, span.start_step, folder.write),
                lambda info: stepped.set(),
                pulse.stepped,
                sample_log,
                pulse.mark("bad loss"),
                bad_loss,
                pulse.mark(),
                preemption,
                *recording,
                pulse.mark("hook"),
                *build_hooks(recipe.hooks, me.rank, me.world),
                pulse.mark("evaluation"),
                *asynchronous,
                evaluation,
                *blend,
                pulse.mark("checkpoint"),
                early_stop,
                checkpoints,
                *([in_memory] if in_memory else []),
                pulse.mark(),
            ]

            def poll() -> Flags:
                stop = monitor.stop_requested() or preemption.announced
                flags = checkpoints.flags()
                if in_memory:
                    copy = in_memory.flags()
                    flags = flags._replace(copying=copy.copying, copy_failed=copy.copy_failed)
                return flags._replace(stop=stop or flags.stop, enough=early_stop.enough(), ask_cluster=preemption.due())

            def roll_back(step: int) -> None:
                with pulse.during("restore"):
                    target = newest_step(folder.checkpoints, me)
                    restore(engine, folder.checkpoints, target)
                if ledger is not None:
                    ledger.discard(target, step)
                if first:
                    facts = {"step": step, "target": target, "reason": bad_loss.reason}
                    monitor.send("rolled_back", facts, urgent=True)

            # Train, then write the results.
            ended = engine.sum([float(early_stop.over(span.start_step))])[0] > 0
            if ended:
                step = span.start_step
            else:
                for measures in blend:
                    measures.begin()
                step = train(engine, pulse.count(batches), hooks, span, poll=poll, restore=roll_back)
            if first and early_stop.ended:
                monitor.send("early_stop", {"step": step, "reason": early_stop.reason}, urgent=True)
                tracker.set_tag("early_stop", early_stop.reason)
            monitor.flush()
            if step < span.total_steps and not (ended or early_stop.ended):
                if preemption.announced and engine.sum([float(monitor.stop_requested())])[0] == 0:
                    exit_preempted(step)
                if handle is not None and handle.worker_closes:
                    tracker.close("stopped")
                return {"status": "stopped", "step": step, "total_steps": span.total_steps}
            with pulse.during("results"):
                figures = evaluation.latest or engine.evaluate(evaluation_batches())
                with engine.averaged():
                    write_predictions(folder, me, task, engine, evaluation_batches())
                    facts = {"step": step, "evaluation": figures}
                    write_weights(folder, recipe, engine, class_names(recipe, manifest), facts)
                if handle is not None and handle.worker_closes:
                    tracker.close("finished")
            found = {"step": step, "total_steps": span.total_steps, "evaluation": figures, "best_step": saver.best()}
            early = early_stop.reason if ended or early_stop.ended else ""
            return {"status": "finished", **found, "early_stop": early}
    except Exception as error:
        reason = refusal_reason(error, me.rank, stepped.is_set())
        if not reason:
            raise
        monitor.send("refused", {"error": reason}, urgent=True)
        monitor.flush()
        return {"status": "refused", "error": reason}


def refusal_reason(error: Exception, rank: int, stepped: bool) -> str:
    """Return why a restart of the workers would fail in the same way; empty if it may not."""
    if isinstance(error, UserError):
        return str(error)
    if stepped or not is_final(error):
        return ""
    log.error("worker %d failed before the first step", rank, exc_info=error)
    return f"worker {rank} failed before the first step, and would fail again: {one_line(error)}"


def find_rank(runs: int) -> WorkerRank:
    """Return this worker's rank and device, and set its number of threads; ``runs`` concurrent runs share the cores."""
    context = ray.train.get_context()
    device = torch.device("cuda", context.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    local_world = context.get_local_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (local_world * runs)))
    leads = context.get_local_rank() == 0
    return WorkerRank(context.get_world_rank(), context.get_world_size(), local_world, device, leads)


def newest_step(store: CheckpointStore, me: WorkerRank) -> int:
    """Return the step of the newest checkpoint that verifies, 0 for none; rank 0 decides for all ranks."""
    chosen = torch.zeros(1, dtype=torch.int64, device=me.device)
    if me.rank == 0 and (manifest := store.newest()) is not None:
        chosen.fill_(manifest.step)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(chosen, 0)
    return int(chosen)


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


def restore(engine: Engine, store: CheckpointStore, step: int) -> None:
    """Load the checkpoint of a step; every rank calls this.

    Raises:
        UserError: its state contains more updates than steps. It may have fewer, as bad losses make none.
    """
    with store.fetch(step) as local:
        updates = engine.load(local)
    if updates > step:
        raise UserError(f"{store.location(step)}: its shards are of step {updates}; take another checkpoint")


def build_spikes(recipe: Recipe, start: Start) -> SpikeDetector | None:
    """Return the detector of `train.on_spike` with the losses of the checkpoint, None without the key."""
    training = recipe.train
    if training.on_spike is None:
        return None
    losses = start.store.manifest(start.step).recent_losses if start.step else ()
    return SpikeDetector(training.spike_window, training.spike_factor, losses)


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


def evaluation_share(recipe: Recipe, manifest: Manifest, me: WorkerRank, quarantine: Quarantine) -> Iterator[Batch]:
    """Return this worker's batches of the evaluation split."""
    share = EvalShare(recipe.data.eval_split, eval_rows(recipe, me.world), me.rank, me.world)
    return eval_batches(recipe.data, manifest, share, me.device, quarantine)


def build_async_evaluation(
    recipe: Recipe, folder: RunFolder, history: History, monitor: Client, span: Span, me: WorkerRank
) -> AsyncEvalHook | None:
    """Return the hook of `train.eval_async`, None without it; rank 0's hook requests evaluations from the driver."""
    if not recipe.train.eval_async:
        return None
    evaluator = RemoteEvaluator(monitor) if me.rank == 0 and isinstance(monitor, ActorClient) else None
    return AsyncEvalHook(
        history,
        recipe.train.eval_every,
        evaluator,
        stop_requested=monitor.stop_requested,
        start_step=span.start_step,
        steps_per_epoch=span.steps_per_epoch,
        scored=read_scores(folder) if evaluator is not None and span.start_step else {},
    )


def build_memory_checkpoints(
    recipe: Recipe,
    engine: Engine,
    staging: CheckpointStore,
    peers: Sequence[Peer],
    history: History,
    **more: Any,
) -> MemoryCheckpointHook | None:
    """Return the hook of `train.checkpoint_memory_every`, None without it; `more` are attributes of the hook."""
    every = recipe.train.checkpoint_memory_every
    if every is None or not peers:
        return None
    log_every = recipe.train.log_every
    return MemoryCheckpointHook(
        engine, staging, every, list(peers), history=history, log_every=log_every, copies=COPIES, **more
    )


class RayReporter:
    """Reports evaluations and committed checkpoints to Ray Train, for `Result`, the dashboard and Tune.

    Every rank reports equally often, in the same order; rank 0's metrics count. Nothing is uploaded, and a resumed run
    reads nothing that Ray Train stores.

    Args:
        history: the recorded metrics.
        on_ray: whether this is a worker of a group; a worker in the driver's process reports nothing.
    """

    def __init__(self, history: History, on_ray: bool) -> None:
        self.history, self.on_ray = history, on_ray

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Report an evaluation."""
        if self.on_ray:
            ray.train.report({"step": step, **figures})

    def committed(self, step: int, url: str) -> None:
        """Report a committed checkpoint by reference, with the metrics of the last evaluation."""
        if not self.on_ray:
            return
        scores = self.history.evaluations()
        metrics = {"step": step, "checkpoint_uri": url, **(scores[max(scores)] if scores else {})}
        storage: Any = ray.train.get_context().get_storage()
        path = f"{storage.experiment_fs_path}/step-{step:08d}"  # written by `cluster.run.trainer.keep_reference`
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint(path, storage.storage_filesystem),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )


class PreemptionHook:
    """Asks Ray Train periodically whether a node of the group is about to be preempted; all ranks ask together.

    Args:
        asks: whether this rank decides when to ask.

    Attributes:
        announced: whether a node is about to be preempted. The workers then save, and Ray Train restarts the group.
    """

    def __init__(self, asks: bool) -> None:
        self.asks, self.announced = asks and hasattr(ray.train, "get_preemption_info"), False
        self._asked = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time to ask."""
        return self.asks and time.monotonic() - self._asked > ASK_S

    def __call__(self, info: StepInfo) -> None:
        if info.flags.ask_cluster:
            self._asked = time.monotonic()
            self.announced = ray.train.get_preemption_info() is not None


def exit_preempted(step: int) -> None:
    """Exit this worker, so that Ray Train restarts the group on the remaining nodes.

    Raises:
        RayActorError: always; Ray Train counts it as a preemption, not towards `cluster.max_failures`.
    """
    from ray.exceptions import RayActorError

    raise RayActorError(error_msg=f"a node is about to be preempted, step {step} is saved", preempted=True)


def take_snapshot(
    recipe: Recipe,
    engine: Engine,
    history: History,
    spikes: SpikeDetector | None,
    info: StepInfo,
    metrics: Mapping[str, float],
    number: int,
) -> Snapshot:
    """Return the metadata of a checkpoint."""
    return Snapshot(
        step=info.step,
        samples=info.step * recipe.train.global_batch,
        engine={"kind": type(engine).__name__, "zero_stage": zero_stage(recipe)},
        parameters=parameter_shapes(engine.module),
        recipe=redact(recipe.model_dump(mode="json")),
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        history=history.text(),
        metrics=metrics,
        number=number,
        recent_losses=spikes.losses if spikes is not None else (),
    )


def parameter_shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    """Return each parameter's full shape by name, also if ZeRO-3 has partitioned it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def note_committed(sample_log: SampleLog, reporter: RayReporter, step: int, url: str) -> None:
    """Drop the sample ids before a committed checkpoint, and report it to Ray Train; every rank calls this."""
    sample_log.forget(step)
    reporter.committed(step, url)


def announce_saved(monitor: Client, tracker: Tracker, evaluations: AsyncEvalHook | None, step: int, url: str) -> None:
    """Notify the driver, MLflow and the asynchronous evaluation of a committed checkpoint (rank 0)."""
    monitor.send("checkpoint", {"step": step, "url": url}, urgent=True)
    tracker.set_tag("checkpoint_uri", url)
    if evaluations is not None:
        evaluations.saved(step)


def send_metrics(monitor: Client, step: int, metrics: Mapping[str, float], time_s: float) -> None:
    """Send a recorded row to the driver: each with an evaluation or a skipped step, others at a limited rate."""
    urgent = bool(metrics.get("train/skipped_steps")) or any(key.startswith("eval/") for key in metrics)
    monitor.send("metrics", {"step": step, "metrics": dict(metrics)}, urgent=urgent)


def send_progress(monitor: Client, info: StepInfo) -> None:
    """Send the progress of a step to the driver."""
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
    monitor.send("progress", payload, urgent=info.last)


def write_quarantine(quarantine: Quarantine, folder: RunFolder, me: WorkerRank) -> None:
    """Write this worker's bad samples, with their reasons, to ``quarantine/``."""
    if quarantine.problems:
        folder.check_owner()
        quarantine.write(folder.location("quarantine", f"part-{me.rank:05d}"))


def write_predictions(folder: RunFolder, me: WorkerRank, task: Task, engine: Engine, batches: Iterator[Batch]) -> None:
    """Write ``predictions/part-<rank>.parquet``: one row per valid sample with id, label and the task's outputs."""
    import pyarrow as pa

    engine.module.eval()
    with torch.inference_mode():
        rows = pa.concat_tables([predicted(task, engine.module, batch) for batch in batches])
    folder.write(f"predictions/part-{me.rank:05d}.parquet", parquet(rows))
    if me.rank == 0:
        folder.remove_parts("predictions", me.world)


def write_weights(
    folder: RunFolder, recipe: Recipe, engine: Engine, classes: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write ``model.safetensors`` (rank 0; every rank calls this).

    Args:
        folder: of the run.
        recipe: with the model.
        engine: with the weights.
        classes: names of the classes.
        facts: step and evaluation of the weights, which run.json has only until the run is resumed.
    """
    import safetensors.torch

    weights = engine.weights()
    if weights is not None:
        model = json.dumps(recipe.model.model_dump(mode="json"))
        known = {"classes": json.dumps(list(classes)), "facts": json.dumps(dict(facts))}
        metadata = {"format": "pt", "recipe": recipe.name, "model": model, **known}
        folder.write(WEIGHTS, safetensors.torch.save(weights, metadata))


def _where() -> dict[str, Any]:
    """Return this process, its machine, its node in Ray and its device."""
    on_ray = ray.is_initialized()
    node_id = ray.get_runtime_context().get_node_id() if on_ray else ""
    ip = ray.util.get_node_ip_address() if on_ray else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"pid": os.getpid(), "node": platform.node(), "node_id": node_id, "ip": ip, "device": device}
