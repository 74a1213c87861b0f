# pyright: reportPrivateImportUsage=false
"""AdamW by torch's fused kernel, and the light base class that it shares with LAMB.

torch's own optimizers import torch's compiler when they are built and stepped, which takes a second of every worker's
start and is used for nothing here.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LightOptimizer(Optimizer):
    """A torch optimizer with two moments, whose methods are not guarded against torch.compile, so nothing imports it.

    State per tensor as in torch's AdamW: `step` (0-d), `exp_avg` and `exp_avg_sq` (like the tensor).
    """

    steps_on_device: bool
    """Whether `step` lies on the tensor's device, as fused kernels want, or on the CPU, where reading it is cheap."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] the base class declares it by overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One update of every tensor that has a gradient; a closure is evaluated first, as torch optimizers do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self.update(params, [param.grad for param in params], group)
        return loss

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Update the tensors of one group in place."""
        raise NotImplementedError

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """The state of one tensor, made on first use."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device if self.steps_on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


class AdamW(LightOptimizer):
    """AdamW (arXiv 1711.05101): the update and the state of `torch.optim.AdamW(fused=True)`, bit for bit."""

    steps_on_device = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Update the tensors of one group in place, in one kernel."""
        states = [self.state_of(param) for param in params]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
