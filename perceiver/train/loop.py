"""The training loop: batch, step, hooks. Independent of Ray, DeepSpeed and MLflow."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from perceiver.hashing import FIRST, GOLDEN, SECOND, mix64
from perceiver.tasks import Batch
from perceiver.train.engine.protocol import Engine, StepResult


class Flags(NamedTuple):
    """State that the ranks exchange after each step; in `StepInfo` a flag is set if it is on any rank."""

    stop: bool = False
    """Save and stop after this step."""
    saving: bool = False
    """A checkpoint is being written in the background."""
    save_failed: bool = False
    """The rank's part of the last checkpoint could not be written."""
    save_refused: bool = False
    """The store refuses the credentials: no later checkpoint can succeed."""
    enough: bool = False
    """The run ends after this step, finished: its evaluations no longer improve."""
    ask_cluster: bool = False
    """It is time for all ranks together to ask the cluster whether a node will be removed."""


@dataclass(frozen=True)
class StepInfo:
    """The argument of a hook, after each optimizer step.

    Attributes:
        step: number of optimizer steps, this one included.
        total_steps: optimizer steps of the whole run.
        epoch: passes over the data so far.
        samples: samples of this step over all workers.
        seconds: wall time of this step, waiting for data included.
        wait_seconds: the part of `seconds` spent waiting for data.
        result: loss, metrics, gradient norm, learning rate.
        flags: flags of any rank after this step; the same on all ranks.
        sample_ids: ids of this rank's micro-batches; -1 for a row without a usable sample.
    """

    step: int
    total_steps: int
    epoch: float
    samples: int
    seconds: float
    wait_seconds: float
    result: StepResult
    flags: Flags = Flags()
    sample_ids: tuple[torch.Tensor, ...] = ()

    def completes(self, epochs: float) -> bool:
        """Return whether this step completes another `epochs` passes over the data."""
        before = self.epoch * (self.step - 1) / self.step
        # The tolerance keeps a boundary that falls on a step from being missed by rounding.
        return math.floor(self.epoch / epochs + 1e-9) > math.floor(before / epochs + 1e-9)

    @property
    def final(self) -> bool:
        """Whether this is the last step of the run."""
        return self.flags.enough or self.step == self.total_steps

    @property
    def last(self) -> bool:
        """Whether this is the last step of this process."""
        return self.flags.stop or self.final


Hook = Callable[[StepInfo], None]


class RollBack(Exception):
    """Raised by a hook: restore the last checkpoint and continue with the samples after this step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step = step


@dataclass(frozen=True)
class Span:
    """Which steps to run, and how they relate to samples and epochs.

    Attributes:
        start_step: number of steps already done.
        total_steps: steps of the whole run.
        global_batch: samples per step.
        accumulation: micro-batches per step on one worker.
        steps_per_epoch: steps of one pass over the data, not necessarily whole.
        seed: the recipe's seed.
    """

    start_step: int
    total_steps: int
    global_batch: int
    accumulation: int
    steps_per_epoch: float
    seed: int


def _cannot_restore(step: int) -> None:
    raise RuntimeError(f"cannot roll back step {step}: this loop has no checkpoints")


def train(
    engine: Engine,
    batches: Iterator[Batch],
    hooks: Sequence[Hook],
    span: Span,
    *,
    poll: Callable[[], Flags] = Flags,
    restore: Callable[[int], None] = _cannot_restore,
) -> int:
    """Run the steps of `span` and return the number of optimizer steps done.

    The random state of each step is a function of (seed, step, rank), so a resumed run draws the same random numbers as
    an uninterrupted one.

    Args:
        engine: takes the optimizer steps.
        batches: this rank's micro-batches, in order.
        hooks: called after each step, in order.
        span: the steps to run.
        poll: return this rank's flags after a step. `stop` or `enough` on any rank ends the loop on all ranks after
            that step.
        restore: load the weights of the last checkpoint, to roll back the given step. The batches are already past that
            step, so its samples are not used again.
    """
    for step in range(span.start_step, span.total_steps):
        began = time.perf_counter()
        micro_batches = [with_draw_seeds(next(batches), span.seed, step) for _ in range(span.accumulation)]
        waited = time.perf_counter() - began
        torch.manual_seed(_step_seed(span.seed, step, engine.rank))
        result = engine.step(micro_batches, step)
        flags = Flags(*(total > 0 for total in engine.sum([float(flag) for flag in poll()])))
        info = StepInfo(
            step=step + 1,
            total_steps=span.total_steps,
            epoch=(step + 1) / span.steps_per_epoch,
            samples=span.global_batch,
            seconds=time.perf_counter() - began,
            wait_seconds=waited,
            result=result,
            flags=flags,
            sample_ids=tuple(sample_ids(batch) for batch in micro_batches if "sample_id" in batch),
        )
        try:
            for hook in hooks:
                hook(info)
        except RollBack as bad:
            restore(bad.step)
        if flags.stop or flags.enough:
            return step + 1
    return span.total_steps


def sample_ids(batch: Batch) -> torch.Tensor:
    """Return the sample ids of a micro-batch (B,); -1 where a row is padding."""
    ids = batch["sample_id"]
    return torch.where(batch["valid"], ids, -1) if "valid" in batch else ids


def with_draw_seeds(batch: Batch, seed: int, step: int) -> Batch:
    """Return a batch with `draw_seed` (B,) int64, a number for each sample: the same on any number of workers.

    Inputs that augment on the device take it (`training_keys`); batches without sample ids stay as they are.
    """
    if "sample_id" not in batch:
        return batch
    start = _step_seed(seed, step, 0) - (1 << 62)  # so that no sum overflows int64
    return {**batch, "draw_seed": batch["sample_id"] + start}


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Return a 63-bit seed; those of neighbouring steps and ranks are not correlated."""
    return mix64(seed * GOLDEN + step * FIRST + rank * SECOND) >> 1
