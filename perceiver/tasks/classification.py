"""Single-label classification: softmax cross-entropy with label smoothing; accuracy, F1 and Matthews' correlation.

Source: Perceiver §4.1, Perceiver IO App. A.1 (label smoothing 0.1, MixUp and CutMix on half of a batch each).
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Real, Seed, UserError
from perceiver.tasks._agreement import class_counts, class_figures
from perceiver.tasks._base import Batch, LossOutput, RandomTask, Task, labelled_rows
from perceiver.tasks._clips import clip_logits, mean_softmax
from perceiver.tasks._weights import WEIGHTS, ClassWeights, weight_tensor


class ClassificationConfig(Config):
    """Each sample has one class under the batch key `label`; one with a negative label does not count."""

    kind: Literal["classification"] = "classification"
    label_smoothing: Real = Field(default=0.0, ge=0, lt=1, description="Probability spread evenly over all classes.")
    class_weights: ClassWeights = WEIGHTS
    mixup_alpha: Real = Field(
        default=0.0, ge=0, le=1000, description="Beta parameter of MixUp; 0 is off (Perceiver IO: 0.2)."
    )
    cutmix: bool = Field(
        default=False, description="CutMix with a uniform area; with MixUp, each on half of the batch."
    )
    seed: Seed = Field(default=0, description="Seed of MixUp and CutMix.")

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return Classification(self, classes)


class Classification(RandomTask):
    """See `ClassificationConfig`."""

    def __init__(self, config: ClassificationConfig, classes: int) -> None:
        super().__init__(config.seed)
        self.config, self.classes = config, classes
        self.weights = weight_tensor(config.class_weights, classes)

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid samples with a label."""
        return labelled_rows(batch).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum cross-entropy and correct answers over the valid samples.

        The reported loss and accuracy of mixed training batches are against the mixed targets' larger share.
        """
        valid = labelled_rows(batch)
        # A padding row's label may be anything: it must neither index out of range nor count.
        labels = batch["label"].where(valid, torch.zeros_like(batch["label"]))
        mixing = model.training and (self.config.mixup_alpha > 0 or self.config.cutmix)
        if mixing and "image" not in batch:
            raise UserError("task.mixup_alpha: got MixUp or CutMix without an image; wanted the batch key 'image'")
        other, share = labels, None
        if mixing:
            images, partner, share = mix_images(
                batch["image"], valid, self.config.mixup_alpha, self.config.cutmix, self.generator(batch)
            )
            batch, other = {**batch, "image": images}, labels[partner]
        logits = clip_logits(model, batch, mean_softmax)
        loss = self._cross_entropy(logits, labels)
        if share is not None:
            loss = share * loss + (1 - share) * self._cross_entropy(logits, other)
        loss_sum = (loss * valid).sum()
        with torch.no_grad():
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            sums = {
                "loss": loss_sum.detach(),
                "correct": (top[:, 0] & valid).sum().float(),
                "correct_top5": (top.any(1) & valid).sum().float(),
            }
            if not model.training:
                sums["counts"] = class_counts(logits.argmax(1), labels, valid, logits.shape[1])
        return LossOutput(loss_sum, sums)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        weight = None if self.weights is None else self.weights.to(logits.device)
        return nn.functional.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=smoothing)

    def summarise(self, sums: Mapping[str, Any], count: float) -> dict[str, float]:
        """Return loss, accuracy and (for more than five classes) accuracy_top5; of evaluations also f1 and matthews."""
        count = max(count, 1.0)
        metrics = {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}
        if self.classes > 5:
            metrics["accuracy_top5"] = sums["correct_top5"] / count
        return metrics | (class_figures(sums["counts"]) if "counts" in sums else {})

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `prediction` (B,) and `probability` (B, K)."""
        probability = clip_logits(model, batch, mean_softmax).softmax(1)
        return {"prediction": probability.argmax(1), "probability": probability}


def mix_images(
    images: Tensor, valid: Tensor, mixup_alpha: float, cutmix: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with a partner of its batch (Perceiver IO App. A.1 and the released dataset code).

    Args:
        images: (B, C, H, W) uint8 or float.
        valid: (B,) bool; padding rows are neither mixed nor partners.
        mixup_alpha: parameter of the Beta distribution; 0 leaves MixUp out.
        cutmix: whether to CutMix; with MixUp, the batch's first half is mixed up and the second cut.
        generator: CPU generator.

    Returns:
        The mixed images (same type), each one's partner (B,), and the share of its own label (B,) float32.
    """
    batch, device = len(images), images.device
    partner = torch.arange(batch)
    rows = valid.cpu().nonzero()[:, 0]
    partner[rows] = rows.roll(1)
    use_mixup = (torch.arange(batch) < batch // 2) if cutmix else torch.ones(batch, dtype=torch.bool)
    if mixup_alpha <= 0:
        use_mixup = torch.zeros(batch, dtype=torch.bool)
    share = torch.ones(batch)
    if mixup_alpha > 0:
        share = torch.where(use_mixup, _beta(mixup_alpha, batch, generator), share)
    other = images[partner.to(device)]
    weight = share.to(device)[:, None, None, None]
    mixed = images * weight + other * (1 - weight)
    if not images.is_floating_point():
        mixed = mixed.round()
    mixed = mixed.to(images.dtype)
    if cutmix:
        boxes, kept = _boxes(batch, images.shape[-2], images.shape[-1], generator)
        boxes &= ~use_mixup[:, None, None]
        share = torch.where(use_mixup, share, kept)
        mixed = torch.where(boxes.to(device)[:, None], other, mixed)
    return mixed, partner.to(device), share.to(device)


def _beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw Beta(alpha, alpha), by NumPy: its time does not depend on alpha."""
    seed = int(torch.randint(1 << 62, (), generator=generator))
    drawn = np.random.Generator(np.random.Philox(seed)).beta(alpha, alpha, count)
    return torch.from_numpy(drawn).float()


def _boxes(batch: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one box per image whose area is uniform: masks (B, H, W) and the share of the image left outside (B,)."""
    area, y, x = torch.rand(3, batch, generator=generator)
    side = (1 - area).sqrt()
    tall, wide = (side * height).int(), (side * width).int()
    top, left = (y * height).int() - tall // 2, (x * width).int() - wide // 2
    bottom, right = (top + tall).clamp(max=height), (left + wide).clamp(max=width)
    top, left = top.clamp(min=0), left.clamp(min=0)
    rows, columns = torch.arange(height), torch.arange(width)
    inside = (rows >= top[:, None]) & (rows < bottom[:, None])
    across = (columns >= left[:, None]) & (columns < right[:, None])
    boxes = inside[:, :, None] & across[:, None, :]
    return boxes, 1 - boxes.float().mean((1, 2))
