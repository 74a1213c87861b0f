"""Weights of the losses of several classifiers by their overfitting-to-generalisation ratio (G-blend).

Source: Wang, Tran, Feiszli, arXiv 1905.12681. From one measurement to a later one, a classifier gains generalisation
dG = V - V' and overfits by dO = (V' - T') - (V - T), where T is its loss in training and V that on held-out samples.
The blend that makes the squared ratio of dO to dG least gives each classifier a weight proportional to dG / dO^2.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from perceiver.config import UserError
from perceiver.tasks import Batch
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import History
from perceiver.train.loop import StepInfo

LEAST_OVERFITTING = 1e-4
"""A change of the overfitting below it counts as this much, so that no weight is infinite."""
TRAIN, HELD_OUT, WEIGHT = "blend/train_", "blend/eval_", "blend/weight_"
"""Beginnings of the names of what a run records of its classifiers."""


@dataclass(frozen=True)
class Losses:
    """A classifier's losses at one time.

    Attributes:
        train: mean over samples that it is trained on.
        held_out: mean over samples of the same kind that it is not trained on, and that no result is reported of.
    """

    train: float
    held_out: float

    @property
    def overfitting(self) -> float:
        """Return how far the loss on held-out samples is above that in training."""
        return self.held_out - self.train


def blend_weights(before: Mapping[str, Losses], after: Mapping[str, Losses]) -> dict[str, float]:
    """Return the weight of each classifier, which sum to 1.

    A classifier that has not gained has weight 0; if none has, all have the same weight.

    Args:
        before: losses of each classifier at the first time.
        after: losses of the same classifiers at a later time.
    """
    raw: dict[str, float] = {}
    for name, first in before.items():
        gain = first.held_out - after[name].held_out
        overfitting = max(abs(after[name].overfitting - first.overfitting), LEAST_OVERFITTING)
        raw[name] = max(gain, 0.0) / overfitting**2
    total = sum(raw.values())
    return {name: value / total if total else 1 / len(raw) for name, value in raw.items()}


def recorded_losses(rows: Sequence[Mapping[str, Any]], name: str = "") -> dict[float, Losses]:
    """Return a classifier's losses at each evaluation of a run by its epoch.

    The loss in training is the mean of what was recorded since the evaluation before.

    Args:
        rows: the history of a run.
        name: of the classifier, in a run of several; empty: the run's own.

    Raises:
        UserError: the history has no evaluation, or does not have this classifier.
    """
    end = f"loss_{name}" if name else "loss"
    found: dict[float, Losses] = {}
    window: list[float] = []
    epoch = 0.0
    for row in sorted(rows, key=lambda row: (row["step"], f"eval/{end}" in row)):
        if f"train/{end}" in row:
            window.append(row[f"train/{end}"])
            epoch = row["train/epoch"]
        if f"eval/{end}" in row and window:
            found[round(epoch, 6)] = Losses(sum(window) / len(window), row[f"eval/{end}"])
            window = []
    if len(found) < 2:
        raise UserError(f"the history has {len(found)} evaluations with eval/{end} after steps with train/{end}")
    return found


class BlendedTask(Protocol):
    """A task with a weight of the loss of each classifier."""

    blend: dict[str, float]


class BlendHook:
    """Estimates the weights of a run's classifiers again after each `every` epochs. Every rank has one.

    The losses are those of the classifiers in the model as it is: on samples of the training split without
    augmentation, and on the evaluation split. The source trains a copy of each branch alone for the same time instead.
    The record of metrics has the measurements and the weights, and each checkpoint has the record: a resumed run
    continues with the weights of an uninterrupted one.

    Args:
        history: the recorded metrics.
        engine: runs the evaluations.
        task: whose weights are set.
        batches: return this rank's batches of the training split, as many as those of the next, and of the evaluation
            split.
        every: epochs between two estimates.
    """

    def __init__(
        self,
        history: History,
        engine: Engine,
        task: BlendedTask,
        batches: tuple[Callable[[], Iterable[Batch]], Callable[[], Iterable[Batch]]],
        every: float,
    ) -> None:
        self.history, self.engine, self.task, self.batches, self.every = history, engine, task, batches, every
        self.before = self._restore()

    def begin(self) -> None:
        """Measure the losses before the first step, unless the run was resumed."""
        if not self.before:
            self.before = self._measure(0)

    def __call__(self, info: StepInfo) -> None:
        if info.completes(self.every) and not info.final:
            after = self._measure(info.step)
            self.task.blend = blend_weights(self.before, after)
            self.before = after
            self.history.record(info.step, {f"{WEIGHT}{name}": value for name, value in self.task.blend.items()})

    def _measure(self, step: int) -> dict[str, Losses]:
        """Return the losses of each classifier, and record them."""
        train, held_out = (self.engine.evaluate(batches()) for batches in self.batches)
        found = {name: Losses(train[f"loss_{name}"], held_out[f"loss_{name}"]) for name in self.task.blend}
        for start, attribute in ((TRAIN, "train"), (HELD_OUT, "held_out")):
            self.history.record(step, {f"{start}{name}": getattr(one, attribute) for name, one in found.items()})
        return found

    def _restore(self) -> dict[str, Losses]:
        """Set the last recorded weights; return the last recorded losses, which are empty in a new run."""
        last: dict[str, float] = {}
        for row in self.history.rows:
            last |= {key: value for key, value in row.items() if key.startswith("blend/")}
        names = list(self.task.blend)
        if all(f"{WEIGHT}{name}" in last for name in names):
            self.task.blend = {name: last[f"{WEIGHT}{name}"] for name in names}
        if not all(f"{TRAIN}{name}" in last and f"{HELD_OUT}{name}" in last for name in names):
            return {}
        return {name: Losses(last[f"{TRAIN}{name}"], last[f"{HELD_OUT}{name}"]) for name in names}
