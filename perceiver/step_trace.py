"""What a training pass moves: FLOPs, bytes and operations of any model, counted on the meta device for a roofline."""

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
    """What a forward and backward pass of one sample moves.

    Args:
        flops: of matrix products and convolutions, multiply and add counted apart.
        product_bytes: read and written by these, float32.
        other_bytes: read and written by all other operations, float32.
        kernel_flops: of the kernel of separable attention, which moves next to nothing; float32, no matrix products.
        operations: number of operations of a pass, whatever the batch.
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
    """Return what a training pass of a config's model moves, from a pass over a batch on the meta device.

    The batch is at least two, because batch norm refuses one; traffic of the weights is shared by its samples.
    """
    with torch.device("meta"):
        model = build_model(config, classes=classes).train()
    raw: dict[str, Tensor] = cast(Any, model).example(batch, "meta")
    inputs = next(iter(raw.values())) if len(raw) == 1 else raw
    before = kernels.Work.flops
    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        outputs = [t for t in tree_leaves(model(inputs)) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    return StepTrace(
        flops=counter.get_total_flops() // batch,
        product_bytes=traffic.product_bytes // batch,
        other_bytes=traffic.other_bytes // batch,
        kernel_flops=(kernels.Work.flops - before) // batch,
        operations=traffic.operations,
    )
