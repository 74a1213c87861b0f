"""Attention by the compiled kernel: any heads and strides, keys and values separate or one array, with gradients.

The kernel keeps a head's tiles in the caches and uses whole vector registers, while torch's fused CPU attention calls
MKL on small blocks. Without the kernel, torch's function is used.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from perceiver.kernels.extension import load

MIN_SCORES = 1 << 14
"""Scores per call from which the kernel outweighs the call's overhead of about 20 microseconds."""


def usable(q: Tensor, k: Tensor, *others: Tensor) -> bool:
    """Return whether the kernel supports (B, h, N, d) arrays: float32 on a CPU, contiguous rows, large, built."""
    if torch.compiler.is_compiling():
        return False
    plain = all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.stride(-1) == 1 and t.dim() == 4
        for t in (q, k, *others)
    )
    large = plain and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] >= MIN_SCORES
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  it is documented
    return large and not tracing and load() is not None


def _call(name: str, scale: float, arrays: Sequence[Tensor | None], mask: Tensor | None, *rows: Tensor | None) -> None:
    """Call the kernel with q, k, v, out, their gradients (None where there are none), and per-row arrays."""
    library = load()
    q, k, v = arrays[:3]
    assert library is not None and q is not None and k is not None and v is not None
    sizes = [*q.shape[:3], k.shape[2], q.shape[3], v.shape[3], torch.get_num_threads()]
    for array in arrays:
        sizes += (0, 0, 0) if array is None else array.stride()[:3]
    flat = [None if t is None else t.contiguous() for t in (mask, *rows)]
    status = getattr(library, name)(
        (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.c_float(scale),
        (ctypes.c_void_p * len(arrays))(*(None if a is None else a.data_ptr() for a in arrays)),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in flat),
    )
    assert status == 0


def _like(x: Tensor, width: int) -> Tensor:
    """Return an empty (B, h, N, width) array that is contiguous once its heads are merged."""
    batch, heads, rows = x.shape[:3]
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v and the scores' log-sum-exp (B, h, N); `mask` (B, M) is True for existing keys."""
    out, lse = _like(q, v.shape[3]), q.new_empty(q.shape[:3])
    _call("attention_forward", scale, (q, k, v, out, None, None, None, None), mask, lse, None)
    return out, lse


def backward(
    arrays: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    learned: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k and v: None for fixed keys, twice their sum's array for keys that are the values."""
    q, k, v = arrays
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = (grad * out).sum(-1)
    dq = _like(q, q.shape[3])
    dk = _like(k, k.shape[3]) if learned else None
    dv = dk if k.data_ptr() == v.data_ptr() or not learned else _like(v, v.shape[3])
    _call("attention_backward", scale, (q, k, v, out, grad, dq, dk, dv), mask, lse, delta)
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.scale, ctx.mask = 1 / math.sqrt(q.shape[-1]), mask
        out, lse = forward(q, k, v, mask, ctx.scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *backward((q, k, v), ctx.mask, ctx.scale, out, lse, grad, learned=True), None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v.

    Args:
        q, k, v: (B, h, N, d), (B, h, M, d) and (B, h, M, d_v).
        mask: (B, M) bool, True where a key exists.
    """
    if usable(q, k, v) and k.data_ptr() != v.data_ptr():
        return _Attention.apply(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
