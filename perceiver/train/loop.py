"""The training loop: batch, step, hooks. It knows neither Ray, DeepSpeed nor MLflow."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from perceiver.hashing import FIRST, GOLDEN, SECOND, mix64
from perceiver.train.checkpoint.writer import SavingConfig
from perceiver.train.engine.protocol import Engine, Precision, StepResult

Batch = dict[str, torch.Tensor]


class TrainConfig(SavingConfig):
    """How long and in what portions to train (recipe key ``train``)."""

    epochs: PositiveFloat | None = Field(default=None, description="passes over the training data; give this or steps")
    steps: PositiveInt | None = Field(default=None, description="optimizer steps; give this or epochs")
    global_batch: PositiveInt = Field(default=128, description="samples of one optimizer step, over all workers")
    micro_batch: PositiveInt | None = Field(
        default=None, description="samples of one forward pass on one worker; default: a worker's whole share"
    )
    init_from: str | None = Field(
        default=None,
        description="weights to start from: a run's folder, a checkpoint, a .safetensors file, a transformers folder",
    )
    precision: Precision = Field(default="auto", description="fp32, bf16, or auto: bf16 on GPUs that have it")
    log_every: PositiveInt = Field(default=10, description="steps between two recorded points of the training metrics")
    eval_every: PositiveFloat = Field(default=1.0, description="epochs between two evaluations")
    eval_beside: bool = Field(
        default=False,
        description="evaluate checkpoints in a process of its own while training goes on, not between two steps; "
        "with GPUs it takes as much of one as a worker does",
    )

    on_bad_loss: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="when the loss is no number: stop; skip the step; or go back to the last checkpoint's weights and "
        "pass over the samples since",
    )
    bad_loss_limit: PositiveInt = Field(default=10, description="steps skipped or rolled back, after which to stop")
    ledger: bool = Field(default=False, description="record the sample ids of each step, below ledger/ of the run")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        return self

    def total_steps(self, steps_per_epoch: float) -> int:
        """Return the number of optimizer steps of the whole run."""
        return self.steps if self.steps is not None else math.ceil((self.epochs or 1) * steps_per_epoch)

    def worlds(self, least: int, most: int) -> tuple[int, ...]:
        """Return the numbers of workers, from one to another, that share out the batch in whole micro-batches."""
        part = self.micro_batch or 1
        return tuple(world for world in range(least, most + 1) if self.global_batch % (world * part) == 0)

    def accumulation(self, world: int) -> int:
        """Return the number of micro-batches that one worker accumulates in a step."""
        return self.global_batch // (world * self.micro(world))

    def micro(self, world: int) -> int:
        """Return the samples of one forward pass on one worker."""
        return self.micro_batch or self.global_batch // world


@dataclass(frozen=True)
class StepInfo:
    """What a hook is told after each optimizer step."""

    step: int  # optimizer steps done, this one included
    total_steps: int
    epoch: float  # passes over the data so far
    samples: int  # samples of this step over all workers
    seconds: float  # wall time of this step, waiting included
    wait_seconds: float  # part of it spent waiting for data
    result: StepResult
    stopping: bool  # the user asked to stop: this is the last step
    sample_ids: tuple[torch.Tensor, ...] = ()  # of this rank's micro-batches; -1 stands for no usable sample

    def completes(self, epochs: float) -> bool:
        """Whether this step completes another ``epochs`` passes over the data."""
        before = self.epoch * (self.step - 1) / self.step
        # The tolerance keeps a boundary that falls on a step from being missed by rounding.
        return math.floor(self.epoch / epochs + 1e-9) > math.floor(before / epochs + 1e-9)

    @property
    def last(self) -> bool:
        """Whether no step follows in this process."""
        return self.stopping or self.step == self.total_steps


Hook = Callable[[StepInfo], None]


@dataclass(frozen=True)
class Span:
    """Which steps to run, and how they relate to samples and epochs."""

    start_step: int
    total_steps: int
    global_batch: int
    accumulation: int
    steps_per_epoch: float
    seed: int


def train(
    engine: Engine,
    batches: Iterator[Batch],
    hooks: Sequence[Hook],
    span: Span,
    stop_requested: Callable[[], bool] = lambda: False,
) -> int:
    """Run the steps of ``span`` and return the number of optimizer steps done.

    The random state of each step is a function of (seed, step, rank): a resumed run draws what an unbroken one would.
    A stop that any rank asks for ends the loop on all ranks after the same step.
    """
    for step in range(span.start_step, span.total_steps):
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(span.accumulation)]
        waited = time.perf_counter() - began
        torch.manual_seed(_step_seed(span.seed, step, engine.rank))
        result = engine.step(micro_batches, step)
        stopping = engine.sum([float(stop_requested())])[0] > 0
        info = StepInfo(
            step=step + 1,
            total_steps=span.total_steps,
            epoch=(step + 1) / span.steps_per_epoch,
            samples=span.global_batch,
            seconds=time.perf_counter() - began,
            wait_seconds=waited,
            result=result,
            stopping=stopping,
            sample_ids=tuple(_ids(batch) for batch in micro_batches if "sample_id" in batch),
        )
        for hook in hooks:
            hook(info)
        if stopping:
            return step + 1
    return span.total_steps


def _ids(batch: Batch) -> torch.Tensor:
    ids = batch["sample_id"]
    return torch.where(batch["valid"], ids, -1) if "valid" in batch else ids


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Mix the three numbers into one 63-bit seed, so that neighbours do not correlate."""
    return mix64(seed * GOLDEN + step * FIRST + rank * SECOND) >> 1
