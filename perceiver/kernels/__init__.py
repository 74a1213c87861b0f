"""The compiled kernels: C++ for CPUs, Triton for GPUs; not used where they cannot be built.

The pure torch form in `perceiver.kernels.shared_kv` gives the same results. `PERCEIVER_KERNELS=0` turns them off.
"""

import ctypes
import logging
import os
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from perceiver.kernels.extension import load

log = logging.getLogger(__name__)
FEATURES = range(1, 6)
"""Feature counts (data channels) that the kernels support."""


class KernelCount:
    """Counts the float32 operations that calls on the meta device stand for."""

    flops = 0


def usable(q: Tensor) -> bool:
    """Return whether a kernel supports queries (B, N, F): float32, F of 1 to 5, and built for the device of `q`.

    The meta device counts as a device with the kernel, so that its operation counts are those of a run.
    """
    if q.dtype != torch.float32 or q.shape[2] not in FEATURES:
        return False
    if q.device.type == "meta":
        return True
    if q.is_cuda:
        return triton_works(q.device)
    return q.device.type == "cpu" and not torch.compiler.is_compiling() and load() is not None


_works: dict[int, bool] = {}


def triton_works(device: torch.device) -> bool:
    """Return whether the Triton kernels work on a GPU; they are tried in the first call outside compiled code."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _works and not torch.compiler.is_compiling():
        _works[index] = load_triton(device) is not None
    return _works.get(index, False)


@cache
def load_triton(device: torch.device) -> ModuleType | None:
    """Return the Triton kernels if a small case works on a GPU, else None."""
    if os.environ.get("PERCEIVER_KERNELS", "1") == "0":
        return None
    try:
        from perceiver.kernels import separable_triton

        separable_triton.prove(device)
        return separable_triton
    except Exception as error:  # noqa: BLE001  no Triton, no C compiler, an unknown GPU: torch is used
        log.warning("using torch's slower operators instead of the Triton kernels: %s", error)
        return None


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


def _moments(q: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors for the results of `forward`."""
    return *_gradients(q, rows, columns), q.new_empty(q.shape[:2])


def _gradients(q: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors for the results of `backward`."""
    return torch.empty_like(q), torch.empty_like(rows), torch.empty_like(columns)


def forward(
    q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the three moments of `perceiver.kernels.shared_kv.separable_moments` and the log-sum-exp (B, N)."""
    if q.is_cuda:
        return triton_forward(q, rows, columns, features, scale)
    out = _moments(q, rows, columns)
    if q.device.type == "meta":
        KernelCount.flops += q.shape[0] * q.shape[1] * scale.shape[1] * (4 * q.shape[2] + 8)
        return out
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
    if q.is_cuda:
        return triton_backward(q, rows, columns, features, scale, lse, slopes, delta)
    out = _gradients(q, rows, columns)
    if q.device.type == "meta":
        KernelCount.flops += q.shape[0] * q.shape[1] * scale.shape[1] * (6 * q.shape[2] + 10)
        return out
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


# Operators, so that torch.compile leaves the Triton kernels as they are and compiles what is around them.


@custom_op("perceiver::separable_forward", mutates_args=())
def triton_forward(
    q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` on a GPU."""
    return cast(ModuleType, load_triton(q.device)).forward(q, rows, columns, features, scale)


@triton_forward.register_fake
def _(q: Tensor, rows: Tensor, columns: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _moments(q, rows, columns)


@custom_op("perceiver::separable_backward", mutates_args=())
def triton_backward(
    q: Tensor,
    rows: Tensor,
    columns: Tensor,
    features: Tensor,
    scale: Tensor,
    lse: Tensor,
    slopes: list[Tensor],
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` on a GPU."""
    return cast(ModuleType, load_triton(q.device)).backward(q, rows, columns, features, scale, lse, slopes, delta)


@triton_backward.register_fake
def _(q: Tensor, rows: Tensor, columns: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, rows, columns)
