# pyright: reportPrivateImportUsage=false
"""LAMB (arXiv 1904.00962) in the order of operations of the Perceiver papers, correct also on ZeRO's flat partitions.

Per parameter tensor, with the gradient clipped before (by the engine):

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p
    p = p - lr * trust * u,  trust = |p| / |u|, or 1 if either norm is 0

as optax composes it: scale_by_adam, add_decayed_weights, scale_by_trust_ratio, scale by -lr.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from perceiver.optim.partition import FlatLayout, state_of


class Lamb(torch.optim.Optimizer):
    """LAMB with a trust ratio per parameter tensor.

    Without sharding, each tensor in `params` is one parameter. An engine that replaces the parameters by flat
    partitions calls `shard` with the slices of each parameter; squared norms are then summed over the ranks (one small
    all-reduce per flat tensor and step), so that the update equals the unsharded one.

    Parameters are expected in float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._layouts: dict[int, FlatLayout] = {}
        self._numbers: dict[int, Tensor] = {}
        self._all_reduce: Callable[[Tensor], None] | None = None

    def shard(self, layouts: Mapping[Tensor, FlatLayout], all_reduce: Callable[[Tensor], None]) -> None:
        """Set the layout of parameters in the flat tensors that have replaced them.

        Args:
            layouts: layout by flat tensor; the parameter groups must contain the same tensor objects.
            all_reduce: sums a float32 tensor over the ranks in place.
        """
        self._layouts = {id(flat): layout for flat, layout in layouts.items()}
        # On the device once: a copy in each step would wait for the GPU.
        self._numbers = {
            id(flat): torch.tensor([piece.parameter for piece in layout.pieces], dtype=torch.int64, device=flat.device)
            for flat, layout in layouts.items()
        }
        self._all_reduce = all_reduce

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] the base class declares it by overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every tensor that has a gradient; a closure is evaluated first, as torch optimizers do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                updates = self._adam_updates(params, [param.grad for param in params], group)
                self._scale_by_trust(params, updates)
                torch._foreach_add_(params, updates, alpha=-group["lr"])
        return loss

    def _adam_updates(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Update the moments; return the bias-corrected Adam directions plus weight decay, one per tensor."""
        beta1, beta2 = group["betas"]
        states = [state_of(self, param) for param in params]
        steps = [int(state["step"]) + 1 for state in states]
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        for state in states:
            state["step"] += 1
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominators = torch._foreach_div(second, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(first, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, denominators)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return list(updates)

    def _scale_by_trust(self, params: list[Tensor], updates: list[Tensor]) -> None:
        """Multiply each parameter's part of the updates by its trust ratio, in place."""
        if self._all_reduce is None:
            ratios = _trust_ratios(_squared_norms(params), _squared_norms(updates))
            torch._foreach_mul_(updates, list(ratios.unbind()))
            return
        for param, update in zip(params, updates, strict=True):
            self._scale_flat_by_trust(param, update)

    def _scale_flat_by_trust(self, param: Tensor, update: Tensor) -> None:
        layout = self._layouts[id(param)]
        squares = torch.zeros(2, len(layout.names), dtype=torch.float32, device=param.device)
        parts = [update.narrow(0, piece.offset, piece.length) for piece in layout.pieces]
        numbers = self._numbers[id(param)]
        if parts:
            mine = [param.narrow(0, piece.offset, piece.length) for piece in layout.pieces]
            squares[0].index_add_(0, numbers, _squared_norms(mine))
            squares[1].index_add_(0, numbers, _squared_norms(parts))
        assert self._all_reduce is not None
        self._all_reduce(squares)
        if parts:
            ratios = _trust_ratios(squares[0], squares[1])[numbers]
            torch._foreach_mul_(parts, list(ratios.unbind()))


def _squared_norms(tensors: list[Tensor]) -> Tensor:
    """Return squared L2 norms, float32 (len(tensors),)."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).square_()


def _trust_ratios(param_squares: Tensor, update_squares: Tensor) -> Tensor:
    """Return |p| / |u| from squared norms, elementwise; 1 where either is 0."""
    ratios = (param_squares / update_squares).sqrt()
    return torch.where((param_squares > 0) & (update_squares > 0), ratios, torch.ones_like(ratios))
