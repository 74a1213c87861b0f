"""What is recorded after a step: training metrics and evaluations. Each hook takes one ``StepInfo``.

Checkpoints are in `perceiver.train.checkpoint.hook`, the policy for a bad loss in `perceiver.train.bad_loss`.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from perceiver.tasks import Batch
from perceiver.train.engine.protocol import Engine
from perceiver.train.loop import StepInfo

log = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long the last step waits for evaluations in other processes."""

Sink = Callable[[int, Mapping[str, float], float], None]
"""Takes the step, the metrics and the time, in seconds since the epoch, of a recorded row."""


class History:
    """The recorded metrics of a run: rows in memory, passed to sinks, saved with each checkpoint.

    Args:
        text: rows recorded so far, as JSON lines.
        sinks: called with each new row.

    Attributes:
        rows: ``{"step": ..., "time": ..., metric: value, ...}``, oldest first.
        spent_s: seconds that recording has taken from the steps.
    """

    def __init__(self, text: str = "", sinks: Sequence[Sink] = ()) -> None:
        self.rows: list[dict[str, float]] = [json.loads(line) for line in text.splitlines() if line]
        self.sinks = tuple(sinks)
        self.spent_s = 0.0
        self._evaluations: dict[int, dict[str, float]] = {}
        for row in self.rows:
            self._note(int(row["step"]), row)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one row, ``{"step": step, "time": now, **metrics}``, and pass it to every sink."""
        began = time.perf_counter()
        now = time.time()
        self.rows.append({"step": step, "time": now, **metrics})
        self._note(step, metrics)
        for sink in self.sinks:
            sink(step, metrics, now)
        self.spent_s += time.perf_counter() - began

    def text(self) -> str:
        """Return all rows as JSON lines."""
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Return the figures of all evaluations by step, under their names with ``eval/``."""
        return self._evaluations

    def _note(self, step: int, metrics: Mapping[str, float]) -> None:
        if figures := {key: value for key, value in metrics.items() if key.startswith("eval/")}:
            self._evaluations.setdefault(step, {}).update(figures)


class MetricsHook:
    """Records the mean of the training metrics over each window of ``steps`` steps, and what share recording takes."""

    def __init__(self, history: History, steps: int) -> None:
        self.history, self.steps = history, steps
        self.window: list[StepInfo] = []
        self.began = time.perf_counter()

    def __call__(self, info: StepInfo) -> None:
        self.window.append(info)
        if info.step % self.steps == 0 or info.last:
            share = self.history.spent_s / (time.perf_counter() - self.began)
            self.history.record(info.step, {**window_metrics(self.window), "train/recording_share": share})
            self.window = []


def window_metrics(window: list[StepInfo]) -> dict[str, float]:
    """Summarise some consecutive steps: means of the task's metrics, throughput, share of time waiting for data."""
    seconds = sum(info.seconds for info in window)
    last = window[-1].result
    metrics = {f"train/{key}": _mean([i.result.metrics[key] for i in window]) for key in last.metrics}
    metrics["train/loss"] = _mean([info.result.loss for info in window])
    metrics["train/lr"] = last.lr
    if last.grad_norm is not None:
        metrics["train/grad_norm"] = last.grad_norm
    metrics["train/epoch"] = window[-1].epoch
    metrics["train/samples_per_s"] = sum(info.samples for info in window) / seconds
    metrics["train/data_wait"] = sum(info.wait_seconds for info in window) / seconds
    metrics["train/skipped_steps"] = float(sum(info.result.skipped for info in window))
    return metrics


def _mean(values: list[float]) -> float:
    """The mean of those that are numbers; NaN if none is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


class EvalHook:
    """Evaluates between two steps, after each ``epochs`` epochs and at the end. Every rank has one.

    Args:
        history: where the figures are recorded.
        engine: evaluates.
        batches: return this rank's batches of the evaluation split.
        epochs: between two evaluations; infinite: only at the end.
        report: called on every rank after each evaluation, with the step and the figures.

    Attributes:
        latest: the figures of the last evaluation.
        latest_step: its step; -1 before the first.
    """

    def __init__(
        self,
        history: History,
        engine: Engine,
        batches: Callable[[], Iterable[Batch]],
        epochs: float,
        report: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None,
    ) -> None:
        self.history, self.engine, self.batches, self.epochs, self.report = history, engine, batches, epochs, report
        self.latest: dict[str, float] = {}
        self.latest_step = -1

    def __call__(self, info: StepInfo) -> None:
        if info.completes(self.epochs) or info.step == info.total_steps:
            self.latest, self.latest_step = self.engine.evaluate(self.batches()), info.step
            figures = {f"eval/{key}": value for key, value in self.latest.items()}
            self.history.record(info.step, figures)
            self.report(info.step, figures)

    def figures(self, info: StepInfo) -> dict[str, float]:
        """Return what is known of the model after this step: the loss, and the evaluation if there was one."""
        found = self.latest if self.latest_step == info.step else {}
        return {"train/loss": info.result.loss, **{f"eval/{key}": value for key, value in found.items()}}


@dataclass(frozen=True)
class Scored:
    """An evaluated checkpoint.

    Attributes:
        step: of the checkpoint.
        metrics: the task's figures by name; empty if the evaluation failed.
    """

    step: int
    metrics: Mapping[str, float]


class Evaluator(Protocol):
    """Evaluates checkpoints in another process."""

    def ask(self, step: int) -> None:
        """Start to evaluate the checkpoint of a step."""
        ...

    def results(self, wait: bool) -> list[Scored]:
        """Return what has been evaluated since the last call; with `wait`, wait a moment for more."""
        ...


@dataclass
class AsyncEvalHook:
    """Has checkpoints evaluated in another process every `epochs`. Every rank has one, rank 0's has the evaluator.

    Where an evaluation is due a checkpoint is `wanted`; the first one saved since then is evaluated. One is evaluated
    at a time. Of those that wait the newest is taken and the others are left out, so evaluations that take longer than
    `epochs` of training are made less often. The run's last step waits for the rest.

    Attributes:
        history: where the figures are recorded, at the step of the checkpoint.
        epochs: of training between two evaluations.
        evaluator: rank 0's.
        stop_requested: whether the last step need not wait.
    """

    history: History
    epochs: float
    evaluator: Evaluator | None = None
    stop_requested: Callable[[], bool] = lambda: False
    _due: int | None = field(default=None, init=False)
    _waiting: int | None = field(default=None, init=False)
    _running: int | None = field(default=None, init=False)

    def __call__(self, info: StepInfo) -> None:
        if self.evaluator is None:
            return
        if self.wanted(info):
            self._due = info.step
        self._take(wait=False)
        began = time.monotonic()
        while info.step == info.total_steps and self._running is not None and not self.stop_requested():
            self._take(wait=True)
            if time.monotonic() - began > PATIENCE_S:
                log.warning("the evaluation of step %d did not end in %g s: left out", self._running, PATIENCE_S)
                return

    def wanted(self, info: StepInfo) -> bool:
        """Return whether a checkpoint is wanted after this step, the same on all ranks; the last step needs none."""
        return info.completes(self.epochs) and info.step != info.total_steps

    def saved(self, step: int) -> None:
        """Learn that the checkpoint of a step is committed (rank 0)."""
        if self._due is not None and step >= self._due:
            self._due = None
            self._enqueue(step)

    def in_use(self) -> Collection[int]:
        """Return the steps whose checkpoints are still to be read."""
        return {step for step in (self._running, self._waiting) if step is not None}

    def resume(self, step: int, steps_per_epoch: float, scored: Mapping[int, Mapping[str, float]]) -> None:
        """Continue from a checkpoint (rank 0): record what the history lacks, ask for what a crash cut off.

        Args:
            step: of the checkpoint that the run continues from.
            steps_per_epoch: of the training data.
            scored: figures of the evaluations so far, by step; those of later steps are left out.
        """
        known = self.history.evaluations()
        for at in sorted(at for at in scored if at <= step and at not in known):
            self._record(Scored(at, scored[at]))
        due = last_due(step, steps_per_epoch, self.epochs)
        if due is not None and all(at < due for at in (*known, *(at for at in scored if at <= step))):
            self._enqueue(step)

    def _enqueue(self, step: int) -> None:
        self._waiting = step
        self._next()

    def _next(self) -> None:
        assert self.evaluator is not None
        if self._running is None and self._waiting is not None:
            self._running, self._waiting = self._waiting, None
            self.evaluator.ask(self._running)

    def _take(self, wait: bool) -> None:
        if self.evaluator is None or self._running is None:
            return
        for scored in self.evaluator.results(wait):
            if scored.step != self._running:
                continue  # a worker that has died asked for it
            self._running = None
            self._record(scored)
        self._next()

    def _record(self, scored: Scored) -> None:
        if scored.metrics:
            self.history.record(scored.step, {f"eval/{name}": value for name, value in scored.metrics.items()})


def last_due(step: int, steps_per_epoch: float, epochs: float) -> int | None:
    """Return the last step up to this one at which an evaluation was due; None if there was none."""
    times = math.floor(step / steps_per_epoch / epochs + 1e-9)
    return math.ceil(times * epochs * steps_per_epoch - 1e-6) if times else None
