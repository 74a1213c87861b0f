"""The task `brier`: classification by the Brier score, the squared error of the probabilities."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Positive
from perceiver.tasks import Batch, LossOutput, Task, model_inputs


class BrierConfig(Config):
    """Each sample has one class under the batch key `label`. A recipe sets these keys below `task:`."""

    kind: Literal["brier"] = "brier"
    weight: Positive = Field(default=1.0, description="Factor of the loss.")

    def build(self, *, classes: int) -> Task:
        """Build the task for data of `classes` classes."""
        return Brier(self, classes)


class Brier:
    """See `BrierConfig`. All sums are over valid samples: a batch may end with rows of padding."""

    def __init__(self, config: BrierConfig, classes: int) -> None:
        self.config, self.classes = config, classes

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid samples."""
        return self._valid(batch).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the loss and the right answers."""
        valid = self._valid(batch)
        label = batch["label"].where(valid, torch.zeros_like(batch["label"]))
        logits = model(model_inputs(model, batch)).float()
        wanted = nn.functional.one_hot(label, self.classes)
        error = (logits.softmax(-1) - wanted).square().sum(-1)
        loss = (self.config.weight * error * valid).sum()
        right = ((logits.argmax(-1) == label) & valid).sum()
        return LossOutput(loss, {"loss": loss.detach(), "right": right.float()})

    def summarise(self, sums: Mapping[str, Any], count: float) -> dict[str, float]:
        """Return mean loss and accuracy."""
        return {"loss": sums["loss"] / max(count, 1), "accuracy": sums["right"] / max(count, 1)}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return class and probabilities of each sample."""
        probability = model(model_inputs(model, batch)).float().softmax(-1)
        return {"prediction": probability.argmax(-1), "probability": probability}

    @staticmethod
    def _valid(batch: Batch) -> Tensor:
        return batch.get("valid", torch.ones_like(batch["label"], dtype=torch.bool))
