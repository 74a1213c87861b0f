"""The exponential moving average of the weights (`train.ema`), kept as a part of the optimizer's state.

It therefore has the place, the sharding and the checkpoints of the moments, at every ZeRO stage.
"""

from collections.abc import Iterable

import torch
from pydantic import Field
from torch.optim.swa_utils import get_ema_multi_avg_fn

from perceiver.config import Config, Count, Real
from perceiver.optim.partition import AVERAGE, state_of


class EmaConfig(Config):
    """Exponential moving average of the weights (recipe key `train.ema`)."""

    decay: Real = Field(default=0.9999, ge=0, lt=1, description="Share of the average that each update keeps.")
    every: Count = Field(default=1, description="Optimizer steps between two updates of the average.")
    warmup: bool = Field(
        default=True,
        description="Limit the decay of update n to (1 + n) / (10 + n), so that initial weights are soon forgotten.",
    )

    def decay_of(self, update: int) -> float:
        """Return the decay of an update, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay


def expect_average(optimizer: torch.optim.Optimizer) -> None:
    """Make the average one of the optimizer's moments; `start_average` gives it its first values."""
    optimizer.defaults[AVERAGE] = True


@torch.no_grad()
def start_average(optimizer: torch.optim.Optimizer, tensors: Iterable[torch.Tensor]) -> None:
    """Start the average of an optimizer's tensors, before its first step, at their present values."""
    for tensor in tensors:
        state_of(optimizer, tensor).setdefault(AVERAGE, torch.empty_like(tensor)).copy_(tensor)


def update_average(optimizer: torch.optim.Optimizer, config: EmaConfig, step: int) -> None:
    """Move the average towards the weights after an optimizer step, counted from 0."""
    if (step + 1) % config.every:
        return
    pairs = [(state[AVERAGE], tensor.detach()) for tensor, state in optimizer.state.items() if AVERAGE in state]
    averages, weights = zip(*pairs, strict=True)
    get_ema_multi_avg_fn(config.decay_of((step + 1) // config.every))(averages, weights, 0)


@torch.no_grad()
def swap_average(optimizer: torch.optim.Optimizer) -> None:
    """Exchange weights and average, in the optimizer's tensors and its state."""
    for tensor, state in optimizer.state.items():
        if AVERAGE in state:
            weights = tensor.detach().clone()
            tensor.copy_(state[AVERAGE])
            state[AVERAGE].copy_(weights)
