"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the engine protocol. Only this package imports deepspeed.

DeepSpeed is imported when an engine is built, not with this module. Nothing is compiled: the optimizer is a client
optimizer, and the one operator that DeepSpeed would build on CPUs is switched off first.
"""

import contextlib
import io
import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.optim.averaging import EmaConfig, expect_average, start_average, swap_average, update_average
from perceiver.optim.config import OptimConfig, build_optimizer
from perceiver.optim.lamb import Lamb
from perceiver.optim.partition import AVERAGE, moments_of, state_of
from perceiver.optim.schedules import Schedule
from perceiver.tasks import Batch, Task
from perceiver.train.checkpoint.shards import (
    check_header,
    load_shards,
    load_tensors,
    read_parameters,
    save_header,
    save_shard,
    save_tensors,
    save_whole_shard,
)
from perceiver.train.engine.deepspeed_config import BatchPlan, DeepSpeedConfig, plan_config
from perceiver.train.engine.deepspeed_internals import (
    external_parameters,
    flat_layouts,
    refresh_weights,
    skip_shared_memory_build,
)
from perceiver.train.engine.protocol import (
    Compile,
    MetricSums,
    PendingSums,
    Precision,
    StepResult,
    allow_tf32,
    count_targets,
    cpu_float32,
    default_device,
    evaluate,
    set_layers,
    set_learning_rate,
    tell_step,
    untrained,
)
from perceiver.train.engine.ranks import Ranks, random_state, set_random_state
from perceiver.train.engine.replay import ReplayError, replay
from perceiver.train.engine.timing import ForwardTimer


def init_distributed(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Initialize DeepSpeed's communication, over the existing process group or a new one.

    A new group is created from the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT if RANK is set, else with
    this process alone. May be called again. DeepSpeed logs only errors afterwards.
    """
    device = default_device()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    with _without_mlflow():
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its calls, each step
    skip_shared_memory_build()
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """Let imports inside not find MLflow, unless it is imported already.

    DeepSpeed imports it for its autotuner, if it is installed: 1.6 s of 4.9 s and 100 MB per worker, for nothing here.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]  documented: its import fails
    try:
        yield
    finally:
        if hidden:
            del sys.modules["mlflow"]


class DeepSpeedEngine:
    """The engine protocol on DeepSpeed, at any ZeRO stage.

    Each micro-batch's summed loss is divided by the global count of valid targets before its backward pass; DeepSpeed
    averages gradients over the ranks, so the loss is multiplied by their number.
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        optim: OptimConfig,
        schedule: Schedule,
        config: DeepSpeedConfig,
        batch: BatchPlan,
        *,
        device: torch.device | None = None,
        precision: Precision = "auto",
        compile: Compile = "auto",
        half_residual: bool = False,
        replay_every: int | None = None,
        ema: EmaConfig | None = None,
    ) -> None:
        """Build the engine on every rank.

        Args:
            module: the model, on the CPU or the device.
            task: gives the loss and the metrics.
            optim: optimizer and clipping.
            schedule: multiplier of the learning rate by step.
            config: ZeRO stage and DeepSpeed JSON.
            batch: micro-batch size, accumulation and world size, for DeepSpeed's own bookkeeping.
            device: default: the current GPU, else the CPU.
            precision: see `train.precision`.
            compile: see `train.compile`.
            half_residual: see `train.bf16_residual`.
            replay_every: see `train.replay_every`.
            ema: see `train.ema`.

        Raises:
            UserError: the DeepSpeed JSON contradicts the recipe.
        """
        self.device = device or default_device()
        trainable = sum(param.numel() for param in module.parameters() if param.requires_grad)
        plan = plan_config(
            config, optim, batch, precision=precision, device_type=self.device.type, parameters=trainable
        )
        allow_tf32(plan["bf16"]["enabled"] or plan["torch_autocast"]["enabled"], self.device)
        init_distributed()
        self.ranks = Ranks(self.device)
        self.rank, self.world = self.ranks.rank, self.ranks.world
        assert self.world == batch.world, (self.world, batch.world)
        self.zero_stage: int = plan["zero_optimization"]["stage"]
        set_layers(module, compile, half_residual=half_residual, zero_stage=self.zero_stage, device=self.device)
        self._task, self._optim, self._schedule, self._ema = task, optim, schedule, ema
        self._timer = ForwardTimer(self.device)
        self._replay_every = replay_every
        self.refuse: Callable[[float], bool] | None = None
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        self._params = [param for param in module.parameters() if param.requires_grad]
        names = {id(param): name for name, param in module.named_parameters()}
        self._optimizer = build_optimizer(optim, module.to(self.device))
        groups: list[list[Any]] = [list(group["params"]) for group in self._optimizer.param_groups]
        if plan["bf16"]["enabled"]:
            # The weights will be bf16, the inputs that the model computes are float32: autocast casts them.
            module.forward = torch.autocast(self.device.type, torch.bfloat16)(module.forward)
        self._engine = _initialize(module, self._optimizer, plan)
        self.module: nn.Module = self._engine.module
        zero = self._engine.optimizer
        self._layouts = flat_layouts(groups, self._optimizer, zero, names, self.zero_stage, self.rank)
        if isinstance(self._optimizer, Lamb) and self.zero_stage > 0:
            if self._layouts is None:
                raise UserError(
                    f"optim.kind = 'lamb' with deepspeed.zero_stage = {self.zero_stage}: this DeepSpeed version does "
                    "not expose how ZeRO shards tensors; set deepspeed.zero_stage=0"
                )
            self._optimizer.shard(self._layouts, self._sum_norms)
        if ema is not None:
            expect_average(self._optimizer)
        if self._layouts is None:
            self._create_states()
        if ema is not None:
            start_average(self._optimizer, list(self._layouts or self._optimizer.state))

    def step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """See `Engine`."""
        tell_step(self._task, step)
        lr = self._optim.lr * self._schedule(step)
        set_learning_rate(self._engine.optimizer, lr)
        if self._replay_every and (step + 1) % self._replay_every == 0:
            self._replay(micro_batches[0], step + 1)
        pending = self._accumulate(micro_batches)
        norm = self._update()
        if self._ema is not None and math.isfinite(norm):
            update_average(self._optimizer, self._ema, step)
        loss, metrics = pending.summarise(self._task)
        forward_s = self._timer.take() if self.zero_stage < 3 else None  # stage 3 gathers weights in forward passes
        return StepResult(step, loss, metrics, norm, lr, skipped=not math.isfinite(norm), forward_s=forward_s)

    def _replay(self, batch: Batch, step: int) -> None:
        """Compute a micro-batch twice and compare; raise `ReplayError` if anything differs."""
        self._engine.train()
        if different := replay(self.module, self._task, batch, self.device):
            raise ReplayError(
                f"step {step} on rank {self.rank} ({platform.node()}, {self.device}): {different} differs between two "
                "passes from the same state (train.replay_every): the device may be faulty"
            )

    def _accumulate(self, micro_batches: Sequence[Batch]) -> PendingSums:
        """Compute the gradients of the global mean loss, reduced over the ranks as the ZeRO stage requires."""
        counts, total = count_targets(self._task, micro_batches)
        counting = self.ranks.start_sum(total)
        sums = MetricSums(self.ranks)
        pending: PendingSums | None = None
        if not self.module.training:
            self._engine.train()
        for index, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
            last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(last)
            with self._timer.measure():
                output = self._task.loss(self._engine, batch)
            sums.add(output, count)
            if index == 0:
                counting.wait()
            if last:
                pending = sums.start()
            scale = self.world / total.clamp(min=1)
            if pending is not None and self.refuse is not None and self.refuse(pending.summarise(self._task)[0]):
                scale = scale * math.nan  # every ZeRO stage skips an update whose gradient is not finite
            self._engine.backward(output.loss_sum * scale.to(output.loss_sum.dtype), scale_wrt_gas=False)
        assert pending is not None, "a step needs at least one micro-batch"
        pending.fetch()
        return pending

    def _update(self) -> float:
        """Clip, step, clear the gradients; return their norm before clipping, not finite if the step was skipped."""
        if self.zero_stage > 0:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            return norm if self._engine.was_step_applied() else math.inf
        norm = float(torch.nn.utils.get_total_norm([param.grad for param in self._params if param.grad is not None]))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Engine`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchange the weights and their average, exactly: twice changes nothing."""
        if self._ema is None:
            return
        if self._layouts is None:
            self._swap_gathered()
        else:
            swap_average(self._optimizer)
            refresh_weights(self._engine.optimizer, self.zero_stage)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """See `Engine`."""
        with self.averaged():
            return evaluate(self._engine, self._task, batches, self.ranks)

    def sum(self, values: Sequence[float]) -> list[float]:
        """See `Engine`."""
        return self.ranks.sum(values)

    def save(self, folder: Path) -> None:
        """Write this rank's shard and generators to a folder, which may differ between ranks.

        At stages 1 to 3 each rank writes its own part, at stage 0 rank 0 writes all; rank 0 adds buffers and a header.
        """
        # All exchanges come first where they can: a rank whose disk is full would leave the others waiting in them.
        rest = {name: _gathered(tensor) for name, tensor in untrained(self.module).items()}
        folder.mkdir(parents=True, exist_ok=True)
        writers = self.world if self.zero_stage > 0 and self._layouts is not None else 1
        if self._layouts is None:
            self._save_gathered(folder)
        elif self.rank < writers:
            save_shard(folder, self.rank, self._layouts, self._optimizer)
        save_tensors(folder, f"rng-{self.rank:05d}", random_state(self.device))
        if self.rank == 0:
            save_tensors(folder, "rest", rest)
            facts = {"optim": self._optim.kind, "world": self.world, "zero_stage": self.zero_stage}
            facts["averaged"] = self._ema is not None
            save_header(folder, self._shapes, writers, **facts)

    def load(self, folder: Path) -> int:
        """Restore what `save` wrote on all ranks, merged into one folder: from any ZeRO stage and number of workers.

        Returns the number of updates that it contains.

        Raises:
            UserError: the state is missing, incomplete, or from another model or optimizer.
        """
        header = check_header(folder, self._shapes, self._optim.kind)
        if self._layouts is None:
            self._engine.global_steps = self._load_gathered(folder, header.writers)
        else:
            self._engine.global_steps = load_shards(folder, header.writers, self._layouts, self._optimizer)
            refresh_weights(self._engine.optimizer, self.zero_stage)
        others = untrained(self.module)
        rest = load_tensors(folder, "rest", {name: self._shapes[name] for name in others}) or {}
        for name, tensor in others.items():
            _assign(tensor, rest[name])
        generators = load_tensors(folder, f"rng-{self.rank:05d}")
        if generators is not None:
            set_random_state(generators, self.device)
        return self._engine.global_steps

    def _create_states(self) -> None:
        """Create the moments, as zeros, for DeepSpeed's public functions; the weights do not change.

        Stages 1 and 2 link a parameter to its moments after the first update of any group, so all must exist by then,
        and a state can be loaded only after one: this is an update with zero gradients and a learning rate of zero.
        """
        import deepspeed

        if self.zero_stage < 3:
            for group in self._optimizer.param_groups:
                for tensor in group["params"]:
                    state_of(self._optimizer, tensor)
        set_learning_rate(self._engine.optimizer, 0.0)
        self._engine.set_gradient_accumulation_boundary(True)
        with deepspeed.zero.GatheredParameters(self._params, enabled=self.zero_stage == 3):
            zero = torch.stack([(param * 0).sum() for param in self._params]).sum()
            self._engine.backward(zero, scale_wrt_gas=False)
        self._engine.step()
        self._engine.global_steps = 0
        for state in self._optimizer.state.values():
            for values in state.values():  # L2 decay is a gradient, which the moments now contain
                values.zero_()

    def _save_gathered(self, folder: Path) -> None:
        """Gather each parameter and its moments by DeepSpeed's public functions; rank 0 writes them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: dict[str, dict[str, Tensor]] = {}
        for name, param in self._trained():
            parts: dict[str, Any] = {"param": safe_get_full_fp32_param(param)}
            parts |= {key: safe_get_full_optimizer_state(param, key) for key in moments_of(self._optimizer)}
            if self.rank == 0:
                found[name] = cpu_float32(parts)
        if self.rank == 0:
            save_whole_shard(folder, 0, found, self._engine.global_steps)

    def _load_gathered(self, folder: Path, writers: int) -> int:
        """Set each parameter and its moments by DeepSpeed's public functions; return the number of steps taken."""
        params, steps = dict(self._trained()), 0
        shapes = {name: self._shapes[name] for name in params}
        for name, parts, taken in read_parameters(folder, writers, shapes, moments_of(self._optimizer)):
            steps = taken
            _assign(params[name], parts["param"])  # what the model computes with until the next update
            for key, values in parts.items():
                self._set_gathered(params[name], key, values.to(self.device))
        for state in self._optimizer.state.values():
            state["step"].fill_(steps)
        return steps

    def _set_gathered(self, param: Any, key: str, values: Tensor) -> None:
        """Set `param` or a moment of a parameter from its whole value."""
        import deepspeed.utils as zero

        if self.zero_stage < 3:
            if key == "param":
                zero.safe_set_full_fp32_param(param, values)
            else:
                zero.safe_set_full_optimizer_state(param, values, key)
            return
        # Setting the whole value fails where the ranks do not share out its elements evenly.
        share = -(-values.numel() // self.world)
        padded = torch.nn.functional.pad(values.flatten(), (0, share * self.world - values.numel()))
        mine = padded.narrow(0, share * self.rank, share)
        if key == "param":
            zero.safe_set_local_fp32_param(param, mine)
        else:
            zero.safe_set_local_optimizer_state(param, mine, key)

    def _swap_gathered(self) -> None:
        """Exchange each parameter and its average by DeepSpeed's public functions."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for _, param in self._trained():
            weights: Any = safe_get_full_fp32_param(param)
            average: Any = safe_get_full_optimizer_state(param, AVERAGE)
            weights, average = weights.clone(), average.clone()
            _assign(param, average)
            self._set_gathered(param, "param", average)
            self._set_gathered(param, AVERAGE, weights)

    def _trained(self) -> list[tuple[str, Any]]:
        return [(name, param) for name, param in self.module.named_parameters() if param.requires_grad]

    def weights(self) -> dict[str, Tensor] | None:
        """See `Engine`; gathers what ZeRO has sharded."""
        from deepspeed.utils import safe_get_full_fp32_param

        full: dict[str, Tensor] = {}
        tensor: Any
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            if trained and (self.zero_stage == 3 or (self.zero_stage > 0 and tensor.dtype != torch.float32)):
                tensor = safe_get_full_fp32_param(tensor)
            tensor = _gathered(tensor)
            if self.rank == 0:
                full |= cpu_float32({name: tensor})
        return full if self.rank == 0 else None

    def _sum_norms(self, squares: Tensor) -> None:
        """Sum LAMB's squared norms over the ranks; they are on the CPU when the optimizer is offloaded."""
        if self.world > 1:
            there = squares.to(self.device)
            dist.all_reduce(there)
            squares.copy_(there)


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any]) -> Any:
    import deepspeed

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints while it sets up
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=plan, dist_init_required=False)
    if plan["zero_optimization"]["stage"] == 3:
        _gather_for_backward(engine.module)
    return engine


def _gather_for_backward(root: Any) -> None:
    """Let ZeRO-3 gather the parameters of modules whose outputs are not plain tensors before the backward pass.

    DeepSpeed hooks a module's output tensors. A modality returns an `Inputs`, which it does not inspect, so the learned
    positions and modality vectors would be missing. The whole model gathers them instead.
    """
    import deepspeed

    def hook(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor | tuple | list | dict):
            for param in [*module.parameters(recurse=False), *external_parameters(module)]:
                deepspeed.zero.register_external_parameter(root, param)

    for module in root.modules():
        if module is not root:
            module.register_forward_hook(hook)


def _gathered(tensor: Any) -> Tensor:
    """Return the full tensor, also of a frozen parameter that ZeRO-3 has partitioned; every rank must call this."""
    if not hasattr(tensor, "ds_id"):
        return tensor
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def _assign(tensor: Any, value: Tensor) -> None:
    """Overwrite a buffer or a frozen parameter, also one that ZeRO-3 has partitioned."""
    if not hasattr(tensor, "ds_id"):
        tensor.detach().copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
        tensor.data.copy_(value)
