"""Evaluation beside training: checkpoints are evaluated by somebody else, while the steps go on."""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from perceiver.train.hooks import History
from perceiver.train.loop import StepInfo

log = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""At the last step the evaluations that are still to come are waited for so long."""


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
    """Who evaluates checkpoints."""

    def ask(self, step: int) -> None:
        """Begin with the checkpoint of a step."""
        ...

    def results(self, wait: bool) -> list[Scored]:
        """What has been evaluated since the last call; `wait` for the news that there may be, for a moment."""
        ...


def _nobody(step: int, metrics: Mapping[str, float]) -> None:
    return None


@dataclass
class BesideHook:
    """Has checkpoints evaluated every `epochs`; every rank holds one, rank 0's has the evaluator.

    Where an evaluation falls due a checkpoint is `wanted`; what is evaluated is the first one saved since then. One is
    evaluated at a time. Of those that wait for their turn the newest is taken, the others are passed over: evaluations
    that take longer than `epochs` of training are made less often. At the run's last step the rest is waited for.

    Attributes:
        history: where the figures are recorded, at the step of the checkpoint.
        epochs: of training between two evaluations.
        evaluator: rank 0's.
        learn: told the figures of a step, as they are recorded.
        stop_requested: whether the rest need not be waited for.
    """

    history: History
    epochs: float
    evaluator: Evaluator | None = None
    learn: Callable[[int, Mapping[str, float]], None] = _nobody
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
        """Whether a checkpoint is wanted after this step, the same on all ranks; the last step is evaluated by all."""
        return info.completes(self.epochs) and info.step != info.total_steps

    def saved(self, step: int) -> None:
        """Learn that the checkpoint of a step counts (rank 0)."""
        if self._due is not None and step >= self._due:
            self._due = None
            self._enqueue(step)

    def holds(self) -> Collection[int]:
        """The steps whose checkpoints are still to be read."""
        return {step for step in (self._running, self._waiting) if step is not None}

    def resume(self, step: int, steps_per_epoch: float, scored: Mapping[int, Mapping[str, float]]) -> None:
        """Go on from a checkpoint (rank 0): record what the history does not know, make up for what was cut off.

        Args:
            step: of the checkpoint that the run goes on from.
            steps_per_epoch: of the training data.
            scored: what was evaluated so far, by step; figures of later steps are left out.
        """
        known = {int(row["step"]): row for row in self.history.rows if any(key.startswith("eval/") for key in row)}
        for at, row in known.items():
            self.learn(at, {key: value for key, value in row.items() if key.startswith("eval/")})
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
                continue  # asked for by a worker that is gone
            self._running = None
            self._record(scored)
        self._next()

    def _record(self, scored: Scored) -> None:
        if scored.metrics:
            figures = {f"eval/{name}": value for name, value in scored.metrics.items()}
            self.history.record(scored.step, figures)
            self.learn(scored.step, figures)


def last_due(step: int, steps_per_epoch: float, epochs: float) -> int | None:
    """The last step up to this one at which an evaluation fell due; None if there was none yet."""
    times = math.floor(step / steps_per_epoch / epochs + 1e-9)
    return math.ceil(times * epochs * steps_per_epoch - 1e-6) if times else None
