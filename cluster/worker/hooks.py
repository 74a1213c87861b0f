"""The recording and the hooks of a worker, in their order, and what they ask of the training loop."""

import contextlib
import math
import platform
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cluster.recipe.config import Recipe, eval_rows, zero_stage
from cluster.recipe.memory import COPIES
from cluster.worker.blending import build_blend
from cluster.worker.evaluation import RemoteEvaluator, read_scores
from cluster.worker.monitor import ActorClient, Client
from cluster.worker.peers import newest_step, staging_store
from cluster.worker.ray_train import PreemptionHook, RayReporter
from cluster.worker.restore import restore
from cluster.worker.setup import Setup
from perceiver.tasks import Batch, Task
from perceiver.tracking.redaction import redact
from perceiver.tracking.runs import RunHandle, open_tracker
from perceiver.tracking.tracker import NullTracker, Status, Tracker
from perceiver.train.bad_loss import BadLossHook
from perceiver.train.checkpoint.hook import BackgroundSaver, CheckpointHook, EveryEpochs, Listeners, Measured
from perceiver.train.checkpoint.ledger import Ledger, SampleLog
from perceiver.train.checkpoint.memory import MemoryCheckpointHook
from perceiver.train.checkpoint.store import Snapshot
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import AsyncEvalHook, EarlyStopHook, EvalHook, History, MetricsHook
from perceiver.train.loop import Flags, Hook, StepInfo
from perceiver.train.offered_hooks import build_hooks
from perceiver.train.profiling import profiling
from perceiver.train.spikes import SpikeDetector
from pipelines.feed.ingest import EvalShare, eval_batches

LIBRARIES = ("torch", "ray", "deepspeed", "mlflow", "pyarrow", "numpy")


@dataclass(frozen=True)
class Recording:
    """Where a worker's metrics go.

    Attributes:
        handle: the MLflow run, None without one.
        tracker: of rank 0; the other ranks record nothing.
        history: the recorded metrics.
        reporter: of the evaluations and checkpoints to Ray Train.
    """

    handle: RunHandle | None
    tracker: Tracker
    history: History
    reporter: RayReporter

    def close(self, status: Status) -> None:
        """End the MLflow run, unless the driver does that."""
        if self.handle is not None and self.handle.worker_closes:
            self.tracker.close(status)


def open_recording(setup: Setup, config: Mapping[str, Any], resources: contextlib.ExitStack) -> Recording:
    """Open the trackers of the recipe (rank 0) and continue the record of the checkpoint.

    Args:
        setup: of the worker.
        config: see `cluster.run.trainer.worker_config`.
        resources: gets what is to be closed when the worker ends.

    Raises:
        TakenOverError: another driver owns the run; the process of this one must not replace its record.
    """
    setup.folder.check_owner()
    handle: RunHandle | None = config["mlflow"].value
    tracker: Tracker = NullTracker()
    if setup.first:
        local, tracking = Path(config["local"]), setup.recipe.tracking
        tracker = open_tracker(
            handle,
            local,
            history=setup.recorded,
            system_metrics_node="",
            tensorboard=tracking.tensorboard,
            wandb=tracking.wandb and tracking.wandb.request(local, setup.recipe.model_dump(mode="json")),
        )
    resources.callback(tracker.detach)
    history = History(
        setup.recorded, [tracker.log_metrics, partial(send_metrics, setup.monitor)] if setup.first else []
    )
    return Recording(handle, tracker, history, RayReporter(history, on_ray=isinstance(setup.monitor, ActorClient)))


class WorkerHooks:
    """The hooks of a worker and what they ask of the loop: `flags` is its `poll`, `roll_back` its `restore`.

    Args:
        setup: of the worker.
        engine: restored, if the run resumes.
        task: whose weights of several classifiers are estimated again (`task.blend_every`).
        recording: of the metrics.
        sample_log: of the samples of each step.
        asks: whether Ray Train is asked for notices of preemption.

    Attributes:
        evaluation: the evaluation by all workers; without epochs if evaluations are asynchronous.
        evaluations: the asynchronous evaluation, None without it.
        early_stop: the hook of `train.early_stop`.
        saver: writes checkpoints in the background.
        preemption: the notices of preemption.
    """

    def __init__(
        self, setup: Setup, engine: Engine, task: Task, recording: Recording, sample_log: SampleLog, asks: bool
    ) -> None:
        training = setup.recipe.train
        self._setup, self._engine, self._recording, self._sample_log = setup, engine, recording, sample_log
        self.evaluation = EvalHook(
            recording.history,
            engine,
            self.evaluation_batches,
            epochs=math.inf if training.eval_async else training.eval_every,
            report=recording.reporter.evaluated,
        )
        self.evaluations = build_async_evaluation(setup, recording.history)
        self.early_stop = EarlyStopHook(training.early_stop, recording.history)
        self._blend = build_blend(setup, recording.history, engine, task)
        self.preemption = PreemptionHook(asks)
        self._ledger = self._build_ledger()
        self.saver = BackgroundSaver(
            setup.folder.checkpoints,
            training,
            before=self._ledger.record if self._ledger else None,
            scores=recording.history.evaluations,
            in_use=self.evaluations.in_use if self.evaluations else tuple,
        )
        setup.pulse.saving = self.saver.busy_s
        self._checkpoints = self._build_checkpoints()
        self._in_memory = self._build_memory_checkpoints()
        self._bad_loss = self._build_bad_loss()

    def ordered(self, stepped: threading.Event) -> list[Hook]:
        """Return the hooks in the order in which they are called; the pulse knows in which of them a worker is.

        Args:
            stepped: set after the first step.
        """
        setup, training, pulse = self._setup, self._setup.recipe.train, self._setup.pulse
        monitor, history = setup.monitor, self._recording.history
        recording: list[Hook] = [partial(send_progress, monitor), MetricsHook(history, training.log_every)]
        return [
            *profiling(training.profile, setup.me.rank, setup.span.start_step, setup.folder.write),
            lambda info: stepped.set(),
            pulse.stepped,
            self._sample_log,
            pulse.mark("bad loss"),
            self._bad_loss,
            pulse.mark(),
            self.preemption,
            *(recording if setup.first else []),
            pulse.mark("hook"),
            *build_hooks(setup.recipe.hooks, setup.me.rank, setup.me.world),
            pulse.mark("evaluation"),
            *([self.evaluations] if self.evaluations else []),
            self.evaluation,
            *self._blend,
            pulse.mark("checkpoint"),
            self.early_stop,
            self._checkpoints,
            *([self._in_memory] if self._in_memory else []),
            pulse.mark(),
        ]

    def begin(self) -> None:
        """Measure what hooks need before the first step; every rank calls this."""
        for hook in self._blend:
            hook.begin()

    def flags(self) -> Flags:
        """Return the flags of this rank."""
        flags = self._checkpoints.flags()
        if self._in_memory:
            copy = self._in_memory.flags()
            flags = flags._replace(copying=copy.copying, copy_failed=copy.copy_failed)
        stop = self._setup.monitor.stop_requested() or self.preemption.announced or flags.stop
        return flags._replace(stop=stop, enough=self.early_stop.enough(), ask_cluster=self.preemption.due())

    def roll_back(self, step: int) -> None:
        """Load the newest checkpoint after a bad loss at a step; every rank calls this."""
        setup = self._setup
        with setup.pulse.during("restore"):
            target = newest_step(setup.folder.checkpoints, setup.me.rank, setup.me.device)
            restore(self._engine, setup.folder.checkpoints, target)
        if self._ledger is not None:
            self._ledger.discard(target, step)
        if setup.first:
            facts = {"step": step, "target": target, "reason": self._bad_loss.reason}
            setup.monitor.send("rolled_back", facts, urgent=True)

    def evaluation_batches(self) -> Iterator[Batch]:
        """Return this worker's batches of the evaluation split."""
        recipe, me = self._setup.recipe, self._setup.me
        share = EvalShare(recipe.data.eval_split, eval_rows(recipe, me.world), me.rank, me.world)
        batches = eval_batches(recipe.data, self._setup.manifest, share, me.device, self._setup.quarantine)
        return self._setup.pulse.count(batches)

    def _build_ledger(self) -> Ledger | None:
        setup = self._setup
        if not setup.recipe.train.ledger:
            return None
        place = setup.folder.location("ledger")
        ledger = Ledger(place, setup.me.rank, self._sample_log, setup.start.stored, setup.folder.fence)
        if setup.first:
            ledger.rewind(setup.span.start_step)
        return ledger

    def _build_checkpoints(self) -> CheckpointHook:
        setup, recording, evaluations = self._setup, self._recording, self.evaluations
        every = setup.recipe.train.checkpoint_every
        return CheckpointHook(
            self._engine,
            self.saver,
            Measured(self._engine, setup.recipe.cluster.mtbf_hours * 3600, setup.span.start_step)
            if every == "auto"
            else EveryEpochs(every),
            recording.history,
            snapshot=self._snapshot,
            figures=self.evaluation.figures,
            listeners=Listeners(
                saved=partial(announce_saved, setup.monitor, recording.tracker, evaluations),
                best=lambda step, url: recording.tracker.set_tag("best_checkpoint_uri", url),
                missed=self._missed,
                committed=partial(note_committed, self._sample_log, recording.reporter),
            ),
            wanted=evaluations.wanted if evaluations else lambda info: False,
        )

    def _build_memory_checkpoints(self) -> MemoryCheckpointHook | None:
        setup, training = self._setup, self._setup.recipe.train
        if training.checkpoint_memory_every is None or not setup.peers:
            return None
        return MemoryCheckpointHook(
            self._engine,
            staging_store(setup.folder),
            training.checkpoint_memory_every,
            list(setup.peers),
            history=self._recording.history,
            log_every=training.log_every,
            copies=COPIES,
            complete=setup.start.save,
            snapshot=lambda info: self._snapshot(info, {}, 0),
            samples=lambda step: self._sample_log.table(0, step),
            failed=self._missed,
        )

    def _build_bad_loss(self) -> BadLossHook:
        setup, training, spikes = self._setup, self._setup.recipe.train, self._setup.spikes
        if spikes is not None and training.on_spike == "skip":
            self._engine.refuse = spikes.is_spike

        def keep_samples(first_step: int, last_step: int) -> None:
            name = f"bad-loss/steps-{first_step + 1:08d}-{last_step:08d}/rank-{setup.me.rank:05d}.parquet"
            setup.folder.write(name, self._sample_log.table(first_step, last_step))

        def last_checkpoint() -> int | None:
            self._checkpoints.drain()
            return newest_step(setup.folder.checkpoints, setup.me.rank, setup.me.device) or None

        history = self._recording.history
        return BadLossHook(
            training.on_bad_loss,
            training.bad_loss_limit,
            history,
            keep_samples,
            last_checkpoint,
            training.on_spike,
            spikes,
        )

    def _snapshot(self, info: StepInfo, metrics: Mapping[str, float], number: int) -> Snapshot:
        return take_snapshot(
            self._setup.recipe, self._engine, self._recording.history, self._setup.spikes, info, metrics, number
        )

    def _missed(self, reason: str) -> None:
        self._setup.monitor.send("missed", {"reason": reason}, urgent=True)


def build_async_evaluation(setup: Setup, history: History) -> AsyncEvalHook | None:
    """Return the hook of `train.eval_async`, None without it; rank 0's hook requests evaluations from the driver."""
    training, monitor, span = setup.recipe.train, setup.monitor, setup.span
    if not training.eval_async:
        return None
    evaluator = RemoteEvaluator(monitor) if setup.first and isinstance(monitor, ActorClient) else None
    return AsyncEvalHook(
        history,
        training.eval_every,
        evaluator,
        stop_requested=monitor.stop_requested,
        start_step=span.start_step,
        steps_per_epoch=span.steps_per_epoch,
        scored=read_scores(setup.folder) if evaluator is not None and span.start_step else {},
    )


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
