"""Linear layers by oneDNN, on CPUs where torch's own float32 products use half of each vector unit.

torch multiplies float32 matrices with MKL, which uses only AVX2 on CPUs of other makers than Intel. oneDNN, also part
of torch, uses AVX-512 on all of them: twice the speed, the same results to rounding. The choice depends on the CPU, not
on a timing, so a run resumed on the same machine computes the same. `PERCEIVER_KERNELS=0` turns it off.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

MIN_PRODUCT = 1 << 20
"""Multiplications from which a product outweighs the call's overhead of about 10 microseconds."""


@cache
def faster() -> bool:
    """Return whether oneDNN multiplies float32 faster here: AVX-512, not Intel, and a correct test product."""
    if os.environ.get("PERCEIVER_KERNELS", "1") == "0" or not _wide_and_foreign():
        return False
    try:
        x, weight = torch.linspace(-1, 1, 35 * 48).view(35, 48), torch.linspace(-2, 1, 21 * 48).view(21, 48)
        agrees = torch.allclose(product(x, weight), x @ weight.t(), rtol=1e-4, atol=1e-4)
        if agrees:
            register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
        return agrees
    except (AttributeError, RuntimeError):
        return False


def _wide_and_foreign() -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not intel


def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0]


def usable(x: Tensor, weight: Tensor) -> bool:
    """Return whether `linear` uses oneDNN: float32 on such a CPU, outside autocast and tracing, and large enough."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= MIN_PRODUCT
        and faster()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  it is documented
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias for x (..., K) and weight (N, K) of any strides, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        dx = product(grad, weight.t()) if wants[0] else None
        dw = product(flat.t(), x.flatten(0, -2).t()) if wants[1] else None
        return dx, dw, flat.sum(0) if wants[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias, (..., K) -> (..., N), with the faster library for its size, type and machine."""
    return _Product.apply(x, weight, bias) if usable(x, weight) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's linear layer, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)
