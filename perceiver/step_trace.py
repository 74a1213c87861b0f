"""FLOPs, bytes and operations of a training pass, counted on the meta device for a roofline model."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from perceiver import kernels
from perceiver.config import Config
from perceiver.factory import build_model


@dataclass(frozen=True)
class StepTrace:
    """The cost of a forward and backward pass of one sample.

    Args:
        flops: FLOPs of matrix products and convolutions, multiplications and additions counted separately.
        product_bytes: bytes that these read and write, float32.
        other_bytes: bytes that all other operations read and write, float32.
        kernel_flops: float32 FLOPs of the separable-attention kernel, which has almost no memory traffic.
        operations: number of operations per pass, for any batch.
    """

    flops: int
    product_bytes: int
    other_bytes: int
    kernel_flops: int
    operations: int


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of each operation's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.product_bytes = self.other_bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            if any(part in str(func) for part in ("mm", "conv", "attention")):
                self.product_bytes += size
            else:
                self.other_bytes += size
            self.operations += 1
        return out


def trace_step(config: Config, *, classes: int | None = None, batch: int = 2) -> StepTrace:
    """Return the cost of a training pass of a config's model, from a pass over a batch on the meta device.

    The batch is at least two, because batch norm refuses one; traffic of the weights is shared by its samples.
    """
    with torch.device("meta"):
        model = build_model(config, classes=classes).train()
    raw: dict[str, Tensor] = cast(Any, model).example(batch, "meta")
    inputs = next(iter(raw.values())) if len(raw) == 1 else raw
    before = kernels.KernelCount.flops
    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        outputs = [t for t in tree_leaves(model(inputs)) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    return StepTrace(
        flops=counter.get_total_flops() // batch,
        product_bytes=traffic.product_bytes // batch,
        other_bytes=traffic.other_bytes // batch,
        kernel_flops=(kernels.KernelCount.flops - before) // batch,
        operations=traffic.operations,
    )
