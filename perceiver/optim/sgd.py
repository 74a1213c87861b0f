"""Stochastic gradient descent of torch, with a state like that of the other optimizers."""

from collections.abc import Callable

import torch

from perceiver.optim.partition import state_of


class Sgd(torch.optim.SGD):
    """`torch.optim.SGD` that counts its steps in each tensor's state, as Adam does.

    Torch takes the first gradient as the momentum buffer; a buffer of zeros, which a checkpoint can fill before the
    first step, gives the same without dampening.
    """

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
            for param in group["params"]:
                if param.grad is not None:
                    state_of(self, param)["step"] += 1
        super().step()
        return loss
