"""Several targets at once, classes and numbers, each by its own output query (Perceiver IO §4.1, multitask queries)."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from perceiver.config import Config, NonNegative, Positive, Real, UserError
from perceiver.tasks._agreement import class_counts, class_figures, number_rows
from perceiver.tasks._base import Batch, LossOutput, Task, model_inputs, valid_rows
from perceiver.tasks._scales import Loss, Scale, TaskTarget, elementwise, error_figures, error_sums, label_key
from perceiver.tasks._weights import ClassWeights, weight_tensor


class MultitaskConfig(Config):
    """For each task a class under `label_NAME` (B,) int64, or a number of that name in `target` (B, k), in units.

    The task `label` has the class under `label`. A negative label does not count.
    """

    kind: Literal["multitask"] = "multitask"
    tasks: dict[str, NonNegative] = Field(min_length=1, description="Weight of the loss by task name.")
    label_smoothing: Real = Field(default=0.0, ge=0, lt=1, description="Probability spread over all classes.")
    class_weights: dict[str, ClassWeights] = Field(
        default={}, description="Weights of the classes by task name: numbers, or `balanced` by frequency."
    )
    loss: Loss = Field(default="mse", description="Loss of normalised numbers: mse, l1 or huber.")
    huber_delta: Positive = Field(default=1.0, description="Deviations from which the Huber loss is linear.")
    targets: dict[str, TaskTarget] | None = Field(
        default=None, description="What each task predicts; default: what the data have, which a run keeps."
    )

    @model_validator(mode="after")
    def _names_are_tasks(self) -> "MultitaskConfig":
        for key, found in (("class_weights", self.class_weights), ("targets", self.targets or {})):
            if strange := found.keys() - self.tasks.keys():
                raise ValueError(f"{key} has {min(strange)}, which tasks has not")
        return self

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return Multitask(self)


class Multitask:
    """See `MultitaskConfig`; the model is a Perceiver IO with a decoder of kind multitask."""

    def __init__(self, config: MultitaskConfig) -> None:
        if not config.tasks:
            raise UserError("task.tasks: got none; wanted at least one task name with its weight")
        self.config = config
        self.known_classes: dict[str, tuple[str, ...]] = {}
        self.columns: dict[str, int] = {}
        self.scales: dict[str, Scale] = {}
        for name, target in (config.targets or {}).items():
            if target.scale is not None and target.column is not None:
                self.columns[name], self.scales[name] = target.column, Scale(target.scale)
            else:
                self.known_classes[name] = target.classes
        self.described = {name: list(self.known_classes.get(name, ())) or None for name in config.tasks}
        self.weights = {
            name: weight_tensor(weights, len(self.known_classes.get(name, ())))
            for name, weights in config.class_weights.items()
        }

    def _target(self, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        """Return the class (B,) int64 or the number (B, 1) normalised, and the valid rows (B,)."""
        key = "target" if name in self.columns else label_key(name)
        if key not in batch:
            raise UserError(f"batch: got keys {sorted(batch)}; wanted '{key}' for task '{name}': check task.tasks")
        found = batch[key]
        valid = valid_rows(batch, len(found), found.device)
        if name in self.columns:
            column = self.columns[name]
            number = found[:, column : column + 1]
            return self.scales[name].normalised(number.where(valid[:, None], torch.zeros_like(number))), valid
        valid = valid & (found >= 0)
        return found.where(valid, torch.zeros_like(found)), valid

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid targets over all tasks."""
        return torch.stack([self._target(batch, name)[1].sum() for name in self.config.tasks]).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the weighted losses over the valid targets of all tasks."""
        outputs: dict[str, Tensor] = model(model_inputs(model, batch))
        losses, sums, rows = [], {}, {}
        for name, share in self.config.tasks.items():
            wanted, valid = self._target(batch, name)
            found = outputs[name].float()
            if name in self.columns:
                each = elementwise(self.config.loss, found, wanted, self.config.huber_delta)[:, 0]
                sums |= error_sums([name], found, wanted, valid)
                if not model.training:
                    rows[f"numbers/{name}"] = number_rows(found[:, 0], wanted[:, 0], valid)
            else:
                weight = self.weights.get(name)
                each = nn.functional.cross_entropy(
                    found,
                    wanted,
                    None if weight is None else weight.to(found.device),
                    reduction="none",
                    label_smoothing=self.config.label_smoothing,
                )
                sums[f"correct/{name}"] = ((found.argmax(1) == wanted) & valid).sum().float()
                if not model.training:
                    sums[f"counts/{name}"] = class_counts(found.argmax(1), wanted, valid, found.shape[1])
            losses.append(share * (each * valid).sum())
            sums[f"loss/{name}"] = (each.detach() * valid).sum()
            sums[f"count/{name}"] = valid.sum().float()
        loss_sum = torch.stack(losses).sum()
        return LossOutput(loss_sum, {"loss": loss_sum.detach(), **sums}, rows)

    def summarise(self, sums: Mapping[str, Any], count: float) -> dict[str, float]:
        """Return loss, `loss_NAME` of each task, `accuracy_NAME` of classes, `mae_NAME`, `rmse_NAME`, `r2_NAME` and
        `pearson_NAME` of numbers, the means `accuracy` and `r2`; of evaluations also f1 and matthews, spearman."""
        metrics = {"loss": sums["loss"] / max(count, 1.0)}
        for name in self.config.tasks:
            n = max(sums[f"count/{name}"], 1.0)
            metrics[f"loss_{name}"] = sums[f"loss/{name}"] / n
            if name in self.columns:
                std = [float(self.scales[name].std[0])]
                metrics |= {key.replace("/", "_"): value for key, value in error_figures([name], std, sums, n).items()}
            else:
                metrics[f"accuracy_{name}"] = sums[f"correct/{name}"] / n
                if f"counts/{name}" in sums:
                    figures = class_figures(sums[f"counts/{name}"])
                    metrics |= {f"{what}_{name}": figure for what, figure in figures.items()}
        for what, names in (("accuracy", self.config.tasks.keys() - self.columns.keys()), ("r2", self.columns.keys())):
            if names:
                metrics[what] = sum(metrics[f"{what}_{name}"] for name in sorted(names)) / len(names)
        return metrics

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `prediction_NAME` (B,) of each task, numbers in units, and `probability_NAME` (B, K) of classes."""
        outputs: dict[str, Tensor] = model(model_inputs(model, batch))
        result = {}
        for name in self.config.tasks:
            if name in self.columns:
                result[f"prediction_{name}"] = self.scales[name].in_units(outputs[name])[:, 0]
            else:
                probability = outputs[name].float().softmax(1)
                result |= {f"prediction_{name}": probability.argmax(1), f"probability_{name}": probability}
        return result

    def known(self, batch: Batch) -> dict[str, Tensor]:
        """Return `label_NAME` and `target_NAME` (B,) of the tasks whose true values the batch has."""
        result = {}
        for name in self.config.tasks:
            if name not in self.columns and label_key(name) in batch:
                result[label_key(name)] = batch[label_key(name)]
            elif name in self.columns and "target" in batch and batch["target"].shape[1] > self.columns[name]:
                result[f"target_{name}"] = batch["target"][:, self.columns[name]]
        return result

    def finish(self, output: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of an exported model: logits (B, K) of classes, numbers (B,) in units."""
        return {
            name: self.scales[name].in_units(found)[:, 0] if name in self.scales else found
            for name, found in output.items()
        }
