"""The engine protocol: optimizer steps on this rank's share of a global batch, and evaluation.

`perceiver.train.engine.deepspeed_engine` implements it. This module also has the functions that any implementation
needs.

The loss is the mean over the valid targets of the whole global batch: the summed loss of every micro-batch is divided
by the count over all ranks and micro-batches before its backward pass, so accumulation and ranks with unequal shares
are exact.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.kernels.compiled import CompiledLayers
from perceiver.model import Encoder
from perceiver.tasks import Batch, LossOutput, Task
from perceiver.train.engine.ranks import Pending, Ranks

Precision = Literal["auto", "fp32", "bf16"]
Compile = bool | Literal["auto"]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, all numbers over all ranks and micro-batches."""

    step: int
    """Index of the step, counted from 0."""
    loss: float
    """Mean over valid targets; NaN if there was none."""
    metrics: dict[str, float]
    """The task's metrics; empty if there was no valid target."""
    grad_norm: float | None
    """Global L2 norm of the gradient before clipping; None if the engine does not compute it."""
    lr: float
    """Learning rate of the step; parameter groups have factors of it."""
    skipped: bool
    """Whether the gradient was not finite, so that the parameters were not changed."""
    forward_s: float | None = None
    """Seconds of this rank's forward passes, on GPUs of an earlier step; None if they were not measured."""


class Engine(Protocol):
    """Interface of the training loop to the engine; every rank calls every method."""

    device: torch.device
    rank: int
    world: int
    module: nn.Module
    refuse: Callable[[float], bool] | None
    """If set, a step whose loss it returns True for is skipped, as if the gradient were not finite."""

    def step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Take optimizer step number `step`, counted from 0, on this rank's share of the global batch."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Give the model the average of its weights in a `with` block; without `train.ema` nothing changes."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the task's metrics over all ranks' valid samples; each rank has the same number of batches, not 0.

        The model is the averaged one, if there is an average.
        """
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values summed over the ranks."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the training state to a folder."""
        ...

    def load(self, folder: Path) -> int:
        """Restore what `save` wrote; return the number of updates that it contains.

        Raises:
            UserError: it is missing or belongs to another model.
        """
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """Return the full state dict on rank 0, on the CPU, floating tensors in float32; None on other ranks."""
        ...


@dataclass
class MetricSums:
    """Sums over micro-batches, then over ranks: the loss, the task's own, and the count of valid targets.

    The rows of single samples that some metrics need are kept, and sent to all ranks by `gather`.
    """

    ranks: Ranks
    totals: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, output: LossOutput, count: Tensor) -> None:
        """Add the sums of one micro-batch."""
        news = {**output.sums, "loss": output.loss_sum.detach(), "": count}
        for name, value in news.items():
            value = value.double()
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        for name, values in getattr(output, "rows", {}).items():
            self.rows.setdefault(name, []).append(values)

    def gather(self) -> dict[str, Tensor]:
        """Return the rows of all ranks on the CPU; each rank must have the same names."""
        return {name: self.ranks.gather(torch.cat(self.rows[name])).cpu() for name in sorted(self.rows)}

    def start(self) -> "PendingSums":
        """Start the all-reduce and return the pending result."""
        shapes = {name: self.totals[name].shape for name in sorted(self.totals)}
        vector = torch.cat([self.totals[name].flatten() for name in shapes])
        return PendingSums(shapes, vector, self.ranks.start_sum(vector))


@dataclass
class PendingSums:
    """The result of an all-reduce that may still be in progress."""

    shapes: dict[str, torch.Size]
    vector: Tensor
    work: Pending
    _fetched: tuple[Tensor, Any] | None = None

    def fetch(self) -> None:
        """On a GPU, start to copy the result, so that `summarise` does not wait for work that is queued after this."""
        if self.vector.is_cuda:
            self.work.wait()
            copy = self.vector.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._fetched = copy, copied

    def _read(self) -> Tensor:
        if self._fetched is None:
            self.work.wait()
            return self.vector.cpu()
        copy, copied = self._fetched
        copied.synchronize()
        return copy

    def summarise(self, task: Task, rows: Mapping[str, Tensor] | None = None) -> tuple[float, dict[str, float]]:
        """Return the mean loss and the metrics; (NaN, {}) if no target was valid. `rows` are those of all ranks."""
        parts = self._read().split([shape.numel() for shape in self.shapes.values()])
        named = zip(self.shapes.items(), parts, strict=True)
        sums: dict[str, Any] = {name: part.view(shape) if shape else float(part) for (name, shape), part in named}
        count = sums.pop("")
        if not count:
            return math.nan, {}
        return sums["loss"] / count, task.summarise({**sums, **(rows or {})}, count)


def count_targets(task: Task, micro_batches: Sequence[Batch]) -> tuple[list[Tensor], Tensor]:
    """Return the number of valid targets of each micro-batch, and their total, 0-d float64."""
    counts = [task.count(batch).double() for batch in micro_batches]
    return counts, torch.stack(counts).sum()


def evaluate(model: nn.Module, task: Task, batches: Iterable[Batch], ranks: Ranks) -> dict[str, float]:
    """Return the task's metrics over the valid samples of all ranks.

    Runs in evaluation mode without gradients and restores the mode. Every rank must have the same number of batches.

    Raises:
        UserError: there is no batch or no valid target.
    """
    sums = MetricSums(ranks)
    tell_step(task, 0)
    training = model.training
    _set_training(model, False)
    try:
        with torch.no_grad():
            for batch in batches:
                sums.add(task.loss(model, batch), task.count(batch))
    finally:
        _set_training(model, training)
    if not sums.totals:
        raise UserError("the evaluation set is empty; wanted at least one batch per worker: check the data's split")
    loss, metrics = sums.start().summarise(task, sums.gather())
    if math.isnan(loss) and not metrics:
        raise UserError("the evaluation set has no valid target: check the data's split and labels")
    return metrics


def _set_training(model: nn.Module, mode: bool) -> None:
    """Set the mode of a model and of what wraps it: DeepSpeed's engine sets that of its module, but not its own."""
    model.train(mode)
    model.training = mode


def tell_step(task: Task, step: int) -> None:
    """Set the step of a task that draws random numbers (MixUp, word masks), so that a resumed run repeats them."""
    if hasattr(task, "step"):
        task.step = step  # pyright: ignore[reportAttributeAccessIssue] only some tasks draw


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every parameter group to its factor of the step's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def allow_tf32(half: bool, device: torch.device) -> None:
    """Let a GPU compute the float32 products that remain in bf16 in TF32, which has three bits more than bf16."""
    if half and device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def set_layers(
    module: nn.Module, compile: Compile, *, half_residual: bool, zero_stage: int, device: torch.device
) -> None:
    """Set whether a Perceiver's layers are compiled and its latents kept in bf16; other models have no such layers.

    They are not compiled at ZeRO stage 3, whose hooks gather each layer's weights.
    """
    on = (device.type == "cuda" if compile == "auto" else compile) and zero_stage < 3
    for part in module.modules():
        if isinstance(part, Encoder):
            part.compiled = CompiledLayers() if on else None
            part.half_residual = half_residual


def default_device() -> torch.device:
    """Return the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def cpu_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU, floating tensors as float32."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def untrained(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict that the optimizer does not have: buffers and frozen parameters."""
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad)
    }
