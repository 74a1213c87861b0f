"""A tiny task and batches for tests of training: linear regression onto a fixed target."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perceiver.optim.config import OptimConfig
from tests.perceiver.train.engine.torch_engine import TorchEngine


@dataclass(frozen=True)
class ToyLoss:
    loss_sum: Tensor
    sums: dict[str, Tensor]


class ToyTask:
    """Squared error summed over valid rows."""

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["valid"].sum().float()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> ToyLoss:
        error = ((model(batch["x"]) - batch["y"]) ** 2).squeeze(1) * batch["valid"]
        return ToyLoss(error.sum(), {"absolute": error.detach().sqrt().sum()})

    def summarise(self, sums: dict[str, float], count: float) -> dict[str, float]:
        return {"loss": sums["loss"] / count, "absolute": sums["absolute"] / count}


def toy_batches(start: int, stop: int, rows: int = 8) -> Iterator[dict[str, Tensor]]:
    """Yield batch number ``start`` up to ``stop``, each a function of its number."""
    for index in range(start, stop):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(rows, 4, generator=generator)
        yield {"x": x, "y": x.sum(1, keepdim=True), "valid": torch.ones(rows, dtype=torch.bool)}


def toy_engine(width: int = 4, dropout: float = 0.0) -> TorchEngine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 1))
    return TorchEngine(module, ToyTask(), OptimConfig(lr=0.05), lambda step: 1.0, device=torch.device("cpu"))
