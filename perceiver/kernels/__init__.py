"""The compiled kernels for CPUs: built once, cached, and left out silently where they cannot be built.

The pure torch form in `perceiver.shared_kv` gives the same numbers. `PERCEIVER_KERNELS=0` turns them off.
"""

import ctypes

import torch
from torch import Tensor

from perceiver.kernels._build import load

FEATURES = range(2, 6)
"""Feature counts (data channels + 1) that the kernel is compiled for."""


def usable(q: Tensor) -> bool:
    """Whether the compiled kernel serves queries (B, N, F): float32 on a CPU, F of 2 to 5, and a kernel built."""
    plain = q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[2] in FEATURES
    return plain and not torch.compiler.is_compiling() and load() is not None


def _call(name: str, q: Tensor, rows: Tensor, columns: Tensor, *others: Tensor) -> None:
    library = load()
    assert library is not None
    tensors = (q, rows, columns, *others)
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
    sizes = (*q.shape, rows.shape[2], columns.shape[2])
    status = getattr(library, name)(
        *(ctypes.c_int64(size) for size in sizes),
        ctypes.c_int(torch.get_num_threads()),
        *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
    )
    assert status == 0


def forward(
    q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the three moments of `perceiver.shared_kv.separable_moments` and the log-sum-exp (B, N)."""
    out = (torch.empty_like(q), torch.empty_like(rows), torch.empty_like(columns), q.new_empty(q.shape[:2]))
    _call("separable_forward", q, rows, columns, features.contiguous(), scale.contiguous(), *out)
    return out


def backward(
    q: Tensor,
    rows: Tensor,
    columns: Tensor,
    features: Tensor,
    scale: Tensor,
    lse: Tensor,
    slopes: list[Tensor],
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, rows and columns given the moments' gradients `slopes` and delta (B, N)."""
    out = (torch.empty_like(q), torch.empty_like(rows), torch.empty_like(columns))
    _call(
        "separable_backward",
        q,
        rows,
        columns,
        features.contiguous(),
        scale.contiguous(),
        lse,
        *slopes,
        delta.contiguous(),
        *out,
    )
    return out
