"""Several classifications at once, each by its own output query (Perceiver IO §4.1, multitask queries)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, NonNegative, Real, UserError
from perceiver.tasks._base import Batch, LossOutput, Task, model_inputs, valid_rows


class MultitaskConfig(Config):
    """Labels under `label_NAME` (B,) int64 for each task; a negative label does not count."""

    kind: Literal["multitask"] = "multitask"
    tasks: dict[str, NonNegative] = Field(min_length=1, description="Weight of the loss by task name.")
    label_smoothing: Real = Field(default=0.0, ge=0, lt=1, description="Probability spread over all classes.")

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return Multitask(self)


class Multitask:
    """See `MultitaskConfig`; the model is a Perceiver IO with a decoder of kind multitask."""

    def __init__(self, config: MultitaskConfig) -> None:
        if not config.tasks:
            raise UserError("task.tasks: got none; wanted at least one task name with its weight")
        self.config = config

    def _targets(self, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        key = f"label_{name}"
        if key not in batch:
            raise UserError(f"batch: got keys {sorted(batch)}; wanted '{key}' for task '{name}': check task.tasks")
        label = batch[key]
        valid = valid_rows(batch, len(label), label.device) & (label >= 0)
        return label.where(valid, torch.zeros_like(label)), valid

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid labels over all tasks."""
        return torch.stack([self._targets(batch, name)[1].sum() for name in self.config.tasks]).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the weighted cross-entropies over the valid labels of all tasks."""
        logits: dict[str, Tensor] = model(model_inputs(model, batch))
        losses, sums = [], {}
        for name, weight in self.config.tasks.items():
            label, valid = self._targets(batch, name)
            scores = logits[name].float()
            each = nn.functional.cross_entropy(
                scores, label, reduction="none", label_smoothing=self.config.label_smoothing
            )
            losses.append(weight * (each * valid).sum())
            sums[f"loss/{name}"] = (each.detach() * valid).sum()
            sums[f"correct/{name}"] = ((scores.argmax(1) == label) & valid).sum().float()
            sums[f"count/{name}"] = valid.sum().float()
        loss_sum = torch.stack(losses).sum()
        return LossOutput(loss_sum, {"loss": loss_sum.detach(), **sums})

    def summarise(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """Return loss, and loss and accuracy of each task and their mean."""
        metrics = {"loss": sums["loss"] / max(count, 1.0)}
        for name in self.config.tasks:
            n = max(sums[f"count/{name}"], 1.0)
            metrics[f"loss_{name}"] = sums[f"loss/{name}"] / n
            metrics[f"accuracy_{name}"] = sums[f"correct/{name}"] / n
        metrics["accuracy"] = sum(metrics[f"accuracy_{name}"] for name in self.config.tasks) / len(self.config.tasks)
        return metrics

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `prediction_NAME` (B,) and `probability_NAME` (B, K) for each task."""
        logits: dict[str, Tensor] = model(model_inputs(model, batch))
        result = {}
        for name in self.config.tasks:
            probability = logits[name].float().softmax(1)
            result |= {f"prediction_{name}": probability.argmax(1), f"probability_{name}": probability}
        return result
