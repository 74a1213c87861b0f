"""Optical flow: end-point error of a Perceiver IO that sees two frames (Perceiver IO §4.2, App. H)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Positive, Seed, Size
from perceiver.tasks._base import Batch, LossOutput, RandomTask, Task, model_inputs, valid_rows


class FlowConfig(Config):
    """Flow under the batch key `flow` (B, 2, H, W) in pixels, horizontal first; `flow_valid` (B, H, W) if partial."""

    kind: Literal["flow"] = "flow"
    limit: Positive | None = Field(default=None, description="Pixels whose true flow is longer do not count.")
    queries: Size | None = Field(default=None, description="Pixels decoded per sample in training; default: all.")
    seed: Seed = Field(default=0, description="Seed of the choice of these pixels.")

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return Flow(self)


class Flow(RandomTask):
    """See `FlowConfig`: the loss is the end-point error, averaged over the valid pixels of all samples.

    With `queries`, training decodes that many random pixels of each sample in each step; a sample's sum is then the
    mean over its chosen valid pixels times the number of its valid pixels, an unbiased estimate of the whole sum.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config.seed)
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

    def asked(self, batch: Batch) -> Tensor:
        """Draw the pixels to decode for each sample, without repetition, (B, queries) int64."""
        rows, pixels = len(batch["flow"]), batch["flow"][0, 0].numel()
        generator = self.generator(batch)
        draws = [torch.randperm(pixels, generator=generator)[: self.config.queries] for _ in range(rows)]
        return torch.stack(draws).to(batch["flow"].device)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the end-point error over the valid pixels."""
        valid = self._valid(batch).flatten(1)
        # Unknown flow may have any value, infinity too: it must not enter the sum.
        flow = batch["flow"].float().flatten(2).where(valid[:, None], torch.zeros((), device=valid.device))
        weight = torch.ones_like(valid, dtype=torch.float32)
        if self.config.queries is not None and model.training:
            index = self.asked(batch)
            total, valid = valid.sum(1), valid.gather(1, index)
            weight = (total / valid.sum(1).clamp(min=1))[:, None].expand(valid.shape)
            flow = flow.gather(2, index[:, None].expand(-1, 2, -1))
            found = model(model_inputs(model, batch), {"flow": index})
        else:
            found = model(model_inputs(model, batch)).flatten(2)
        error = ((found.float() - flow).square().sum(1) + 1e-12).sqrt()
        loss_sum = (error * weight)[valid].sum()
        far = (error > 3) & (error > 0.05 * flow.norm(dim=1)) & valid
        return LossOutput(loss_sum, {"loss": loss_sum.detach(), "outliers": (far * weight).sum()})

    def summarise(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """Return loss and epe (both the end-point error in pixels), and KITTI's share of outliers."""
        count = max(count, 1.0)
        error = sums["loss"] / count
        return {"loss": error, "epe": error, "outliers": sums["outliers"] / count}

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the flow as `prediction` (B, 2, H, W) in pixels."""
        return {"prediction": model(model_inputs(model, batch)).float()}
