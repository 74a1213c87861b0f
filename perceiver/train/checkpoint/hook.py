"""The hook that saves checkpoints: when they fall due, after good evaluations, at the end and on a stop."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from perceiver.config import UserError
from perceiver.train.checkpoint.store import Snapshot
from perceiver.train.checkpoint.writer import BackgroundSaver, Cadence, Flags, exchange, refusal
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import History
from perceiver.train.loop import StepInfo

Figures = Callable[[StepInfo], Mapping[str, float]]
POLL_S = 0.02


def _no_news(step: int, url: str) -> None:
    return None


@dataclass
class News:
    """Who is told of saves, in the training thread.

    Attributes:
        saved: step and URL of a checkpoint that counts (rank 0).
        best: step and URL of the checkpoint that is the best now (rank 0).
        missed: why a checkpoint could not be saved (the rank that failed).
        counts: step of a checkpoint that all ranks know to count (every rank).
    """

    saved: Callable[[int, str], None] = _no_news
    best: Callable[[int, str], None] = _no_news
    missed: Callable[[str], None] = lambda reason: None
    counts: Callable[[int], None] = lambda step: None


@dataclass
class CheckpointHook:
    """Saves when the cadence says so, after an evaluation among the best, at the end and when asked to stop.

    Every rank holds one. A save that falls due while one is in flight is taken as soon as that has ended. A save that
    fails costs that checkpoint; after `train.checkpoint_misses` in a row, or when the store refuses, the run stops.

    Attributes:
        snapshot: what a save records, from the step, its figures and the number of the checkpoint.
        figures: what is known of the model after a step.
        wanted: whether somebody else wants a checkpoint after a step; the same on all ranks.
        started: when this process began to train, for the share of time that saves take.
    """

    engine: Engine
    saver: BackgroundSaver
    cadence: Cadence
    history: History
    snapshot: Callable[[StepInfo, Mapping[str, float], int], Snapshot]
    figures: Figures
    news: News = field(default_factory=News)
    wanted: Callable[[StepInfo], bool] = lambda info: False
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._pending, self._reason = False, ""
        self._flying: int | None = None
        self._missed = self._number = 0
        self._stalled = 0.0
        self._best: int | None = None
        self._steps: deque[float] = deque(maxlen=50)
        if self.engine.rank == 0:
            found = self.saver.known()
            self._number = max((manifest.number + 1 for manifest in found.values()), default=0)

    def __call__(self, info: StepInfo) -> None:
        began = time.perf_counter()
        self._steps.append(info.seconds)
        self._tell()
        if info.last:
            self._finish(info)
        elif self._improves(info):
            # A later step would not have these figures, so the save in flight is waited for.
            self.drain()
            self._save(info, began)
        elif self._pending or self.wanted(info) or self.cadence.due(info.step, info.completes):
            flags = exchange(self.engine, self.saver)
            self._pending = flags.busy and not flags.failed
            if not self._pending:
                self._settle(flags)
                self._save(info, began)
        self._stalled += time.perf_counter() - began

    def drain(self) -> bool:
        """Wait for the save in flight on all ranks; return whether it counts. Every rank calls this."""
        while (flags := exchange(self.engine, self.saver)).busy and not flags.failed:
            time.sleep(POLL_S)
        self._settle(flags)
        self._tell()
        return not flags.failed

    def learn(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of a checkpoint that was evaluated after it was saved (rank 0)."""
        self._tell_best(self.saver.learn(step, figures))

    def _save(self, info: StepInfo, began: float) -> None:
        self._tell()
        self.saver.start(self.engine, self.snapshot(info, self.figures(info), self._number))
        self._number += 1
        self._flying = info.step
        stall = time.perf_counter() - began
        self.cadence.saved(info.step, stall, statistics.median(self._steps))
        if self.engine.rank == 0:
            share = (self._stalled + stall) / (time.perf_counter() - self.started)
            self.history.record(info.step, {"train/checkpoint_stall_share": share})

    def _finish(self, info: StepInfo) -> None:
        """The last checkpoint of this process: nothing follows that could save it later, so it must succeed."""
        self.drain()
        self._save(info, time.perf_counter())
        if not self.drain():
            raise UserError(f"the last {self._reason}; free the store, then go on with --resume")

    def _settle(self, flags: Flags) -> None:
        """Count how the last save ended, once all ranks know it."""
        self._missed = self._missed + 1 if flags.failed else 0
        if flags.failed:
            self.saver.abandon()
            self._reason = self.saver.failure or "checkpoint was not saved by another worker, see its log"
            if self.saver.failure:
                self.news.missed(self.saver.failure)
        elif self._flying is not None:
            self.news.counts(self._flying)
        self._flying, self.saver.failure = None, ""
        if flags.refused:
            elsewhere = refusal(self.saver.store.url, "told by another worker, see its log")
            raise UserError(self.saver.refused or elsewhere)
        if self._missed >= self.saver.config.checkpoint_misses:
            raise UserError(f"{self._missed} checkpoints in a row were lost (train.checkpoint_misses): {self._reason}")

    def _improves(self, info: StepInfo) -> bool:
        """Whether this step's figures are among the best; rank 0 decides for all."""
        config = self.saver.config.keep_best
        value = self.figures(info).get(config.metric) if config and config.metric.startswith("eval/") else None
        if config is None or value is None:
            return False
        others = [m.metrics[config.metric] for m in self.saver.manifests.values() if config.metric in m.metrics]
        better = sum(not config.better(value, other) for other in others) < config.count
        return self.engine.sum([float(better and self.engine.rank == 0)])[0] > 0

    def _tell(self) -> None:
        """Pass on what the background has done; there is news on rank 0 only."""
        store = self.saver.store
        while self.saver.done:
            step, best = self.saver.done.popleft()
            self.news.saved(step, store.location(step))
            self._tell_best(best)

    def _tell_best(self, best: int | None) -> None:
        if best is not None and best != self._best:
            self._best = best
            self.news.best(best, self.saver.store.location(best))
