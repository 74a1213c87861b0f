"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the engine protocol. The only module that imports deepspeed.

DeepSpeed is imported when an engine is built, not with this module. Nothing is compiled: the optimizer is a client
optimizer, and the one operator that DeepSpeed would build by itself on CPUs is switched off before it looks.
"""

import contextlib
import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perceiver.optim.config import OptimConfig, build_optimizer
from perceiver.optim.lamb import Lamb
from perceiver.optim.schedules import Schedule
from perceiver.train.checkpoint.shards import (
    FlatLayout,
    Layouts,
    Piece,
    check_header,
    load_shards,
    load_tensors,
    save_header,
    save_shard,
    save_tensors,
    whole_layouts,
)
from perceiver.train.engine.deepspeed_config import BatchPlan, DeepSpeedConfig, plan_config
from perceiver.train.engine.protocol import (
    Batch,
    MetricSums,
    PendingSums,
    Precision,
    StepResult,
    Task,
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

__all__ = ["BatchPlan", "DeepSpeedConfig", "DeepSpeedEngine", "init_distributed", "plan_config"]


def init_distributed(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Make DeepSpeed's communication ready, over the process group that exists or over a new one.

    Without a process group: one is made from the RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT variables if RANK is
    set, else this process is alone. Safe to call again. Nothing is compiled, and DeepSpeed's log is cut to errors.
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
    deepspeed = _import_deepspeed()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its calls, each step
    _compile_nothing(deepspeed.ops)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _import_deepspeed() -> Any:
    """Import DeepSpeed without what it imports for features that are not used here.

    Its autotuner tries to import MLflow, and its check for the Muon optimizer has torch's compiler wrap Muon's kernels:
    together 2 s of processor time in every worker.
    """
    if "deepspeed" in sys.modules:
        return sys.modules["deepspeed"]
    with _absent("mlflow"):
        import deepspeed
    with contextlib.suppress(ImportError, AttributeError):
        from deepspeed.runtime import compiler

        kept, compiler.compile = compiler.compile, lambda: lambda kernel: kernel
        try:
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
        finally:
            compiler.compile = kept
    return deepspeed


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Make `import module` fail inside, unless it is imported already."""
    hidden = module not in sys.modules
    if hidden:
        sys.modules[module] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[module]


def _compile_nothing(ops: Any) -> None:
    """Tell DeepSpeed that its shared-memory all-reduce cannot be built here.

    `init_distributed` would build it with a compiler at the first start on a machine (minutes), and looks it up in this
    internal table, which it would fill by probing all operators. Only set where DeepSpeed still has that table.
    """
    if hasattr(type(ops), "__compatible_ops__") or "_probe_compatible_ops" in vars(ops):
        ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    elif "__compatible_ops__" in vars(ops):
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedEngine:
    """The engine protocol on DeepSpeed, with ZeRO by one key.

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
    ) -> None:
        """Build it on every rank.

        batch: micro-batch size, accumulation and world size, for DeepSpeed's own bookkeeping.
        Raises UserError where the DeepSpeed JSON contradicts the recipe.
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
        self._task, self._optim, self._schedule = task, optim, schedule
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        self._params = [param for param in module.parameters() if param.requires_grad]
        names = {id(param): name for name, param in module.named_parameters()}
        self._optimizer = build_optimizer(optim, module.to(self.device))
        groups: list[list[Any]] = [list(group["params"]) for group in self._optimizer.param_groups]
        if plan["bf16"]["enabled"]:
            # The weights will be bf16, the tokens that the model computes are float32: autocast brings them together.
            module.forward = torch.autocast(self.device.type, torch.bfloat16)(module.forward)
        self._engine = _initialize(module, self._optimizer, plan)
        self.module: nn.Module = self._engine.module
        self._layouts = _layouts(groups, self._optimizer, names, self.zero_stage, self.rank)
        if isinstance(self._optimizer, Lamb) and self.zero_stage > 0:
            self._optimizer.shard(self._layouts, self._sum_norms)

    def step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """One optimizer step, number `step` counted from 0."""
        tell_step(self._task, step)
        lr = self._optim.lr * self._schedule(step)
        set_learning_rate(self._engine.optimizer, lr)
        pending = self._accumulate(micro_batches)
        norm = self._update()
        loss, metrics = pending.summarise(self._task)
        return StepResult(step, loss, metrics, norm, lr, skipped=not math.isfinite(norm))

    def _accumulate(self, micro_batches: Sequence[Batch]) -> PendingSums:
        """Gradients of the global mean loss, reduced over the ranks as the ZeRO stage has it."""
        counts, total = count_targets(self._task, micro_batches)
        counting = self.ranks.start_sum(total)
        sums = MetricSums(self.ranks)
        pending: PendingSums | None = None
        if not self.module.training:
            self._engine.train()
        for index, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
            last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(last)
            output = self._task.loss(self._engine, batch)
            sums.add(output, count)
            if index == 0:
                counting.wait()
            if last:
                pending = sums.start()
            scale = self.world / total.clamp(min=1)
            self._engine.backward(output.loss_sum * scale.to(output.loss_sum.dtype), scale_wrt_gas=False)
        assert pending is not None, "a step needs at least one micro-batch"
        return pending

    def _update(self) -> float:
        """Clip, step, clear the gradients; returns their norm before clipping, not finite if the step was skipped."""
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

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The task's metrics over all ranks' valid samples."""
        return evaluate(self._engine, self._task, batches, self.ranks)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values summed over the ranks."""
        return self.ranks.sum(values)

    def save(self, folder: Path) -> None:
        """Write this rank's shard and generators below the folder, which may be another one on each rank.

        At stages 1 to 3 each rank writes what it holds, at stage 0 rank 0 writes all; rank 0 adds buffers and a header.
        """
        folder.mkdir(parents=True, exist_ok=True)
        writers = self.world if self.zero_stage > 0 else 1
        if self.rank < writers:
            save_shard(folder, self.rank, self._layouts, self._optimizer)
        save_tensors(folder, f"rng-{self.rank:05d}", random_state(self.device))
        rest = {name: _gathered(tensor) for name, tensor in untrained(self.module).items()}
        if self.rank == 0:
            save_tensors(folder, "rest", rest)
            facts = {"optim": self._optim.kind, "world": self.world, "zero_stage": self.zero_stage}
            save_header(folder, self._shapes, writers, **facts)

    def load(self, folder: Path) -> None:
        """Restore what an engine's `save` wrote, merged into one folder: from any ZeRO stage and number of workers.

        Raises UserError if nothing is there, it is incomplete, or it was saved from another model or optimizer.
        """
        header = check_header(folder, self._shapes, self._optim.kind)
        self._engine.global_steps = load_shards(folder, header["writers"], self._layouts, self._optimizer)
        _refresh_weights(self._engine.optimizer, self.zero_stage)
        rest = load_tensors(folder, "rest") or {}
        for name, tensor in untrained(self.module).items():
            _assign(tensor, rest[name])
        generators = load_tensors(folder, f"rng-{self.rank:05d}")
        if generators is not None:
            set_random_state(generators, self.device)

    def weights(self) -> dict[str, Tensor] | None:
        """The full float32 CPU state dict on rank 0, None elsewhere; gathers what ZeRO has sharded."""
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
        """Sum LAMB's squared norms over the ranks; they may lie on the CPU when the optimizer is offloaded."""
        if self.world > 1:
            there = squares.to(self.device)
            dist.all_reduce(there)
            squares.copy_(there)


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any]) -> Any:
    import deepspeed

    with _quiet():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=plan, dist_init_required=False)
    if plan["zero_optimization"]["stage"] == 3:
        _gather_for_backward(engine.module)
    return engine


def _gather_for_backward(root: Any) -> None:
    """Have ZeRO-3 gather, before the backward pass, what modules use whose outputs are no plain tensors.

    DeepSpeed hooks itself to a module's output tensors; a modality returns an `Inputs`, which it does not look into, so
    its learned positions and modality vectors would be missing. The whole model gathers them instead.
    """
    import deepspeed

    def hook(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor | tuple | list | dict):
            used = [*module.parameters(recurse=False), *dict(getattr(module, "_external_params", {})).values()]
            for param in used:
                deepspeed.zero.register_external_parameter(root, param)

    for module in root.modules():
        if module is not root:
            module.register_forward_hook(hook)


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep DeepSpeed's prints off the user's screen while it sets up, saves or loads."""
    with contextlib.redirect_stdout(_Sink()):
        yield


class _Sink:
    """A stream that drops what is written to it."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def _gathered(tensor: Any) -> Tensor:
    """The tensor in full, also if it is a frozen parameter that ZeRO-3 has cut; every rank must call it."""
    if not hasattr(tensor, "ds_id"):
        return tensor
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def _assign(tensor: Any, value: Tensor) -> None:
    """Overwrite a buffer or a frozen parameter, also one that ZeRO-3 has cut."""
    if not hasattr(tensor, "ds_id"):
        tensor.detach().copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
        tensor.data.copy_(value)


def _refresh_weights(zero: Any, zero_stage: int) -> None:
    """Make the model's weights what the optimizer's flat tensors say."""
    if zero_stage in (1, 2):
        zero.update_lp_params()
    elif zero_stage == 3:
        zero._partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero._post_step(set())


def _layouts(groups: list[list[Any]], optimizer: Any, names: dict[int, str], stage: int, rank: int) -> Layouts:
    """Which elements of which parameters the optimizer's tensors hold on this rank.

    groups: the parameters of each group as they were before DeepSpeed replaced them. names: by id of the parameter.
    """
    if stage == 0:
        return whole_layouts((names[id(param)], param) for params in groups for param in params)
    if stage == 3:
        return _stage3_layouts(groups[0][0]._z3_optimizer, names, rank)
    layouts = {}
    for params, group in zip(groups, optimizer.param_groups, strict=True):
        (flat,) = group["params"]
        pieces = []
        for number, param in enumerate(params):
            held = param._hp_mapping
            if held is not None and held.hp_fragment_address.numel > 0:
                here, there = held.hp_fragment_address, held.lp_fragment_address
                pieces.append(Piece(number, there.start, here.start, here.numel))
        layouts[flat] = FlatLayout(tuple(names[id(param)] for param in params), tuple(pieces))
    return layouts


def _stage3_layouts(zero: Any, names: dict[int, str], rank: int) -> Layouts:
    """Stage 3 cuts every parameter over the ranks and lays the cuts one after another, in sub-groups."""
    layouts = {}
    for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        pieces, offset = [], 0
        for number, param in enumerate(params):
            share = param.partition_numel()
            length = min(share, max(0, param.ds_numel - rank * share))
            if length:
                pieces.append(Piece(number, rank * share, offset, length))
            offset += share
        layouts[flat] = FlatLayout(tuple(names[id(param)] for param in params), tuple(pieces))
    return layouts
