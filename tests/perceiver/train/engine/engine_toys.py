"""A small model and task that the engine tests share: parameters of every kind, dropout-free, seeded."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
FEATURES, CLASSES = 6, 5


class ToyModel(nn.Module):
    """(B, FEATURES) -> (B, CLASSES): latents, a norm, odd sizes, a buffer, a frozen parameter, one that is zero."""

    scale: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.enter = nn.Linear(FEATURES, 7)
        self.norm = nn.LayerNorm(7)
        self.latents = nn.Parameter(torch.zeros(3, 7))
        self.leave = nn.Linear(7, CLASSES)
        self.shift = nn.Parameter(torch.zeros(CLASSES))
        self.frozen = nn.Parameter(torch.zeros(9), requires_grad=False)
        self.register_buffer("scale", torch.tensor([0.5]))
        with torch.no_grad():
            for name, param in self.named_parameters():
                if name != "shift":
                    param.copy_(torch.randn(param.shape, generator=generator) * 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.enter(inputs * self.scale)))
        attended = torch.softmax(hidden @ self.latents.T, -1) @ self.latents
        return self.leave(hidden + attended) + self.shift + self.frozen[:CLASSES]


@dataclass(frozen=True)
class ToyOutput:
    loss_sum: Tensor
    sums: Mapping[str, Tensor]


class ToyTask:
    """Classification with padding rows."""

    def count(self, batch: Batch) -> Tensor:
        return batch["valid"].sum()

    def loss(self, model: nn.Module, batch: Batch) -> ToyOutput:
        logits = model(batch["inputs"]).float()
        each = nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        valid = batch["valid"]
        correct = ((logits.argmax(-1) == batch["label"]) & valid).sum()
        return ToyOutput(torch.where(valid, each, 0.0).sum(), {"correct": correct})

    def summarise(self, sums: dict[str, float], count: float) -> dict[str, float]:
        return {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}


def toy_rows(step: int, rows: int) -> Batch:
    """Return the rows of one global batch: row r of step s is the same for any number; a fifth is padding."""
    drawn = [torch.Generator().manual_seed(1000 * step + row) for row in range(rows)]
    inputs = torch.stack([torch.randn(FEATURES, generator=generator) for generator in drawn])
    label = torch.stack([torch.randint(CLASSES, (), generator=generator) for generator in drawn])
    return {"inputs": inputs, "label": label, "valid": torch.arange(rows) % 5 != 0}


def share(batch: Batch, rank: int, world: int, micro_batches: int) -> list[Batch]:
    """Return this rank's micro-batches: a contiguous part of the rows, cut into equal pieces."""
    parts = {name: tensor.chunk(world)[rank].chunk(micro_batches) for name, tensor in batch.items()}
    return [{name: pieces[index] for name, pieces in parts.items()} for index in range(micro_batches)]
