"""Regression: numbers per sample, normalised by the training split; MAE and RMSE in their units, R2, correlations."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Positive
from perceiver.tasks._agreement import number_rows
from perceiver.tasks._base import Batch, LossOutput, Task, valid_rows
from perceiver.tasks._clips import clip_logits, mean_output
from perceiver.tasks._scales import Loss, Scale, Targets, elementwise, error_figures, error_sums, given


class RegressionConfig(Config):
    """Each sample has numbers under the batch key `target` (B, k), in units."""

    kind: Literal["regression"] = "regression"
    loss: Loss = Field(default="mse", description="Loss of the normalised numbers: mse, l1 or huber.")
    huber_delta: Positive = Field(default=1.0, description="Deviations from which the Huber loss is linear.")
    targets: Targets | None = Field(
        default=None, description="Names, means and deviations; default: those of the data, which a run keeps."
    )

    @property
    def outputs(self) -> int:
        """Number of outputs of the model."""
        return len(given(self.targets).names)

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return Regression(self)


class Regression:
    """See `RegressionConfig`: the loss is the mean over a sample's numbers, averaged over the valid samples."""

    def __init__(self, config: RegressionConfig) -> None:
        self.config, targets = config, given(config.targets)
        self.scale, self.names, self.std = Scale(targets), targets.names, targets.std
        self.described = list(targets.names)

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid samples."""
        return valid_rows(batch, len(batch["target"]), batch["target"].device).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the loss and the errors over the valid samples."""
        target = batch["target"]
        valid = valid_rows(batch, len(target), target.device)
        # A padding row's target may be anything: it must not enter the sum.
        wanted = self.scale.normalised(target.where(valid[:, None], torch.zeros_like(target)))
        found = clip_logits(model, batch, mean_output)
        each = elementwise(self.config.loss, found, wanted, self.config.huber_delta).mean(1)
        loss_sum = (each * valid).sum()
        columns = () if model.training else zip(self.names, found.T, wanted.T, strict=True)
        rows = {f"numbers/{name}": number_rows(given, true, valid) for name, given, true in columns}
        return LossOutput(loss_sum, {"loss": loss_sum.detach(), **error_sums(self.names, found, wanted, valid)}, rows)

    def summarise(self, sums: Mapping[str, Any], count: float) -> dict[str, float]:
        """Return loss, and mae, rmse, r2, pearson, in evaluations also spearman: means over the numbers, and of each
        `mae_NAME` and so on if there are several."""
        each = error_figures(self.names, self.std, sums, count)
        figures = {"loss": sums["loss"] / max(count, 1.0)}
        for what in dict.fromkeys(key.partition("/")[0] for key in each):
            figures[what] = sum(each[f"{what}/{name}"] for name in self.names) / len(self.names)
        if len(self.names) > 1:
            figures |= {key.replace("/", "_"): value for key, value in each.items()}
        return figures

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `prediction_NAME` (B,) of each number, in units."""
        found = self.scale.in_units(clip_logits(model, batch, mean_output))
        return {f"prediction_{name}": found[:, number] for number, name in enumerate(self.names)}

    def known(self, batch: Batch) -> dict[str, Tensor]:
        """Return `target_NAME` (B,) of each number, in units, if the batch has them."""
        target = batch.get("target")
        if target is None or target.shape[1] != len(self.names):
            return {}
        return {f"target_{name}": target[:, number] for number, name in enumerate(self.names)}

    def finish(self, output: Any) -> dict[str, Tensor]:
        """Return the outputs of an exported model: `prediction` (B, k), in units."""
        return {"prediction": self.scale.in_units(output)}
