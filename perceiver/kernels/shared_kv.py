"""Exact shortcuts for attention whose keys and values are one array of normalised inputs.

With one normalised input array x serving as keys and values (the projections absorbed into the queries and outputs),
attention is softmax(q x^T) x. Both functions here recompute the scores in the backward pass, so nothing of size N x M
outlives a call, and take no gradient of inputs that have none.

`shared_kv` takes x dense. `separable_moments` takes x as a function of the row and a function of the column of a grid,
and never forms it. It uses a compiled kernel where one can be built (`perceiver.kernels`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perceiver import kernels
from perceiver.kernels import attend

CPU_SCORES = 1 << 21
"""Scores in memory at a time on a CPU: 8 MB in float32, about a core's share of the last-level cache."""
GPU_SCORES = 1 << 28


def _tiles(q: Tensor, inputs: int) -> Iterator[tuple[int, int, slice]]:
    """Yield (first batch item, last, slice of queries) such that a tile's scores stay within the limit."""
    limit = CPU_SCORES if q.device.type == "cpu" else GPU_SCORES
    batch, queries = q.shape[:2]
    rows = max(1, min(queries, limit // inputs))
    items = max(1, limit // (rows * inputs))
    for first in range(0, batch, items):
        for start in range(0, queries, rows):
            yield first, min(batch, first + items), slice(start, min(queries, start + rows))


class Float32Region:
    """The scores per sample of the `shared_kv` that runs on the meta device, 0 while none does.

    A trace reads it, because autocast does not change these operations.
    """

    scores = 0


def _marked(run: Callable[..., Any], q: Tensor, x: Tensor, *args: Any) -> Any:
    """Return run(q, x, *args), within the `Float32Region` on the meta device."""
    if q.device.type != "meta":
        return run(q, x, *args)
    Float32Region.scores = q.shape[1] * x.shape[1]
    try:
        return run(q, x, *args)
    finally:
        Float32Region.scores = 0


class _SharedKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        ctx.compiled, ctx.mask = _compiled(q, x, learned=ctx.needs_input_grad[1]), mask
        if ctx.compiled:
            out, lse = (part[:, 0] for part in attend.forward(q[:, None], x[:, None], x[:, None], mask, 1.0))
            ctx.save_for_backward(q, x, out, lse)
            return out
        out, lse = _marked(_forward, q, x, mask)
        ctx.save_for_backward(q, x, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        q, x, out, lse = ctx.saved_tensors
        if ctx.compiled:
            rows = q[:, None], x[:, None], x[:, None]
            dq, dx, _ = attend.backward(rows, ctx.mask, 1.0, out[:, None], lse, grad[:, None], ctx.needs_input_grad[1])
            return dq[:, 0], None if dx is None else dx[:, 0], None
        return *_marked(_backward, q, x, out, lse, ctx.mask, grad, ctx.needs_input_grad[1]), None


def _forward(q: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the result and the scores' log-sum-exp (B, N)."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for a, b, rows in _tiles(q, x.shape[1]):
        scores = _masked_scores(q[a:b, rows], x[a:b], mask if mask is None else mask[a:b])
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out[a:b, rows] = torch.bmm(weights.to(x.dtype), x[a:b]).div_(total)
        lse[a:b, rows] = (top + total.log()).squeeze(-1)
    return out, lse


def _backward(
    q: Tensor, x: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, grad: Tensor, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of q and, if it is learned, of x."""
    grad = grad.contiguous()
    delta = (grad * out).sum(-1, keepdim=True)
    dq = torch.empty_like(q)
    dx = torch.zeros_like(x) if learned else None
    for a, b, rows in _tiles(q, x.shape[1]):
        part = mask if mask is None else mask[a:b]
        weights = _masked_scores(q[a:b, rows], x[a:b], part).sub_(lse[a:b, rows, None]).exp_()
        if dx is not None:
            dx[a:b].baddbmm_(weights.to(x.dtype).transpose(1, 2), grad[a:b, rows])
        slopes = torch.bmm(grad[a:b, rows], x[a:b].transpose(1, 2)).sub_(delta[a:b, rows]) * weights
        slopes = slopes.to(x.dtype)
        dq[a:b, rows] = torch.bmm(slopes, x[a:b])
        if dx is not None:
            dx[a:b].baddbmm_(slopes.transpose(1, 2), q[a:b, rows])
    return dq, dx


def _compiled(q: Tensor, x: Tensor, *, learned: bool) -> bool:
    """Return whether to use the compiled kernel; its gradients of x are parallel over items only."""
    return attend.usable(q[:, None], x[:, None]) and (not learned or len(x) >= torch.get_num_threads())


def _masked_scores(q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.bmm(q, x.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if mask is None else scores.masked_fill_(~mask[:, None], -1e30)


def shared_kv(q: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q x^T) x.

    Args:
        q: (B, N, C) scaled queries.
        x: (B, M, C) keys and values; may or may not require a gradient.
        mask: (B, M) bool, True where an element exists.

    Returns:
        (B, N, C) of q's dtype; scores and softmax in x's (float32 at least).
    """
    return _SharedKV.apply(q.to(x.dtype), x, mask).to(q.dtype)


class _SeparableMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, rows, columns = q.contiguous(), rows.contiguous(), columns.contiguous()
        if kernels.usable(q):
            *out, lse = kernels.forward(q, rows, columns, features, scale)
        else:
            *out, lse = moments_forward(q, rows, columns, features, scale)
        ctx.save_for_backward(q, rows, columns, features, scale, lse, *out)
        return out[0], out[1], out[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, rows, columns, features, scale, lse, *out = ctx.saved_tensors
        slopes = [g.contiguous() for g in grads]
        delta = torch.stack([(g * o).sum(-1) for g, o in zip(slopes, out, strict=True)]).sum(0)
        backward = kernels.backward if kernels.usable(q) else moments_backward
        return *backward(q, rows, columns, features, scale, lse, slopes, delta), None, None


def _scores(q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor) -> Tensor:
    """Return (b, n, M) scores q . features + scale * (row + column)."""
    scores = (rows[..., None] + columns[:, :, None, :]).flatten(2).mul_(scale[:, None])
    return scores.baddbmm_(q, features)


def _gather(weights: Tensor, features: Tensor, scale: Tensor, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of (b, n, M) weights times features, and times scale by row and by column; overwrites weights."""
    moments = torch.bmm(weights, features.transpose(1, 2))
    grid = weights.mul_(scale[:, None]).unflatten(2, (height, -1))
    return moments, grid.sum(3), grid.sum(2)


def moments_forward(
    q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the moments and the log-sum-exp (B, N) of `separable_moments` in plain torch."""
    out = torch.empty_like(q), torch.empty_like(rows), torch.empty_like(columns)
    lse = q.new_empty(q.shape[:2])
    for a, b, n in _tiles(q, scale.shape[1]):
        scores = _scores(q[a:b, n], rows[a:b, n], columns[a:b, n], features[a:b], scale[a:b])
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        lse[a:b, n] = (top + total.log()).squeeze(-1)
        for whole, part in zip(out, _gather(weights, features[a:b], scale[a:b], rows.shape[2]), strict=True):
            whole[a:b, n] = part.div_(total)
    return *out, lse


def moments_backward(
    q: Tensor,
    rows: Tensor,
    columns: Tensor,
    features: Tensor,
    scale: Tensor,
    lse: Tensor,
    slopes: list[Tensor],
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, rows and columns in plain torch."""
    out = torch.empty_like(q), torch.empty_like(rows), torch.empty_like(columns)
    for a, b, n in _tiles(q, scale.shape[1]):
        weights = _scores(q[a:b, n], rows[a:b, n], columns[a:b, n], features[a:b], scale[a:b])
        weights.sub_(lse[a:b, n, None]).exp_()
        slope_q, slope_rows, slope_columns = (s[a:b, n] for s in slopes)
        slope = _scores(slope_q, slope_rows, slope_columns, features[a:b], scale[a:b])
        weights.mul_(slope.sub_(delta[a:b, n, None]))
        for whole, part in zip(out, _gather(weights, features[a:b], scale[a:b], rows.shape[2]), strict=True):
            whole[a:b, n] = part
    return out


def separable_moments(
    q: Tensor, rows: Tensor, columns: Tensor, features: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments of softmax(s) with s[n, (y, x)] = q[n] . features[:, (y, x)] + scale[y, x] (rows[n, y] + columns[n, x]).

    Args:
        q: (B, N, F) queries on the features.
        rows: (B, N, H) and
        columns: (B, N, W) parts of the score that depend on the row, the column alone.
        features: (B, F, H*W), no gradient.
        scale: (B, H*W), no gradient.

    Returns:
        With p the softmax over H*W: sum p features (B, N, F); sum over columns of p scale (B, N, H); sum over rows of
        p scale (B, N, W).
    """  # noqa: E501
    return _SeparableMoments.apply(q, rows, columns, features, scale)
