"""The history of a run, and the hooks that record metrics and evaluate. A hook takes one `StepInfo`.

Other hooks: checkpoints in `perceiver.train.checkpoint`, NaN and infinite losses in `perceiver.train.bad_loss`.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from perceiver.tasks import Batch
from perceiver.train.config import EarlyStop
from perceiver.train.engine.protocol import Engine
from perceiver.train.loop import StepInfo

log = logging.getLogger(__name__)

LAST_EVALUATION_S = 600.0
"""Seconds that the last step waits for evaluations in other processes."""

Sink = Callable[[int, Mapping[str, float], float], None]
"""Receives the step, the metrics and the time (seconds since the epoch) of a recorded row."""


class History:
    """The recorded metrics of a run: rows in memory, passed to sinks, saved with each checkpoint.

    Args:
        text: rows of an earlier history, as JSON lines.
        sinks: called with each new row.

    Attributes:
        rows: ``{"step": ..., "time": ..., metric: value, ...}``, oldest first.
        spent_s: seconds spent on recording.
    """

    def __init__(self, text: str = "", sinks: Sequence[Sink] = ()) -> None:
        self._lines = [line for line in text.splitlines() if line]
        self.rows: list[dict[str, float]] = [json.loads(line) for line in self._lines]
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
        self._lines.append(json.dumps(self.rows[-1]))
        self._note(step, metrics)
        for sink in self.sinks:
            sink(step, metrics, now)
        self.spent_s += time.perf_counter() - began

    def text(self) -> str:
        """Return all rows as JSON lines."""
        return "".join(line + "\n" for line in self._lines)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Return the metrics of all evaluations by step; the names begin with `eval/`."""
        return self._evaluations

    def _note(self, step: int, metrics: Mapping[str, float]) -> None:
        if figures := {key: value for key, value in metrics.items() if key.startswith("eval/")}:
            self._evaluations.setdefault(step, {}).update(figures)


class MetricsHook:
    """Records the mean training metrics of each `steps` steps, and the share of time that recording takes."""

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
    """Return the metrics of consecutive steps: means of the task's, throughput, share of time waiting for data."""
    seconds = sum(info.seconds for info in window)
    last = window[-1].result
    # A batch may have no sample of which a figure is: each is the mean over the steps that have it.
    steps = [info.result.metrics for info in window]
    names = dict.fromkeys(name for metrics in steps for name in metrics)
    metrics = {f"train/{name}": _mean([each[name] for each in steps if name in each]) for name in names}
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
    """Return the mean of the finite values; NaN if there is none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


class EvalHook:
    """Evaluates between two steps, every `epochs` epochs and at the end. Every rank has one.

    Args:
        history: records the metrics.
        engine: runs the evaluation.
        batches: return this rank's batches of the evaluation split.
        epochs: epochs between two evaluations; infinite: only at the end.
        report: called on every rank after each evaluation, with the step and the metrics.

    Attributes:
        latest: metrics of the last evaluation.
        latest_step: its step; -1 before the first evaluation.
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
        if info.completes(self.epochs) or info.final:
            self.latest, self.latest_step = self.engine.evaluate(self.batches()), info.step
            figures = {f"eval/{key}": value for key, value in self.latest.items()}
            self.history.record(info.step, figures)
            self.report(info.step, figures)

    def figures(self, info: StepInfo) -> dict[str, float]:
        """Return the loss of a step, and its evaluation metrics if it had an evaluation."""
        found = self.latest if self.latest_step == info.step else {}
        return {"train/loss": info.result.loss, **{f"eval/{key}": value for key, value in found.items()}}


@dataclass
class EarlyStopHook:
    """Ends the run, as finished, one step after the evaluation that decides it. Every rank has one.

    The record of metrics decides, which checkpoints contain: a resumed run ends where an uninterrupted one does.

    Attributes:
        config: `train.early_stop`; None: the run ends at its last step.
        history: the recorded metrics.
        reason: why the run ends; empty as long as it does not.
        ended: whether the run has ended.
    """

    config: EarlyStop | None
    history: History
    reason: str = field(default="", init=False)
    ended: bool = field(default=False, init=False)
    _step: int | None = field(default=None, init=False)
    _seen: int = field(default=0, init=False)

    def over(self, step: int) -> bool:
        """Return whether a run of so many steps has ended."""
        found = self._look()
        return found is not None and found < step

    def enough(self) -> bool:
        """Return whether the next step is the last one."""
        return self._look() is not None

    def __call__(self, info: StepInfo) -> None:
        self.ended = info.flags.enough

    def _look(self) -> int | None:
        evaluations = self.history.evaluations()
        if self.config is not None and self._step is None and len(evaluations) > self._seen:
            self._seen = len(evaluations)
            self._step, self.reason = self.config.decided(evaluations) or (None, "")
        return self._step


@dataclass(frozen=True)
class Scored:
    """An evaluated checkpoint.

    Attributes:
        step: step of the checkpoint.
        metrics: the task's metrics by name; empty if the evaluation failed.
    """

    step: int
    metrics: Mapping[str, float]


class Evaluator(Protocol):
    """Evaluates checkpoints in another process."""

    def ask(self, step: int) -> None:
        """Start the evaluation of a step's checkpoint."""
        ...

    def results(self, wait: bool) -> list[Scored]:
        """Return the results since the last call; with `wait`, block shortly for more."""
        ...


@dataclass
class AsyncEvalHook:
    """Evaluates checkpoints in another process every `epochs`. Every rank has one; rank 0's has the evaluator.

    When an evaluation is due, a checkpoint is `wanted`, and the first one saved after that is evaluated. One evaluation
    runs at a time. Of the waiting checkpoints only the newest is evaluated, so evaluations that take longer than
    `epochs` of training are less frequent. The last step of the run waits for the remaining ones.

    Attributes:
        history: records the metrics, at the step of the checkpoint.
        epochs: epochs of training between two evaluations.
        evaluator: on rank 0 only.
        stop_requested: return whether the last step should not wait.
        start_step: step of the checkpoint from which the run is resumed. The history gets the scores that it lacks, and
            an evaluation that a crash ended is started again.
        steps_per_epoch: steps of one pass over the training data.
        scored: metrics of the evaluations so far, by step; those after `start_step` are ignored.
    """

    history: History
    epochs: float
    evaluator: Evaluator | None = None
    stop_requested: Callable[[], bool] = lambda: False
    start_step: int = 0
    steps_per_epoch: float = 1.0
    scored: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    _due: int | None = field(default=None, init=False)
    _waiting: int | None = field(default=None, init=False)
    _running: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.evaluator is None or not self.start_step:
            return
        known, step = self.history.evaluations(), self.start_step
        for at in sorted(at for at in self.scored if at <= step and at not in known):
            self._record(Scored(at, self.scored[at]))
        due = last_due(step, self.steps_per_epoch, self.epochs)
        if due is not None and all(at < due for at in (*known, *(at for at in self.scored if at <= step))):
            self._enqueue(step)

    def __call__(self, info: StepInfo) -> None:
        if self.evaluator is None:
            return
        if self.wanted(info):
            self._due = info.step
        self._take(wait=False)
        began = time.monotonic()
        while info.final and self._running is not None and not self.stop_requested():
            self._take(wait=True)
            if time.monotonic() - began > LAST_EVALUATION_S:
                log.warning("skipped the evaluation of step %d after %g s", self._running, LAST_EVALUATION_S)
                return

    def wanted(self, info: StepInfo) -> bool:
        """Return whether a checkpoint is wanted after this step, the same on all ranks; the last step needs none."""
        return info.completes(self.epochs) and not info.final

    def saved(self, step: int) -> None:
        """Take note of a committed checkpoint (rank 0)."""
        if self._due is not None and step >= self._due:
            self._due = None
            self._enqueue(step)

    def in_use(self) -> Collection[int]:
        """Return the steps whose checkpoints must not be deleted yet."""
        return {step for step in (self._running, self._waiting) if step is not None}

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
                continue  # requested by a worker that has died since
            self._running = None
            self._record(scored)
        self._next()

    def _record(self, scored: Scored) -> None:
        if scored.metrics:
            self.history.record(scored.step, {f"eval/{name}": value for name, value in scored.metrics.items()})


def last_due(step: int, steps_per_epoch: float, epochs: float) -> int | None:
    """Return the last step up to `step` at which an evaluation was due; None if there was none."""
    times = math.floor(step / steps_per_epoch / epochs + 1e-9)
    return math.ceil(times * epochs * steps_per_epoch - 1e-6) if times else None
