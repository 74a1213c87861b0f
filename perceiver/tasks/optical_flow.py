"""Optical flow: end-point error of a Perceiver IO that sees two frames (Perceiver IO §4.2, App. H)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Positive, Seed, Size, UserError
from perceiver.tasks._base import Batch, LossOutput, RandomTask, Task, model_inputs, network, valid_rows


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

    Frames that are larger than the model's (`data.flow.eval_size`) are answered in tiles, whose flows are averaged with
    the weights of `tile_weights` (App. H).
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
            found = self._whole(model, batch).flatten(2)
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
        return {"prediction": self._whole(model, batch).float()}

    def _whole(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the flow (B, 2, H, W) of frames of the model's size, or of larger ones from tiles."""
        frames, size = batch["video"], network(model).decoder.grid
        if tuple(frames.shape[3:]) == size:
            return model(model_inputs(model, batch))
        rows, columns = (tile_starts(*pair) for pair in zip(frames.shape[3:], size, strict=True))
        weight = tile_weights(size).to(frames.device)
        total = torch.zeros(len(frames), 2, *frames.shape[3:], device=frames.device)
        weights = torch.zeros(frames.shape[3:], device=frames.device)
        for top in rows:
            for left in columns:
                place = (..., slice(top, top + size[0]), slice(left, left + size[1]))
                part = {**batch, "video": frames[place].contiguous()}
                total[place] += model(model_inputs(model, part)).float() * weight
                weights[place] += weight
        return total / weights


def tile_starts(length: int, tile: int, overlap: int = 20) -> list[int]:
    """Return where tiles start along an axis: as many as needed to overlap by at least `overlap`, the last at the end.

    As in the released code of Perceiver IO: two and three, six tiles, for Sintel's 436 x 1024 and tiles of 368 x 496.

    Raises:
        UserError: the axis is shorter than a tile.
    """
    if length < tile:
        raise UserError(
            f"frames of {length} pixels for a model of {tile}: wanted at least as many: set data.flow.eval_size"
        )
    starts = [*range(0, length, max(1, tile - overlap))]
    return sorted({min(start, length - tile) for start in [*starts[:-1], length - tile]})


def tile_weights(size: tuple[int, int]) -> Tensor:
    """Return the weight of each pixel of a tile (h, w): its distance to the nearest edge, 1 at the edge."""
    rows, columns = (torch.minimum(torch.arange(n) + 1, n - torch.arange(n)).float() for n in size)
    return torch.minimum(rows[:, None], columns[None])
