"""Optical flow: end-point error of a Perceiver IO that sees two frames (Perceiver IO §4.2, App. H)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config
from perceiver.tasks._base import Batch, LossOutput, Task, model_inputs, valid_rows


class FlowConfig(Config):
    """Flow under the batch key `flow` (B, 2, H, W) in pixels, horizontal first; `flow_valid` (B, H, W) if partial."""

    kind: Literal["flow"] = "flow"
    limit: float | None = Field(default=None, gt=0, description="Pixels whose true flow is longer do not count.")

    def build(self, *, classes: int) -> Task:
        """Make the task."""
        return Flow(self)


class Flow:
    """See `FlowConfig`: the loss is the end-point error, averaged over the valid pixels of all samples."""

    def __init__(self, config: FlowConfig) -> None:
        self.config = config

    def _valid(self, batch: Batch) -> Tensor:
        flow = batch["flow"]
        valid = valid_rows(batch, len(flow), flow.device)[:, None, None].expand(-1, *flow.shape[2:])
        if "flow_valid" in batch:
            valid = valid & batch["flow_valid"]
        if self.config.limit is not None:
            valid = valid & (flow.norm(dim=1) <= self.config.limit)
        return valid

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid pixels."""
        return self._valid(batch).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the end-point error over the valid pixels."""
        valid = self._valid(batch)
        # Unknown flow may be stored as anything, infinity too: it must not reach the sum.
        flow = batch["flow"].float().where(valid[:, None], torch.zeros((), device=valid.device))
        difference = model(model_inputs(model, batch)).float() - flow
        error = (difference.square().sum(1) + 1e-12).sqrt()
        loss_sum = error[valid].sum()
        far = (error > 3) & (error > 0.05 * flow.norm(dim=1)) & valid
        return LossOutput(loss_sum, {"loss": loss_sum.detach(), "outliers": far.sum().float()})

    def summarise(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """Return loss and epe (both the end-point error in pixels), and KITTI's share of outliers."""
        count = max(count, 1.0)
        error = sums["loss"] / count
        return {"loss": error, "epe": error, "outliers": sums["outliers"] / count}

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the flow as `prediction` (B, 2, H, W) in pixels."""
        return {"prediction": model(model_inputs(model, batch)).float()}
