"""FLOPs, bytes and operations of a training pass, counted on the meta device for a roofline model."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from perceiver import kernels
from perceiver.accounting import is_fused
from perceiver.config import Config
from perceiver.factory import build_model, on_meta
from perceiver.kernels.shared_kv import Float32Region
from perceiver.optim.freezing import freeze

Region = Literal["autocast", "float32", "fused"]


@dataclass(frozen=True)
class StepTrace:
    """The cost of a forward and backward pass, per sample where nothing else is said.

    Bytes are those of float32. Autocast does not change the scores of `shared_kv`, and those of attention whose heads
    are too wide for torch's fused kernels on GPUs.

    Args:
        flops: FLOPs of matrix products and convolutions, multiplications and additions counted separately.
        product_bytes: bytes that these read and write, without `float32_product_bytes`.
        other_bytes: bytes that all other operations read and write, without `float32_other_bytes`.
        kernel_flops: float32 FLOPs of the separable-attention kernel, which has almost no memory traffic.
        operations: number of operations per pass, for any batch.
        float32_flops: those of `flops` that autocast leaves in float32.
        float32_product_bytes: bytes that these products read and write.
        float32_other_bytes: bytes that the other operations on these scores read and write.
        pass_bytes: bytes per pass whatever the batch: weights and their gradients.
        scores: largest number of scores of a `shared_kv`.
        working_bytes: most bytes that one operation reads and writes, the weights' share included.
    """

    flops: int
    product_bytes: int
    other_bytes: int
    kernel_flops: int
    operations: int
    float32_flops: int = 0
    float32_product_bytes: int = 0
    float32_other_bytes: int = 0
    pass_bytes: int = 0
    scores: int = 0
    working_bytes: int = 0


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of each operation's tensors, and the products' FLOPs, by region."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.region: Region = "autocast"
        self.flops: Counter[Region] = Counter()
        self.product_bytes: Counter[Region] = Counter()
        self.other_bytes: Counter[Region] = Counter()
        self.operations = self.largest = self.scores = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        region: Region = "float32" if Float32Region.scores else self.region
        self.scores = max(self.scores, Float32Region.scores)
        self.flops[region] += self.counter.get_total_flops() - before
        size = tensor_bytes(args, kwargs, out)
        self.operations += 1
        self.largest = max(self.largest, size)
        if any(part in str(func) for part in ("mm", "conv", "attention")):
            self.product_bytes[region] += size
        else:
            self.other_bytes[region] += size
        return out

    @contextlib.contextmanager
    def within(self, region: Region) -> Iterator[None]:
        """Count what runs as of a region."""
        self.region = region
        try:
            yield
        finally:
            self.region = "autocast"


def tensor_bytes(*values: Any) -> int:
    """Return the bytes of all tensors in nested values."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


class _Attention(torch.autograd.Function):
    """Attention as torch computes it on a GPU: by a fused kernel, or by products over float32 copies and scores."""

    @staticmethod
    def forward(ctx: Any, traffic: _Traffic, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.traffic, ctx.region = traffic, "fused" if is_fused(q, v) else "float32"
        with traffic.within(ctx.region):
            if ctx.region == "float32":
                q, k, v = q * 1.0, k * 1.0, v * 1.0
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            out = weights @ v
        traffic.product_bytes["autocast"] += tensor_bytes(q, k, v, out)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        with ctx.traffic.within(ctx.region):
            slopes = weights * (grad @ v.transpose(-1, -2))  # reads and writes as much as softmax's gradient
            grads = slopes @ k, slopes.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
            if ctx.region == "float32":
                grads = tuple(each * 1.0 for each in grads)
        ctx.traffic.product_bytes["autocast"] += tensor_bytes(q, k, v, grad, grads)
        return None, *grads


class _GpuAttention(TorchFunctionMode):
    """Replaces the meta device's attention by `_Attention`."""

    def __init__(self, traffic: _Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(self.traffic, *args[:3])
        return func(*args, **(kwargs or {}))


def trace_step(config: Config, *, classes: int | None = None, batch: int = 8, frozen: Sequence[str] = ()) -> StepTrace:
    """Return the cost of a training pass of a config's model, from passes over two batches on the meta device.

    The difference between both batches is what a sample costs; the rest is traffic of the weights. Smaller batches
    could take other paths than those of training (`perceiver.attention.FUSE_TOKENS`). Nothing is computed for the
    gradients of ``frozen`` parameters (patterns, see `train.freeze`).
    """
    with on_meta():
        model = build_model(config, classes=classes).train()
    freeze(model, frozen)
    small, kernel_flops = _trace(model, batch)
    large, _ = _trace(model, 2 * batch)

    def each(name: Literal["product_bytes", "other_bytes"], region: Region) -> int:
        return (getattr(large, name)[region] - getattr(small, name)[region]) // batch

    bytes_of_all = small.product_bytes["autocast"] + small.other_bytes["autocast"]
    product_bytes, other_bytes = each("product_bytes", "autocast"), each("other_bytes", "autocast")
    return StepTrace(
        flops=small.flops.total() // batch,
        product_bytes=product_bytes,
        other_bytes=other_bytes,
        kernel_flops=kernel_flops // batch,
        operations=small.operations,
        float32_flops=small.flops["float32"] // batch,
        float32_product_bytes=each("product_bytes", "float32"),
        float32_other_bytes=each("other_bytes", "float32"),
        pass_bytes=bytes_of_all - batch * (product_bytes + other_bytes),
        scores=small.scores,
        working_bytes=large.largest // (2 * batch),
    )


def _trace(model: nn.Module, batch: int) -> tuple[_Traffic, int]:
    """Return the traffic of a pass over a batch, and the kernel's FLOPs."""
    raw: dict[str, Tensor] = cast(Any, model).example(batch, "meta")
    inputs = next(iter(raw.values())) if len(raw) == 1 else raw
    before = kernels.KernelCount.flops
    with FlopCounterMode(display=False) as counter, _Traffic(counter) as traffic, _GpuAttention(traffic):
        outputs = [t for t in tree_leaves(model(inputs)) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    model.zero_grad()
    return traffic, kernels.KernelCount.flops - before
