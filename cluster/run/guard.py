"""What keeps a run from being lost: checkpoints, the ledger of samples, and care for a loss that is no number.

The parts are the training room's; here they are told of the recipe, the run's folder, the driver and MLflow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.run.evaluation import Asker, read_scores
from cluster.run.monitor import MonitorClient
from cluster.runtime.drain import announced
from perceiver.train.bad_loss import BadLossHook, RollBack
from perceiver.train.checkpoint.evaluation import BesideHook
from perceiver.train.checkpoint.hook import CheckpointHook, News
from perceiver.train.checkpoint.ledger import Ledger, SampleLog
from perceiver.train.checkpoint.store import Snapshot
from perceiver.train.checkpoint.writer import BackgroundSaver, EveryEpochs, Measured
from perceiver.train.hooks import EvalHook
from perceiver.train.loop import Hook, Span, StepInfo, train

if TYPE_CHECKING:
    from cluster.run.worker import Job

BEST_TAG = "best_checkpoint_uri"

Snapshots = Callable[[StepInfo, Mapping[str, float], int], Snapshot]


@dataclass
class Guard:
    """The hooks of a worker that make its run safe, and the loop around the loop that a roll-back needs.

    Attributes:
        job: what the worker has built.
        samples: remembers the sample ids of the last steps.
        bad_loss, checkpoints: the hooks before and after those that report.
        ledger: None if the recipe wants none.
        newest: the step of the newest checkpoint that verifies, 0 for none; every rank calls it.
    """

    job: "Job"
    samples: SampleLog
    bad_loss: BadLossHook
    checkpoints: CheckpointHook
    ledger: Ledger | None
    newest: Callable[[], int]

    def train(self, hooks: Sequence[Hook], span: Span) -> int:
        """Train with these hooks between those of the guard; return the optimizer steps done."""
        every: list[Hook] = [self.samples, self.bad_loss, *hooks, self.checkpoints]
        while True:
            try:
                return train(self.job.engine, self.job.batches, every, span, self._stop_requested)
            except RollBack as back:
                self._restore(back.step)
                span = replace(span, start_step=back.step)

    def _stop_requested(self) -> bool:
        """A store that refuses, a node that is drained or has joined: they end the loop at the next step."""
        refused, monitor = bool(self.checkpoints.saver.refused), self.job.monitor
        return monitor.stop_requested() or monitor.resize_requested() or refused or announced() is not None

    def _restore(self, step: int) -> None:
        """Take the weights of the newest checkpoint; the batches are already behind the step that went wrong."""
        target, job = self.newest(), self.job
        store = job.folder.checkpoints
        with store.fetch(target) as local:
            job.engine.load(local)
        if self.ledger is not None:
            self.ledger.void(target, step)
        if job.engine.rank == 0:
            job.monitor.send("rolled_back", {"step": step, "target": target}, urgent=True)


def build_beside(job: "Job") -> BesideHook:
    """Build the hook that has checkpoints evaluated beside training; rank 0's can ask the driver."""
    monitor = job.monitor
    evaluator = Asker(monitor) if job.place.rank == 0 and isinstance(monitor, MonitorClient) else None
    return BesideHook(job.history, job.recipe.train.eval_every, evaluator, stop_requested=monitor.stop_requested)


def build_guard(
    job: "Job",
    evaluation: EvalHook,
    snapshot: Snapshots,
    saved: Callable[[int, str], None],
    newest: Callable[[], int],
    beside: BesideHook | None = None,
) -> Guard:
    """Build a worker's guard from its job; ``saved`` is told of each checkpoint that counts."""
    training, samples = job.recipe.train, SampleLog()
    ledger = None
    if training.ledger:
        ledger = Ledger(job.folder.location("ledger"), job.place.rank, samples, job.start_step)
        if job.place.rank == 0:
            ledger.rewind(job.start_step)
    saver = BackgroundSaver(job.folder.checkpoints, training, before=ledger.record if ledger else None)
    news = News(saved, partial(_tell_best, job), partial(_tell_missed, job), samples.forget)
    every = training.checkpoint_every
    mtbf_s = job.recipe.cluster.mtbf_hours * 3600
    cadence = Measured(job.engine, mtbf_s, job.start_step) if every == "auto" else EveryEpochs(every)
    hook = CheckpointHook(job.engine, saver, cadence, job.history, snapshot, evaluation.figures, news)
    if beside is not None:
        _join(job, hook, beside)

    def last_checkpoint() -> int | None:
        hook.drain()
        return newest() or None

    keep = partial(_keep_samples, job, samples)
    bad_loss = BadLossHook(training.on_bad_loss, training.bad_loss_limit, job.history, keep, last_checkpoint)
    return Guard(job, samples, bad_loss, hook, ledger, newest)


def _join(job: "Job", hook: CheckpointHook, beside: BesideHook) -> None:
    """Have checkpoints saved where evaluations are due, kept until they are evaluated, and judged by their figures."""
    hook.wanted = beside.wanted
    if beside.evaluator is None:
        return
    told = hook.news.saved

    def saved(step: int, url: str) -> None:
        told(step, url)
        beside.saved(step)

    hook.news = replace(hook.news, saved=saved)
    hook.saver.holds, beside.learn = beside.holds, hook.learn
    if job.start_step:
        beside.resume(job.start_step, job.epoch_steps, read_scores(job.folder))


def _tell_best(job: "Job", step: int, url: str) -> None:
    job.tracker.set_tag(BEST_TAG, url)


def _tell_missed(job: "Job", reason: str) -> None:
    job.monitor.send("missed", {"reason": reason}, urgent=True)


def _keep_samples(job: "Job", samples: SampleLog, first: int, last: int) -> None:
    """Leave this worker's sample ids of the steps (first, last] below ``bad-loss/``."""
    name = f"bad-loss/steps-{first + 1:08d}-{last:08d}/rank-{job.place.rank:05d}.parquet"
    job.folder.write(name, samples.table(first, last))
