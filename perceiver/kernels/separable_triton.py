"""`separable_moments` on GPUs, in Triton: one pass over the scores forward and one backward, none of them stored.

A thread processes whole latents: it iterates over the rows of a strip of columns with the scores in registers, so that
no sum crosses threads. The rows may be divided into bands to occupy the GPU at small batches. The order of summation is
fixed: a repeated call gives the same bits. Scores are in base 2.

A softmax is the same for any reference that its scores are relative to, as long as nothing overflows. The reference of
a latent is the maximum of its scores in the first row of a band, so no sum is ever rescaled. A band whose sums exceed
`LIMIT` (a score far above that row's) is computed again with its true maximum.

`TRITON_INTERPRET=1` runs it without a GPU.
"""

# Type checkers do not understand Triton's language.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Plan:
    """How a pass is divided into programs of one warp.

    Args:
        strip: columns whose sums a thread keeps.
        block: latents per program, a multiple of 32.
        programs: programs that the GPU runs at a time (132 multiprocessors of an H200 times 8, 12 or 16 for up to 255,
            168 or 128 registers), or twice that; the rows are divided into as many bands as give no more.
        registers: most registers per thread; None for the compiler's choice.
    """

    strip: int = 8
    block: int = 64
    programs: int = 1584
    registers: int | None = None


FORWARD, BACKWARD = Plan(programs=2112), Plan(programs=4224, registers=128)
"""The fastest of those in `benchmarks/gpu_kernel.py` on an H200 (512 latents, 224 x 224 inputs, batch 32)."""
MIN_BAND = 8
TILE = 32
"""Side of the tiles that are transposed."""
LIMIT = 1.0e30
"""Greatest sum of weights that leaves room for its products with features in float32."""


@triton.jit
def _vectors(source, n, alive, latents, count: tl.constexpr):
    """Return `count` vectors over the latents, (count, N) in memory."""
    loaded = ()
    for index in tl.static_range(count):
        loaded += (tl.load(source + index * latents + n, mask=alive, other=0.0),)
    return loaded


@triton.jit
def _inputs(features_at, scale_at, x, y, size, width, count: tl.constexpr, whole: tl.constexpr):
    """Return the features and the scale, each (columns, 1), of one row's inputs."""
    at = y * width + x
    features = ()
    if whole:
        scale = tl.load(scale_at + at)
        for index in tl.static_range(count):
            features += (tl.load(features_at + index * size + at)[:, None],)
    else:
        scale = tl.load(scale_at + at, mask=x < width, other=0.0)
        for index in tl.static_range(count):
            features += (tl.load(features_at + index * size + at, mask=x < width, other=0.0)[:, None],)
    return features, scale[:, None]


@triton.jit
def _scores(start, q, column, row, features, scale, count: tl.constexpr):
    """Return (columns, latents) start + q . features + scale * (row + column)."""
    scores = features[0] * q[0][None, :] + start[None, :]
    for index in tl.static_range(1, count):
        scores += features[index] * q[index][None, :]
    return scores + (column + row[None, :]) * scale


@triton.jit
def _add(total, x, strip: tl.constexpr):
    """Return total + the sum of x (columns, latents) over the columns, as one chain of fused multiply-adds."""
    first = (tl.arange(0, strip) == 0)[:, None]
    return tl.sum(tl.where(first, x + total[None, :], x), 0)


@triton.jit
def forward_kernel(
    q_at,
    rows_at,
    columns_at,
    features_at,
    scale_at,
    moments_at,
    by_row_at,
    by_column_at,
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
    limit: tl.constexpr,
):
    """Compute the sums of one batch item, a block of latents and a band of rows, relative to the stored `top`."""
    n = tl.max_contiguous(tl.program_id(0) * block + tl.arange(0, block), block // 32)  # a thread's are neighbours
    part, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    alive = n < latents
    size = height * width
    slot = part * tl.num_programs(2) + item
    q = _vectors(q_at + item * count * latents, n, alive, latents, count)
    features_at += item * count * size
    scale_at += item * size
    first, last = part * band, tl.minimum(part * band + band, height)
    seen = first + 1
    trial = 0
    while trial < 2:
        top = tl.full([block], -1.0e30, tl.float32)
        for left in range(0, width, strip):
            x = left + tl.arange(0, strip)
            reach = (x < width)[:, None] & alive[None, :]
            column = tl.load(columns_at + (item * width + x[:, None]) * latents + n[None, :], mask=reach, other=0.0)
            for y in range(first, seen):
                row = tl.load(rows_at + (item * height + y) * latents + n, mask=alive, other=0.0)
                features, scale = _inputs(features_at, scale_at, x, y, size, width, count, whole)
                scores = _scores(tl.zeros([block], tl.float32), q, column, row, features, scale, count)
                if not whole:
                    scores = tl.where((x < width)[:, None], scores, -1.0e30)
                top = tl.maximum(top, tl.max(scores, 0))
        total = tl.zeros([block], tl.float32)
        moments = ()
        for _ in tl.static_range(count):
            moments += (tl.zeros([block], tl.float32),)
        for left in range(0, width, strip):
            x = left + tl.arange(0, strip)
            reach = (x < width)[:, None] & alive[None, :]
            column = tl.load(columns_at + (item * width + x[:, None]) * latents + n[None, :], mask=reach, other=0.0)
            by_column = tl.zeros([strip, block], tl.float32)
            for y in range(first, last):
                line = (item * height + y) * latents + n
                row = tl.load(rows_at + line, mask=alive, other=0.0)
                by_row = tl.load(by_row_at + line, mask=alive & (left > 0), other=0.0)
                features, scale = _inputs(features_at, scale_at, x, y, size, width, count, whole)
                scores = _scores(-top, q, column, row, features, scale, count)
                if not whole:
                    scores = tl.where((x < width)[:, None], scores, -1.0e30)
                weights = tl.exp2(scores)
                total = _add(total, weights, strip)
                added = ()
                for index in tl.static_range(count):
                    added += (_add(moments[index], weights * features[index], strip),)
                moments = added
                weights *= scale
                by_column += weights
                tl.store(by_row_at + line, _add(by_row, weights, strip), mask=alive)
            tl.store(by_column_at + (slot * width + x[:, None]) * latents + n[None, :], by_column, mask=reach)
            tl.debug_barrier()
        for index in tl.static_range(count):
            tl.store(moments_at + (slot * count + index) * latents + n, moments[index], mask=alive)
        tl.store(top_at + slot * latents + n, top, mask=alive)
        tl.store(total_at + slot * latents + n, total, mask=alive)
        trial = tl.where(tl.min((total < limit).to(tl.int32), 0) > 0, 2, trial + 1)
        seen = last


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
    n = tl.max_contiguous(tl.program_id(0) * block + tl.arange(0, block), block // 32)
    part, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    alive = n < latents
    size = height * width
    slot = part * tl.num_programs(2) + item
    q = _vectors(q_at + item * count * latents, n, alive, latents, count)
    slope_q = _vectors(slope_q_at + item * count * latents, n, alive, latents, count)
    lse = tl.load(lse_at + item * latents + n, mask=alive, other=0.0)
    delta = tl.load(delta_at + item * latents + n, mask=alive, other=0.0)
    features_at += item * count * size
    scale_at += item * size
    first, last = part * band, tl.minimum(part * band + band, height)
    dq = ()
    for _ in tl.static_range(count):
        dq += (tl.zeros([block], tl.float32),)
    for left in range(0, width, strip):
        x = left + tl.arange(0, strip)
        reach = (x < width)[:, None] & alive[None, :]
        place = (item * width + x[:, None]) * latents + n[None, :]
        column = tl.load(columns_at + place, mask=reach, other=0.0)
        slope_column = tl.load(slope_columns_at + place, mask=reach, other=0.0)
        dcolumn = tl.zeros([strip, block], tl.float32)
        for y in range(first, last):
            line = (item * height + y) * latents + n
            row = tl.load(rows_at + line, mask=alive, other=0.0)
            slope_row = tl.load(slope_rows_at + line, mask=alive, other=0.0)
            drow = tl.load(drows_at + line, mask=alive & (left > 0), other=0.0)
            features, scale = _inputs(features_at, scale_at, x, y, size, width, count, whole)
            scores = _scores(-lse, q, column, row, features, scale, count)
            slope = _scores(-delta, slope_q, slope_column, slope_row, features, scale, count)
            weights = tl.exp2(scores) * slope
            if not whole:
                weights = tl.where((x < width)[:, None], weights, 0.0)
            added = ()
            for index in tl.static_range(count):
                added += (_add(dq[index], weights * features[index], strip),)
            dq = added
            weights *= scale
            dcolumn += weights
            tl.store(drows_at + line, _add(drow, weights, strip), mask=alive)
        tl.store(dcolumns_at + (slot * width + x[:, None]) * latents + n[None, :], dcolumn, mask=reach)
        tl.debug_barrier()
    for index in tl.static_range(count):
        tl.store(dq_at + (slot * count + index) * latents + n, dq[index], mask=alive)


@triton.jit
def transpose_kernel(source_at, target_at, height, width, factor, tile: tl.constexpr):
    """Write (B, height, width) times a factor as (B, width, height)."""
    x, y = tl.program_id(0) * tile + tl.arange(0, tile), tl.program_id(1) * tile + tl.arange(0, tile)
    item = tl.program_id(2).to(tl.int64) * height * width
    inside = (y < height)[:, None] & (x < width)[None, :]
    block = tl.load(source_at + item + y[:, None] * width + x[None, :], mask=inside, other=0.0)
    tl.store(target_at + item + x[:, None] * height + y[None, :], tl.trans(block * factor), mask=tl.trans(inside))


@triton.jit
def join_kernel(
    parts_at, factor_at, target_at, latents, length, parts, band, weighted: tl.constexpr, tile: tl.constexpr
):
    """Write the sum of (parts, B, length, N), `weighted` by (bands, B, N), as (B, N, length).

    With `band` not 0 there is one part, and the weight of its element k is that of the band k // band.
    """
    n, k = tl.program_id(0) * tile + tl.arange(0, tile), tl.program_id(1) * tile + tl.arange(0, tile)
    item, batch = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    inside = (k < length)[:, None] & (n < latents)[None, :]
    total = tl.zeros([tile, tile], tl.float32)
    for number in range(parts):
        slot = number * batch + item
        block = tl.load(parts_at + (slot * length + k[:, None]) * latents + n[None, :], mask=inside, other=0.0)
        if weighted:
            slots = tl.where(band > 0, k // tl.maximum(band, 1), number) * batch + item
            block *= tl.load(factor_at + slots[:, None] * latents + n[None, :], mask=inside, other=0.0)
        total += block
    tl.store(target_at + (item * latents + n[:, None]) * length + k[None, :], tl.trans(total), mask=tl.trans(inside))


def _ceil(amount: int, part: int) -> int:
    return -(-amount // part)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Launch:
    """The division of a call into programs: blocks of latents, bands of rows, items of the batch."""

    def __init__(self, q: Tensor, rows: Tensor, columns: Tensor, plan: Plan) -> None:
        self.plan = plan
        self.batch, self.latents, self.count = q.shape
        self.height, self.width = rows.shape[2], columns.shape[2]
        blocks = _ceil(self.latents, plan.block)
        bands = max(1, min(plan.programs // (self.batch * blocks), self.height // MIN_BAND))
        self.band = _ceil(self.height, bands)
        self.bands = _ceil(self.height, self.band)
        self.grid = (blocks, self.bands, self.batch)

    def run(self, kernel: Any, *tensors: Tensor, **constants: Any) -> None:
        """Launch a kernel on the GPU of these arrays."""
        plan = self.plan
        if plan.registers is not None and tensors[0].is_cuda and torch.version.hip is None:
            constants["maxnreg"] = plan.registers
        with _on(tensors[0].device):
            kernel[self.grid](
                *tensors,
                self.latents,
                self.height,
                self.width,
                self.band,
                count=self.count,
                strip=plan.strip,
                block=plan.block,
                whole=self.width % plan.strip == 0,
                num_warps=1,
                **constants,
            )

    def join(self, parts: Tensor, factor: Tensor | None = None) -> Tensor:
        """Return the sum over bands of (bands, B, K, N), or all bands' rows (1, B, H, N), as (B, N, K).

        Args:
            parts: the bands' sums.
            factor: (bands, B, N) factors of the bands.
        """
        length = parts.shape[2]
        joined = parts.new_empty(self.batch, self.latents, length)
        by_row = factor is not None and len(parts) < len(factor)
        with _on(parts.device):
            join_kernel[_ceil(self.latents, TILE), _ceil(length, TILE), self.batch](
                parts,
                parts if factor is None else factor,
                joined,
                self.latents,
                length,
                len(parts),
                self.band if by_row else 0,
                weighted=factor is not None,
                tile=TILE,
            )
        return joined


def _across(x: Tensor, factor: float = 1.0) -> Tensor:
    """Return (B, N, K) times a factor as (B, K, N), so that neighbouring latents are adjacent in memory."""
    x = x.contiguous()
    batch, latents, length = x.shape
    turned = x.new_empty(batch, length, latents)
    with _on(x.device):
        transpose_kernel[_ceil(length, TILE), _ceil(latents, TILE), batch](
            x, turned, latents, length, factor, tile=TILE
        )
    return turned


def forward(
    q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the three moments of `perceiver.kernels.shared_kv.separable_moments` and the log-sum-exp (B, N)."""
    launch = _Launch(q, rows, columns, plan or FORWARD)
    parts = (launch.bands, launch.batch)
    moments = q.new_empty(*parts, launch.count, launch.latents)
    by_row = q.new_empty(1, launch.batch, launch.height, launch.latents)
    by_column = q.new_empty(*parts, launch.width, launch.latents)
    top, total = q.new_empty(2, *parts, launch.latents)
    launch.run(
        forward_kernel,
        *(_across(x, LOG2E) for x in (q, rows, columns)),
        features.contiguous(),
        scale.contiguous(),
        moments,
        by_row,
        by_column,
        top,
        total,
        limit=LIMIT,
    )
    highest = top.amax(0)
    factor = (top - highest).exp2()
    total = (total * factor).sum(0)
    factor = factor / total
    lse = (highest + total.log2()) / LOG2E
    return *(launch.join(part, factor) for part in (moments, by_row, by_column)), lse  # type: ignore[return-value]


def backward(
    q: Tensor,
    rows: Tensor,
    columns: Tensor,
    features: Tensor,
    scale: Tensor,
    lse: Tensor,
    slopes: list[Tensor],
    delta: Tensor,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, rows and columns given the moments' gradients `slopes` and delta (B, N)."""
    launch = _Launch(q, rows, columns, plan or BACKWARD)
    dq = q.new_empty(launch.bands, launch.batch, launch.count, launch.latents)
    drows = q.new_empty(1, launch.batch, launch.height, launch.latents)
    dcolumns = q.new_empty(launch.bands, launch.batch, launch.width, launch.latents)
    launch.run(
        backward_kernel,
        *(_across(x, LOG2E) for x in (q, rows, columns)),
        features.contiguous(),
        scale.contiguous(),
        lse * LOG2E,
        *map(_across, slopes),
        delta.contiguous(),
        dq,
        drows,
        dcolumns,
    )
    return launch.join(dq), launch.join(drows), launch.join(dcolumns)


def prove(device: torch.device) -> None:
    """Run two small cases.

    Raises:
        RuntimeError: the results differ from torch's.
        Exception: of Triton, if it cannot compile or run.
    """
    for height, width, last in ((9, 16, 0.0), (17, 13, 200.0)):  # the second: columns masked, a band computed again
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 16, 4), (2, 16, height), (2, 16, width), (2, 4, height * width), (2, height * width)
        q, rows, columns, features, scale = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
        scale = scale.abs() + 0.5
        rows[..., -1] += last
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
