"""What happens after a step: metrics, evaluation, checkpoints. Each hook takes one ``StepInfo``."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping

from perceiver.train.engine.protocol import Engine
from perceiver.train.loop import Batch, StepInfo

Sink = Callable[[int, Mapping[str, float]], None]


class History:
    """The recorded metrics of a run: rows kept in memory, handed to sinks, saved with each checkpoint.

    `spent_s` is what all this took from the steps so far.
    """

    def __init__(self, text: str = "") -> None:
        self.rows: list[dict[str, float]] = [json.loads(line) for line in text.splitlines() if line]
        self.sinks: list[Sink] = []
        self.spent_s = 0.0

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one row, ``{"step": step, "time": now, **metrics}``, and pass it to every sink."""
        began = time.perf_counter()
        self.rows.append({"step": step, "time": time.time(), **metrics})
        for sink in self.sinks:
            sink(step, metrics)
        self.spent_s += time.perf_counter() - began

    def text(self) -> str:
        """Return all rows as JSON lines."""
        return "".join(json.dumps(row) + "\n" for row in self.rows)


class MetricsHook:
    """Records the mean of the training metrics over each window of ``steps`` steps, and what recording itself takes."""

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
    """Evaluates after each ``epochs`` epochs and at the end; ``latest`` holds the last figures, of ``latest_step``."""

    def __init__(self, history: History, engine: Engine, batches: Callable[[], Iterable[Batch]], epochs: float) -> None:
        self.history, self.engine, self.batches, self.epochs = history, engine, batches, epochs
        self.latest: dict[str, float] = {}
        self.latest_step = -1

    def __call__(self, info: StepInfo) -> None:
        if info.completes(self.epochs) or info.step == info.total_steps:
            self.latest, self.latest_step = self.engine.evaluate(self.batches()), info.step
            self.history.record(info.step, {f"eval/{key}": value for key, value in self.latest.items()})

    def figures(self, info: StepInfo) -> dict[str, float]:
        """What is known of the model after this step: the loss, and the evaluation if there was one."""
        found = self.latest if self.latest_step == info.step else {}
        return {"train/loss": info.result.loss, **{f"eval/{key}": value for key, value in found.items()}}
