"""`separable_moments` on GPUs, in Triton: one pass over the scores forward and one backward, none of them stored.

A thread processes whole latents: it iterates over the rows of a strip of columns with the scores in registers, so that
no sum crosses threads. The rows may be divided into bands, each with its own running maximum, to occupy the GPU at
small batches; their sums are combined by log-sum-exp. The order of summation is fixed: a repeated call gives the same
bits. Scores are in base 2.

`TRITON_INTERPRET=1` runs it without a GPU.
"""

# Type checkers do not understand Triton's language.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LATENTS = 128
"""Latents per program, which is one warp: four per thread, so that each loaded feature is used four times."""
STRIP = 8
"""Columns whose scores a thread keeps at a time."""
PROGRAMS = 2048
"""Programs that occupy a large GPU; if batch and latents give fewer, the rows are divided into bands."""
MIN_BAND = 8
LOWEST = -1.0e30


@triton.jit
def _tile(column, row, scale, inside, at, features, q, size, count: tl.constexpr, whole: tl.constexpr):
    """Return the scores (columns, latents) of one row, and the features (columns,) of its inputs."""
    scores = (column + row[None, :]) * scale[:, None]
    loaded = ()
    for index in tl.static_range(count):
        if whole:
            feature = tl.load(features + index * size + at)
        else:
            feature = tl.load(features + index * size + at, mask=inside, other=0.0)
        scores += feature[:, None] * q[index][None, :]
        loaded += (feature,)
    return scores, loaded


@triton.jit
def _vectors(source, n, alive, latents, count: tl.constexpr):
    """Return `count` vectors over the latents, (count, N) in memory."""
    loaded = ()
    for index in tl.static_range(count):
        loaded += (tl.load(source + index * latents + n, mask=alive, other=0.0),)
    return loaded


@triton.jit
def forward_kernel(
    q_at,
    rows_at,
    columns_at,
    features_at,
    scale_at,
    moments_at,
    by_row_at,
    row_top_at,
    by_column_at,
    strip_top_at,
    top_at,
    total_at,
    latents,
    height,
    width,
    band,
    count: tl.constexpr,
    strip: tl.constexpr,
    block: tl.constexpr,
    whole: tl.constexpr,
):
    """Compute the sums of one batch item, a block of latents and a band of rows, each relative to a stored maximum."""
    n = tl.program_id(0) * block + tl.arange(0, block)
    part, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    alive = n < latents
    size = height * width
    strips = tl.cdiv(width, strip)
    slot = part * tl.num_programs(2) + item
    q = _vectors(q_at + item * count * latents, n, alive, latents, count)
    first, last = part * band, tl.minimum(part * band + band, height)
    top = tl.full([block], -1.0e30, tl.float32)
    total = tl.zeros([block], tl.float32)
    moments = ()
    for _ in tl.static_range(count):
        moments += (tl.zeros([block], tl.float32),)
    for number in range(strips):
        x = number * strip + tl.arange(0, strip)
        inside = x < width
        reach = inside[:, None] & alive[None, :]
        column = tl.load(columns_at + (item * width + x[:, None]) * latents + n[None, :], mask=reach, other=0.0)
        by_column = tl.zeros([strip, block], tl.float32)
        for y in range(first, last):
            line = (item * height + y) * latents + n
            row = tl.load(rows_at + line, mask=alive, other=0.0)
            at = y * width + x
            scale = tl.load(scale_at + item * size + at, mask=inside, other=0.0)
            scores, features = _tile(
                column, row, scale, inside, at, features_at + item * count * size, q, size, count, whole
            )
            if not whole:
                scores = tl.where(inside[:, None], scores, -1.0e30)
            new = tl.maximum(top, tl.max(scores, 0))
            fade = tl.exp2(top - new)
            weights = tl.exp2(scores - new[None, :])
            total = total * fade + tl.sum(weights, 0)
            faded = ()
            for index in tl.static_range(count):
                faded += (moments[index] * fade + tl.sum(weights * features[index][:, None], 0),)
            moments = faded
            weights *= scale[:, None]
            by_column = by_column * fade[None, :] + weights
            before = tl.load(by_row_at + line, mask=alive, other=0.0)
            before_top = tl.load(row_top_at + line, mask=alive, other=0.0)
            tl.store(by_row_at + line, before * tl.exp2(before_top - new) + tl.sum(weights, 0), mask=alive)
            tl.store(row_top_at + line, new, mask=alive)
            top = new
        at = by_column_at + (slot * strips * strip + x[:, None]) * latents + n[None, :]
        tl.store(at, by_column, mask=alive[None, :])
        tl.store(strip_top_at + (slot * strips + number) * latents + n, top, mask=alive)
        tl.debug_barrier()
    for index in tl.static_range(count):
        tl.store(moments_at + (slot * count + index) * latents + n, moments[index], mask=alive)
    tl.store(top_at + slot * latents + n, top, mask=alive)
    tl.store(total_at + slot * latents + n, total, mask=alive)


@triton.jit
def backward_kernel(
    q_at,
    rows_at,
    columns_at,
    features_at,
    scale_at,
    lse_at,
    slope_q_at,
    slope_rows_at,
    slope_columns_at,
    delta_at,
    dq_at,
    drows_at,
    dcolumns_at,
    latents,
    height,
    width,
    band,
    count: tl.constexpr,
    strip: tl.constexpr,
    block: tl.constexpr,
    whole: tl.constexpr,
):
    """Compute the gradients of one batch item, a block of latents and a band of rows."""
    n = tl.program_id(0) * block + tl.arange(0, block)
    part, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    alive = n < latents
    size = height * width
    slot = part * tl.num_programs(2) + item
    q = _vectors(q_at + item * count * latents, n, alive, latents, count)
    slope_q = _vectors(slope_q_at + item * count * latents, n, alive, latents, count)
    lse = tl.load(lse_at + item * latents + n, mask=alive, other=0.0)
    delta = tl.load(delta_at + item * latents + n, mask=alive, other=0.0)
    first, last = part * band, tl.minimum(part * band + band, height)
    dq = ()
    for _ in tl.static_range(count):
        dq += (tl.zeros([block], tl.float32),)
    for number in range(tl.cdiv(width, strip)):
        x = number * strip + tl.arange(0, strip)
        inside = x < width
        reach = inside[:, None] & alive[None, :]
        place = (item * width + x[:, None]) * latents + n[None, :]
        column = tl.load(columns_at + place, mask=reach, other=0.0)
        slope_column = tl.load(slope_columns_at + place, mask=reach, other=0.0)
        dcolumn = tl.zeros([strip, block], tl.float32)
        for y in range(first, last):
            line = (item * height + y) * latents + n
            row = tl.load(rows_at + line, mask=alive, other=0.0)
            slope_row = tl.load(slope_rows_at + line, mask=alive, other=0.0)
            at = y * width + x
            scale = tl.load(scale_at + item * size + at, mask=inside, other=0.0)
            scores, features = _tile(
                column, row, scale, inside, at, features_at + item * count * size, q, size, count, whole
            )
            slope = (slope_column + slope_row[None, :]) * scale[:, None]
            for index in tl.static_range(count):
                slope += features[index][:, None] * slope_q[index][None, :]
            weights = tl.exp2(scores - lse[None, :]) * (slope - delta[None, :])
            if not whole:
                weights = tl.where(inside[:, None], weights, 0.0)
            added = ()
            for index in tl.static_range(count):
                added += (dq[index] + tl.sum(weights * features[index][:, None], 0),)
            dq = added
            weights *= scale[:, None]
            dcolumn += weights
            before = tl.load(drows_at + line, mask=alive, other=0.0)
            tl.store(drows_at + line, before + tl.sum(weights, 0), mask=alive)
        tl.store(dcolumns_at + (slot * width + x[:, None]) * latents + n[None, :], dcolumn, mask=reach)
        tl.debug_barrier()
    for index in tl.static_range(count):
        tl.store(dq_at + (slot * count + index) * latents + n, dq[index], mask=alive)


def _ceil(amount: int, part: int) -> int:
    return -(-amount // part)


class _Launch:
    """The division of a call into programs: blocks of latents, bands of rows, items of the batch."""

    def __init__(self, q: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.batch, self.latents, self.count = q.shape
        self.height, self.width = rows.shape[2], columns.shape[2]
        self.strips = _ceil(self.width, STRIP)
        blocks = _ceil(self.latents, LATENTS)
        wanted = _ceil(PROGRAMS, self.batch * blocks)
        self.band = _ceil(self.height, max(1, min(wanted, self.height // MIN_BAND)))
        self.bands = _ceil(self.height, self.band)
        self.grid = (blocks, self.bands, self.batch)

    def run(self, kernel: Any, *tensors: Tensor) -> None:
        """Launch a kernel on the GPU of these arrays."""
        device = tensors[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[self.grid](
                *tensors,
                self.latents,
                self.height,
                self.width,
                self.band,
                count=self.count,
                strip=STRIP,
                block=LATENTS,
                whole=self.width % STRIP == 0,
                num_warps=1,
            )


def _across(x: Tensor, factor: float = 1.0) -> Tensor:
    """Return (B, N, K) times a factor as (B, K, N), so that neighbouring latents are adjacent in memory."""
    return (x * factor if factor != 1 else x).transpose(1, 2).contiguous()


LOG2E = math.log2(math.e)


def forward(
    q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the three moments of `perceiver.shared_kv.separable_moments` and the log-sum-exp (B, N)."""
    launch = _Launch(q, rows, columns)
    parts = (launch.bands, launch.batch)
    moments = q.new_empty(*parts, launch.count, launch.latents)
    by_row = q.new_zeros(launch.batch, launch.height, launch.latents)
    row_top = torch.full_like(by_row, LOWEST)
    by_column = q.new_empty(*parts, launch.strips, STRIP, launch.latents)
    strip_top = q.new_empty(*parts, launch.strips, 1, launch.latents)
    top, total = q.new_empty(2, *parts, launch.latents)
    launch.run(
        forward_kernel,
        _across(q, LOG2E),
        _across(rows, LOG2E),
        _across(columns, LOG2E),
        features.contiguous(),
        scale.contiguous(),
        moments,
        by_row,
        row_top,
        by_column,
        strip_top,
        top,
        total,
    )
    highest = top.amax(0)
    lse = highest + (total * (top - highest).exp2()).sum(0).log2()
    moments = (moments * (top - lse).exp2()[:, :, None]).sum(0)
    by_row.mul_(row_top.sub_(lse[:, None]).exp2_())
    by_column = by_column.mul_(strip_top.sub_(lse[:, None, None]).exp2_()).sum(0).flatten(1, 2)[:, : launch.width]
    outs = (part.transpose(1, 2).contiguous() for part in (moments, by_row, by_column))
    return *outs, lse / LOG2E  # type: ignore[return-value]


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
    launch = _Launch(q, rows, columns)
    dq = q.new_empty(launch.bands, launch.batch, launch.count, launch.latents)
    drows = q.new_zeros(launch.batch, launch.height, launch.latents)
    dcolumns = q.new_empty(launch.bands, launch.batch, launch.width, launch.latents)
    launch.run(
        backward_kernel,
        _across(q, LOG2E),
        _across(rows, LOG2E),
        _across(columns, LOG2E),
        features.contiguous(),
        scale.contiguous(),
        lse * LOG2E,
        *map(_across, slopes),
        delta.contiguous(),
        dq,
        drows,
        dcolumns,
    )
    outs = (part.transpose(1, 2).contiguous() for part in (dq.sum(0), drows, dcolumns.sum(0)))
    return tuple(outs)  # type: ignore[return-value]


def prove(device: torch.device) -> None:
    """Run a small case.

    Raises:
        RuntimeError: the results differ from torch's.
        Exception: of Triton, if it cannot compile or run.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = 9, 2 * STRIP
    shapes = (2, 16, 4), (2, 16, height), (2, 16, width), (2, 4, height * width), (2, height * width)
    q, rows, columns, features, scale = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    *moments, lse = forward(q, rows, columns, features, scale)
    scores = (rows[..., None] + columns[:, :, None]).flatten(2) * scale[:, None] + q @ features
    weights = scores.softmax(-1)
    by_place = (weights * scale[:, None]).unflatten(2, (height, width))
    wanted = [weights @ features.transpose(1, 2), by_place.sum(3), by_place.sum(2), scores.logsumexp(-1)]
    _agree([*moments, lse], wanted)
    slopes = [torch.ones_like(moment) for moment in moments]
    delta = torch.stack([moment.sum(-1) for moment in moments]).sum(0)
    slope = features.sum(1)[:, None] + 2 * scale[:, None] - delta[..., None]
    by_place = (weights * slope * scale[:, None]).unflatten(2, (height, width))
    wanted = [(weights * slope) @ features.transpose(1, 2), by_place.sum(3), by_place.sum(2)]
    _agree(backward(q, rows, columns, features, scale, lse, slopes, delta), wanted)


def _agree(got: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2):  # a GPU's torch may multiply in TF32
            raise RuntimeError(f"a small case differs from torch by {float((ours - theirs).abs().max())}")
