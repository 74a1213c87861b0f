"""Semantic segmentation: a class for each pixel, from Perceiver IO's queries at the pixels; mean IoU."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Real, Seed, Size
from perceiver.tasks._base import Batch, LossOutput, RandomTask, Task, model_inputs, valid_rows
from perceiver.tasks._weights import weight_tensor

IGNORED = 255
"""Pixels of this class do not count."""


class SegmentationConfig(Config):
    """Classes under the batch key `mask` (B, H, W) uint8; 255 does not count."""

    kind: Literal["segmentation"] = "segmentation"
    class_weights: tuple[Annotated[Real, Field(ge=0, le=1e6)], ...] | None = Field(
        default=None, description="Weight of each class in the loss."
    )
    queries: Size | None = Field(default=None, description="Pixels decoded per sample in training; default: all.")
    seed: Seed = Field(default=0, description="Seed of the choice of these pixels.")

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return Segmentation(self, classes)


class Segmentation(RandomTask):
    """See `SegmentationConfig`: cross-entropy, averaged over the valid pixels of all samples.

    The model's outputs are logits (B, K, h, w), enlarged to the mask's size where they are coarser. With `queries`,
    for which both sizes must be the same, training decodes that many random pixels of each sample; a sample's sum is
    then the mean over its chosen valid pixels times the number of its valid pixels, an unbiased estimate of the whole.
    """

    def __init__(self, config: SegmentationConfig, classes: int) -> None:
        super().__init__(config.seed)
        self.config, self.classes = config, classes
        self.weights = weight_tensor(config.class_weights, classes)

    def _valid(self, batch: Batch) -> Tensor:
        mask = batch["mask"]
        return valid_rows(batch, len(mask), mask.device)[:, None, None] & (mask != IGNORED) & (mask >= 0)

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid pixels."""
        return self._valid(batch).sum().float()

    def asked(self, batch: Batch) -> Tensor:
        """Draw the pixels to decode for each sample, without repetition, (B, queries) int64."""
        rows, pixels = len(batch["mask"]), batch["mask"][0].numel()
        generator = self.generator(batch)
        draws = [torch.randperm(pixels, generator=generator)[: self.config.queries] for _ in range(rows)]
        return torch.stack(draws).to(batch["mask"].device)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the cross-entropy over the valid pixels; in evaluation also count pixels by class and prediction."""
        valid = self._valid(batch).flatten(1)
        mask = batch["mask"].flatten(1).long().where(valid, 0)
        share = torch.ones_like(valid, dtype=torch.float32)
        if self.config.queries is not None and model.training:
            index = self.asked(batch)
            total, mask, valid = valid.sum(1), mask.gather(1, index), valid.gather(1, index)
            share = (total / valid.sum(1).clamp(min=1))[:, None].expand(valid.shape)
            logits = model(model_inputs(model, batch), {"pixels": index}).float()
        else:
            logits = self._logits(model, batch, batch["mask"].shape[1:]).flatten(2)
        weight = None if self.weights is None else self.weights.to(logits.device)
        each = nn.functional.cross_entropy(logits, mask, weight, reduction="none")
        loss_sum = (each * share * valid).sum()
        with torch.no_grad():
            found = logits.argmax(1)
            sums = {"loss": loss_sum.detach(), "correct": ((found == mask) & valid).float().mul(share).sum()}
            if not model.training:
                pairs = mask[valid] * self.classes + found[valid]
                counts = torch.bincount(pairs, minlength=self.classes**2)
                sums["confusion"] = counts.view(self.classes, self.classes).double()
        return LossOutput(loss_sum, sums)

    def _logits(self, model: nn.Module, batch: Batch, size: torch.Size) -> Tensor:
        logits = model(model_inputs(model, batch)).float()
        if logits.shape[2:] != size:
            logits = nn.functional.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
        return logits

    def summarise(self, sums: Mapping[str, Any], count: float) -> dict[str, float]:
        """Return loss and pixel_accuracy, and in evaluation mean_iou over the classes that occur or are predicted."""
        count = max(count, 1.0)
        metrics = {"loss": sums["loss"] / count, "pixel_accuracy": sums["correct"] / count}
        if "confusion" in sums:
            metrics["mean_iou"] = float(class_iou(sums["confusion"]).nanmean().nan_to_num())
        return metrics

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the classes as `prediction` (B, H, W) uint8, at the size of the images."""
        size = batch["image"].shape[2:] if "image" in batch else batch["mask"].shape[1:]
        return {"prediction": self._logits(model, batch, size).argmax(1).to(torch.uint8)}

    def known(self, batch: Batch) -> dict[str, Tensor]:
        """Return nothing: masks are the data's own files."""
        return {}


def class_iou(confusion: Tensor) -> Tensor:
    """Return intersection over union of each class (K,), NaN for classes without a pixel.

    Args:
        confusion: (K, K) pixels; row = class, column = prediction.
    """
    hit = confusion.diagonal().double()
    union = confusion.sum(0).double() + confusion.sum(1).double() - hit
    return hit / union.where(union > 0, torch.nan)
