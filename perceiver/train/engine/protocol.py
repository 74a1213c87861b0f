"""The engine: what takes an optimizer step on this rank's share of a global batch, and what evaluates.

`Engine` is the protocol that the training loop is given. `TorchEngine` keeps it with torch alone, in one process or
over `torch.distributed`; it is the reference that the DeepSpeed engine is compared with.

The loss is the mean over the valid targets of the whole global batch: every micro-batch's summed loss is divided by the
count over all ranks and micro-batches before its backward pass, so accumulation and ragged ranks are exact.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.optim.config import OptimConfig, build_optimizer
from perceiver.optim.schedules import Schedule
from perceiver.train.checkpoint.shards import (
    check_header,
    load_shards,
    load_tensors,
    save_header,
    save_shard,
    save_tensors,
    whole_layouts,
)
from perceiver.train.engine.ranks import Pending, Ranks, random_state, set_random_state

Batch = dict[str, Tensor]
Precision = Literal["auto", "fp32", "bf16"]


class LossOutput(Protocol):
    """What a task's loss gives for one micro-batch; everything is a sum over its valid targets."""

    @property
    def loss_sum(self) -> Tensor:
        """0-d, with gradient."""
        ...

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Further sums by name, of any shape, without gradient: the same names for every batch."""
        ...


class Task(Protocol):
    """The part of a task that an engine needs."""

    def count(self, batch: Batch) -> Tensor:
        """0-d: number of valid targets in the batch, without a forward pass."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Forward pass and loss of one micro-batch."""
        ...

    def summarise(self, sums: dict[str, Any], count: float) -> dict[str, float]:
        """Metrics from sums over `count` valid targets: floats, tensors where a sum has axes; the loss is "loss"."""
        ...


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, all numbers over all ranks and micro-batches."""

    step: int
    """Index of the step, counted from 0."""
    loss: float
    """Mean over valid targets; NaN if there was none."""
    metrics: dict[str, float]
    """What the task makes of its sums; empty if there was no valid target."""
    grad_norm: float | None
    """Global L2 norm of the gradient before clipping; None if the engine does not compute it."""
    lr: float
    """The learning rate that the step used."""
    skipped: bool
    """True if the gradient was not finite and the parameters were left as they were."""


class Engine(Protocol):
    """What the training loop needs; every method is called by every rank."""

    device: torch.device
    rank: int
    world: int
    module: nn.Module

    def step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """One optimizer step, number `step` counted from 0, on this rank's share of the global batch."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The task's metrics over all ranks' valid samples; the same number of batches on every rank, at least one."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values summed over the ranks."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the training state below the folder."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; UserError if it is missing or belongs to another model."""
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """The full state dict on rank 0, on the CPU, floating tensors in float32; None on other ranks."""
        ...


@dataclass
class MetricSums:
    """Sums over micro-batches, then over ranks: the loss, the task's own, and the count of valid targets."""

    ranks: Ranks
    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, output: LossOutput, count: Tensor) -> None:
        """Take in one micro-batch."""
        news = {**output.sums, "loss": output.loss_sum.detach(), "": count}
        for name, value in news.items():
            value = value.double()
            self.totals[name] = self.totals[name] + value if name in self.totals else value

    def start(self) -> "PendingSums":
        """Begin the one all-reduce; the sums can be read from what is returned."""
        shapes = {name: self.totals[name].shape for name in sorted(self.totals)}
        vector = torch.cat([self.totals[name].flatten() for name in shapes])
        return PendingSums(shapes, vector, self.ranks.start_sum(vector))


@dataclass(frozen=True)
class PendingSums:
    """Sums over ranks that may still be under way."""

    shapes: dict[str, torch.Size]
    vector: Tensor
    work: Pending

    def summarise(self, task: Task) -> tuple[float, dict[str, float]]:
        """Mean loss and metrics; (NaN, {}) if no target was valid."""
        self.work.wait()
        parts = self.vector.cpu().split([shape.numel() for shape in self.shapes.values()])
        named = zip(self.shapes.items(), parts, strict=True)
        sums: dict[str, Any] = {name: part.view(shape) if shape else float(part) for (name, shape), part in named}
        count = sums.pop("")
        if not count:
            return math.nan, {}
        return sums["loss"] / count, task.summarise(sums, count)


def count_targets(task: Task, micro_batches: Sequence[Batch]) -> tuple[list[Tensor], Tensor]:
    """Valid targets of each micro-batch, and their total, 0-d float64."""
    counts = [task.count(batch).double() for batch in micro_batches]
    return counts, torch.stack(counts).sum()


def evaluate(model: nn.Module, task: Task, batches: Iterable[Batch], ranks: Ranks) -> dict[str, float]:
    """The task's metrics over all ranks' valid samples.

    Runs in evaluation mode without gradients and restores the mode. Every rank must have the same number of batches.
    Raises UserError if there is no batch or no valid target.
    """
    sums = MetricSums(ranks)
    tell_step(task, 0)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                sums.add(task.loss(model, batch), task.count(batch))
    finally:
        model.train(training)
    if not sums.totals:
        raise UserError("the evaluation set gave no batch; wanted at least one for each worker: check the data's split")
    loss, metrics = sums.start().summarise(task)
    if math.isnan(loss) and not metrics:
        raise UserError("the evaluation set has no valid target: check the data's split and labels")
    return metrics


def tell_step(task: Task, step: int) -> None:
    """Tell a task that draws at random (MixUp, word masks) which step it draws for, so that a resume repeats it."""
    if hasattr(task, "step"):
        task.step = step  # pyright: ignore[reportAttributeAccessIssue] only some tasks draw


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means on a device: bf16 on GPUs that have it, else fp32 (bf16 is emulated on CPUs, and slow)."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def allow_tf32(half: bool, device: torch.device) -> None:
    """In bf16 let a GPU take the products that stay in float32 as TF32, which keeps three bits more than bf16 does."""
    if half and device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def default_device() -> torch.device:
    """The current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def cpu_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, floating tensors as float32, all contiguous."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def untrained(module: nn.Module) -> dict[str, Tensor]:
    """What of the state dict the optimizer does not hold: buffers and frozen parameters, the tensors themselves."""
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad)
    }


class TorchEngine:
    """The engine protocol with torch alone.

    Parameters and optimizer state are whole on every rank; gradients are summed over the ranks in one all-reduce a
    step. Parameters without a gradient have gradient zero, as under ZeRO. At the start all ranks take rank 0's weights.
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        optim: OptimConfig,
        schedule: Schedule,
        *,
        device: torch.device | None = None,
        precision: Precision = "auto",
    ) -> None:
        self.device = device or default_device()
        self.precision = resolve_precision(precision, self.device)
        allow_tf32(self.precision == "bf16", self.device)
        self.module = module.to(self.device)
        self.ranks = Ranks(self.device)
        self.rank, self.world = self.ranks.rank, self.ranks.world
        self._task, self._optim, self._schedule = task, optim, schedule
        self._params = [param for param in module.parameters() if param.requires_grad]
        self._optimizer = build_optimizer(optim, module)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        named = ((name, param) for name, param in module.named_parameters() if param.requires_grad)
        self._layouts = whole_layouts(named)
        self.ranks.broadcast([*(param.data for param in module.parameters()), *module.buffers()])

    def step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """One optimizer step, number `step` counted from 0."""
        tell_step(self._task, step)
        lr = self._optim.lr * self._schedule(step)
        set_learning_rate(self._optimizer, lr)
        pending = self._accumulate(micro_batches)
        norm = self._reduce_and_clip()
        skipped = not math.isfinite(norm)
        if not skipped:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        loss, metrics = pending.summarise(self._task)
        return StepResult(step, loss, metrics, norm, lr, skipped)

    def _accumulate(self, micro_batches: Sequence[Batch]) -> PendingSums:
        """Gradients of the global mean loss into this rank's `.grad`, up to the sum over ranks."""
        counts, total = count_targets(self._task, micro_batches)
        counting = self.ranks.start_sum(total)
        sums = MetricSums(self.ranks)
        if not self.module.training:
            self.module.train()
        for index, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
            with self._autocast():
                output = self._task.loss(self.module, batch)
            sums.add(output, count)
            if index == 0:
                counting.wait()
            (output.loss_sum / total.clamp(min=1).to(output.loss_sum.dtype)).backward()
        return sums.start()

    def _reduce_and_clip(self) -> float:
        """Sum the gradients over the ranks, clip them, and return their norm before clipping."""
        for param in self._params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        grads = [param.grad for param in self._params if param.grad is not None]
        self.ranks.sum_flat(grads)
        norm = torch.nn.utils.get_total_norm(grads)
        if self._optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._params, self._optim.clip, norm)
        return float(norm)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The task's metrics over all ranks' valid samples."""
        with self._autocast():
            return evaluate(self.module, self._task, batches, self.ranks)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values summed over the ranks."""
        return self.ranks.sum(values)

    def save(self, folder: Path) -> None:
        """Write this rank's generators, and on rank 0 weights, moments and buffers, below the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder, f"rng-{self.rank:05d}", random_state(self.device))
        if self.rank == 0:
            save_shard(folder, 0, self._layouts, self._optimizer)
            save_tensors(folder, "rest", untrained(self.module))
            save_header(folder, self._shapes, writers=1, optim=self._optim.kind, world=self.world, zero_stage=None)

    def load(self, folder: Path) -> None:
        """Restore what an engine's `save` wrote, at any world size; the generators too if this rank saved them.

        Raises UserError if nothing is there, or it was saved from another model or optimizer.
        """
        header = check_header(folder, self._shapes, self._optim.kind)
        load_shards(folder, header["writers"], self._layouts, self._optimizer)
        rest = load_tensors(folder, "rest") or {}
        for name, tensor in untrained(self.module).items():
            tensor.detach().copy_(rest[name])
        generators = load_tensors(folder, f"rng-{self.rank:05d}")
        if generators is not None:
            set_random_state(generators, self.device)

    def weights(self) -> dict[str, Tensor] | None:
        """The full float32 CPU state dict on rank 0, None elsewhere."""
        return cpu_float32(self.module.state_dict()) if self.rank == 0 else None

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()
