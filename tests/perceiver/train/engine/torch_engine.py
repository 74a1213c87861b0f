"""The engine protocol with plain torch, in one process or over `torch.distributed`: the reference for DeepSpeed's."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perceiver.optim.averaging import EmaConfig, expect_average
from perceiver.optim.config import OptimConfig, build_optimizer
from perceiver.optim.partition import AVERAGE, state_of, whole_layouts
from perceiver.optim.schedules import Schedule
from perceiver.tasks import Batch, Task
from perceiver.train.checkpoint.shards import (
    check_header,
    load_shards,
    load_tensors,
    save_header,
    save_shard,
    save_tensors,
)
from perceiver.train.engine.protocol import (
    MetricSums,
    PendingSums,
    Precision,
    StepResult,
    allow_tf32,
    count_targets,
    cpu_float32,
    default_device,
    evaluate,
    set_learning_rate,
    tell_step,
    untrained,
)
from perceiver.train.engine.ranks import Ranks, random_state, set_random_state


class TorchEngine:
    """The engine protocol with torch alone.

    Parameters and optimizer state are complete on every rank; gradients are summed over the ranks. Parameters without a
    gradient have gradient zero, as under ZeRO. At the start all ranks take rank 0's weights.
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        optim: OptimConfig,
        schedule: Schedule,
        *,
        device: torch.device | None = None,
        precision: Precision = "fp32",
        ema: EmaConfig | None = None,
    ) -> None:
        self.device = device or default_device()
        self.precision = precision
        allow_tf32(self.precision == "bf16", self.device)
        self.module = module.to(self.device)
        self.ranks = Ranks(self.device)
        self.rank, self.world = self.ranks.rank, self.ranks.world
        self._task, self._optim, self._schedule = task, optim, schedule
        self.refuse: Callable[[float], bool] | None = None
        self._params = [param for param in module.parameters() if param.requires_grad]
        self._optimizer = build_optimizer(optim, module)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        named = ((name, param) for name, param in module.named_parameters() if param.requires_grad)
        self._layouts = whole_layouts(named)
        self._ema = ema
        if ema is not None:
            expect_average(self._optimizer)
            for param in self._params:
                state_of(self._optimizer, param)[AVERAGE] = param.detach().clone()
        if self.world > 1:
            for tensor in (*(param.data for param in module.parameters()), *module.buffers()):
                dist.broadcast(tensor, src=0)

    def step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Take one optimizer step; `step` counts from 0."""
        tell_step(self._task, step)
        lr = self._optim.lr * self._schedule(step)
        set_learning_rate(self._optimizer, lr)
        pending = self._accumulate(micro_batches)
        norm = self._reduce_and_clip()
        loss, metrics = pending.summarise(self._task)
        if self.refuse is not None and self.refuse(loss):
            norm = math.inf
        skipped = not math.isfinite(norm)
        if not skipped:
            self._optimizer.step()
            self._average(step)
        self._optimizer.zero_grad(set_to_none=False)
        return StepResult(step, loss, metrics, norm, lr, skipped)

    def _accumulate(self, micro_batches: Sequence[Batch]) -> PendingSums:
        """Add this rank's part of the gradients of the global mean loss to `.grad`."""
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
        if self.world > 1:
            for grad in grads:
                dist.all_reduce(grad)
        norm = torch.nn.utils.get_total_norm(grads)
        if self._optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._params, self._optim.clip, norm)
        return float(norm)

    def _average(self, step: int) -> None:
        """Update the average of the weights by its definition, one tensor after the other."""
        if self._ema is None or (step + 1) % self._ema.every:
            return
        update = (step + 1) // self._ema.every
        decay = self._ema.decay
        if self._ema.warmup:
            decay = min(decay, (1 + update) / (10 + update))
        for param in self._params:
            average = self._optimizer.state[param][AVERAGE]
            average.copy_(decay * average + (1 - decay) * param.detach())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model the average of its weights in a `with` block."""
        weights = [param.detach().clone() for param in self._params]
        for param in self._params if self._ema is not None else ():
            param.data.copy_(self._optimizer.state[param][AVERAGE])
        yield
        for param, values in zip(self._params, weights, strict=True):
            param.data.copy_(values)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the task's metrics over all ranks' valid samples, of the averaged weights if there are any."""
        with self._autocast(), self.averaged():
            return evaluate(self.module, self._task, batches, self.ranks)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values summed over the ranks."""
        return self.ranks.sum(values)

    def save(self, folder: Path) -> None:
        """Write this rank's generators, and on rank 0 weights, moments and buffers, below the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder, f"rng-{self.rank:05d}", random_state(self.device))
        if self.rank == 0:
            save_shard(folder, 0, self._layouts, self._optimizer)
            save_tensors(folder, "rest", untrained(self.module))
            save_header(folder, self._shapes, writers=1, **self._facts())

    def _facts(self) -> dict[str, Any]:
        averaged = self._ema is not None
        return {"optim": self._optim.kind, "world": self.world, "zero_stage": None, "averaged": averaged}

    def load(self, folder: Path) -> int:
        """Restore what an engine's `save` wrote, at any world size; the generators too if this rank saved them.

        Returns the number of updates that it contains.

        Raises UserError if nothing is there, or it was saved from another model or optimizer.
        """
        header = check_header(folder, self._shapes, self._optim.kind)
        steps = load_shards(folder, header.writers, self._layouts, self._optimizer)
        others = untrained(self.module)
        rest = load_tensors(folder, "rest", {name: self._shapes[name] for name in others}) or {}
        for name, tensor in others.items():
            tensor.detach().copy_(rest[name])
        generators = load_tensors(folder, f"rng-{self.rank:05d}")
        if generators is not None:
            set_random_state(generators, self.device)
        return steps

    def weights(self) -> dict[str, Tensor] | None:
        """Return the full float32 CPU state dict on rank 0, None elsewhere."""
        return cpu_float32(self.module.state_dict()) if self.rank == 0 else None

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()
