"""Single-label classification: softmax cross-entropy with label smoothing, top-1 and top-5 accuracy.

Source: Perceiver §4.1, Perceiver IO App. A.1 (label smoothing 0.1, MixUp and CutMix on half of a batch each).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, UserError
from perceiver.tasks._base import Batch, LossOutput, RandomTask, Task, valid_rows
from perceiver.tasks._clips import clip_logits, mean_softmax
from perceiver.tasks._mixup import mix_images


class ClassificationConfig(Config):
    """Each sample has one class under the batch key `label`."""

    kind: Literal["classification"] = "classification"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Probability spread evenly over all classes.")
    mixup_alpha: float = Field(default=0.0, ge=0, description="Beta parameter of MixUp; 0 is off (Perceiver IO: 0.2).")
    cutmix: bool = Field(
        default=False, description="CutMix with a uniform area; with MixUp, each on half of the batch."
    )
    seed: int = Field(default=0, description="Seed of MixUp and CutMix.")

    def build(self, *, classes: int) -> Task:
        """Make the task."""
        return Classification(self, classes)


class Classification(RandomTask):
    """See `ClassificationConfig`."""

    def __init__(self, config: ClassificationConfig, classes: int) -> None:
        super().__init__(config.seed)
        self.config, self.classes = config, classes

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid samples."""
        return valid_rows(batch, len(batch["label"]), batch["label"].device).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum cross-entropy and correct answers over the valid samples.

        The reported loss and accuracy of mixed training batches are against the mixed targets' larger share.
        """
        valid = valid_rows(batch, len(batch["label"]), batch["label"].device)
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
        return LossOutput(loss_sum, sums)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    def summarise(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """Return loss, accuracy and (for more than five classes) accuracy_top5."""
        count = max(count, 1.0)
        metrics = {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}
        if self.classes > 5:
            metrics["accuracy_top5"] = sums["correct_top5"] / count
        return metrics

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `prediction` (B,) and `probability` (B, K)."""
        probability = clip_logits(model, batch, mean_softmax).softmax(1)
        return {"prediction": probability.argmax(1), "probability": probability}
