"""Multi-label classification: sigmoid cross-entropy, mean average precision over the classes (macro).

Source: Perceiver §4.2 and App. F (AudioSet: average precision as scikit-learn computes it, unweighted mean).
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config
from perceiver.tasks._base import Batch, LossOutput, Task, model_inputs, valid_rows


class TaggingConfig(Config):
    """Each sample has any number of classes: batch key `label` (B, K), 0 or 1."""

    kind: Literal["tagging"] = "tagging"
    bins: int = Field(default=200, ge=2, description="Score bins for the mean average precision during evaluation.")
    most_bins: int = Field(
        default=50_000, ge=0, description="Leave the binned precision out if classes * bins exceed this."
    )

    def build(self, *, classes: int) -> Task:
        """Make the task."""
        return Tagging(self, classes)


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of each class (K,): NaN where a class has no positive.

    Args:
        scores: (S, K) any monotonic scores; ties count as one threshold, as in scikit-learn.
        targets: (S, K) 0 or 1.
    """
    order = scores.argsort(0, descending=True)
    ranked, hits = scores.gather(0, order), targets.gather(0, order).double()
    true = hits.cumsum(0)
    precision = true / torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[:, None]
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:-1] = ranked[:-1] != ranked[1:]
    result = torch.empty(scores.shape[1], dtype=torch.float64, device=scores.device)
    for k in range(scores.shape[1]):
        p, t = precision[last[:, k], k], true[last[:, k], k]
        gained = torch.diff(t, prepend=t.new_zeros(1))
        result[k] = (p * gained).sum() / t[-1] if t[-1] > 0 else math.nan
    return result


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Return the unweighted mean of the classes' average precisions, of the classes that have a positive."""
    return float(average_precision(scores, targets).nanmean())


class Tagging:
    """See `TaggingConfig`."""

    def __init__(self, config: TaggingConfig, classes: int) -> None:
        self.config, self.classes = config, classes
        self.binned = classes * config.bins <= config.most_bins

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid samples."""
        return valid_rows(batch, len(batch["label"]), batch["label"].device).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the valid samples of the classes' mean cross-entropy; in evaluation also counts by score."""
        labels = batch["label"].float()
        valid = valid_rows(batch, len(labels), labels.device)
        logits = model(model_inputs(model, batch)).float()
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        loss_sum = (each * valid).sum()
        sums = {"loss": loss_sum.detach()}
        with torch.no_grad():
            right = ((logits > 0) == (labels > 0.5)).float().mean(1)
            sums["correct"] = (right * valid).sum()
            if self.binned and not model.training:
                sums |= self._histograms(logits[valid], labels[valid])
        return LossOutput(loss_sum, sums)

    def _histograms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Counts of positives and negatives by class and score bin; bins are even in the logit from -10 to 10."""
        bins = self.config.bins
        index = ((logits + 10) / 20 * bins).long().clamp(0, bins - 1)
        index = index + torch.arange(self.classes, device=logits.device) * bins
        positive = labels > 0.5
        counts = {}
        for name, chosen in (("positive", positive), ("negative", ~positive)):
            histogram = torch.bincount(index[chosen], minlength=self.classes * bins).float()
            counts |= {f"{name}/{i}": value for i, value in enumerate(histogram.unbind())}
        return counts

    def summarise(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """Return loss, accuracy of single labels, and mean_average_precision from evaluation's score bins.

        The binned precision treats scores in one bin as ties; `predict` with `mean_average_precision` is exact.
        """
        count = max(count, 1.0)
        metrics = {"loss": sums["loss"] / count, "label_accuracy": sums["correct"] / count}
        if "positive/0" in sums:
            shape = (self.classes, self.config.bins)
            positive, negative = (
                torch.tensor([sums[f"{name}/{i}"] for i in range(math.prod(shape))]).view(shape).flip(1)
                for name in ("positive", "negative")
            )
            true, false = positive.cumsum(1), negative.cumsum(1)
            precision = true / (true + false).clamp(min=1)
            each = (precision * positive).sum(1) / true[:, -1]
            metrics["mean_average_precision"] = float(each.nanmean().nan_to_num())
        return metrics

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `probability` (B, K), and `prediction` (B, K) bool at 0.5."""
        probability = model(model_inputs(model, batch)).float().sigmoid()
        return {"prediction": probability > 0.5, "probability": probability}
