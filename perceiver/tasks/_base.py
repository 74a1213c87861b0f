"""The interface of a task to the training loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from perceiver.config import UserError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's loss and metric sums, all over valid targets and additive over micro-batches and ranks.

    Args:
        loss_sum: 0-d, with gradient.
        sums: without gradient; includes `loss`. `summarise` gets 0-d sums as floats, others as tensors.
        rows: in evaluation, values of single samples (n, width) int64 that a metric needs all of, such as texts.
            `summarise` gets those of all ranks, in any order.
    """

    loss_sum: Tensor
    sums: dict[str, Tensor]
    rows: Mapping[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """Targets, loss and metrics of a batch."""

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid targets (0-d float) of a micro-batch, without a forward pass."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Run the model and sum the loss over the valid targets."""
        ...

    def summarise(self, sums: Mapping[str, Any], count: float) -> dict[str, float]:
        """Turn sums over all ranks and micro-batches into metrics."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return per-sample results."""
        ...


def model_inputs(model: nn.Module, batch: Batch) -> Tensor | dict[str, Tensor]:
    """Return the argument of the model: the tensor of its one key, or a dict of those of its keys that the batch has.

    Those include optional keys, and in training what a task adds for the model's inputs (`training_keys`).

    Raises:
        UserError: the batch lacks a key of the model.
    """
    net = network(model)
    keys: tuple[str, ...] = tuple(net.input_keys)
    optional: tuple[str, ...] = tuple(getattr(net, "optional_keys", ()))
    if model.training:
        reads = net if hasattr(net, "training_keys") else getattr(net, "inputs", None)
        optional += tuple(getattr(reads, "training_keys", ()))
    for key in keys:
        if key not in batch:
            raise UserError(f"batch: got keys {sorted(batch)}; wanted '{key}' for this model: check model.inputs.kind")
    present = {key: batch[key] for key in keys + optional if key in batch}
    return batch[keys[0]] if len(present) == 1 else present


def network(model: nn.Module) -> Any:
    """Return the model without its wrappers for training."""
    while not hasattr(model, "input_keys") and isinstance(getattr(model, "module", None), nn.Module):
        model = cast(nn.Module, model.module)
    return model


def valid_rows(batch: Batch, rows: int, device: torch.device) -> Tensor:
    """Return which rows are valid, (B,) bool; all if the batch has no key `valid`."""
    valid = batch.get("valid")
    return torch.ones(rows, dtype=torch.bool, device=device) if valid is None else valid


def labelled_rows(batch: Batch) -> Tensor:
    """Return which rows are valid and have a label, (B,) bool; a negative class id is no label."""
    labels = batch["label"]
    return valid_rows(batch, len(labels), labels.device) & (labels >= 0)


class RandomTask:
    """A task that draws random numbers while training.

    The numbers depend only on `seed`, `step` and the first sample's id, so that a resumed run repeats them. The engine
    sets `step` before each optimizer step.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.step = 0

    def generator(self, batch: Batch) -> torch.Generator:
        """Return a CPU generator for this micro-batch."""
        first = int(batch["sample_id"][0]) if "sample_id" in batch else 0
        mixed = (self.seed * 0x9E3779B1 + self.step * 0x85EBCA77 + first * 0xC2B2AE3D + 1) % (1 << 63)
        return torch.Generator().manual_seed(mixed)
