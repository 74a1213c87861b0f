"""Multi-label classification: sigmoid cross-entropy, mean average precision over the classes (macro).

Source: Perceiver §4.2 and App. F (AudioSet: average precision as scikit-learn computes it, unweighted mean).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from perceiver.config import Config, NonNegative, Positive, Real, Seed, UserError
from perceiver.tasks._base import Batch, LossOutput, RandomTask, Task, network, valid_rows
from perceiver.tasks._clips import clip_logits, mean_sigmoid
from perceiver.tasks._pairs import mixed_pairs, pair_shares, partners
from perceiver.tasks._weights import ClassWeights, weight_tensor

SPAN = 20.0
"""Logits are counted in even bins from -SPAN to SPAN; float32 scores beyond are all but certain."""
HEAD_LOSS = "loss_"
"""Beginning of the names of the losses of several classifiers."""


class TaggingConfig(Config):
    """Each sample has any number of classes: batch key `label` (B, K), 0 or 1; a negative entry does not count."""

    kind: Literal["tagging"] = "tagging"
    class_weights: ClassWeights = Field(
        default=None,
        description="Weight of each class's positives: numbers, or `balanced` (its negatives / its positives).",
    )
    bins: int = Field(
        default=8192,
        ge=2,
        le=1 << 20,
        description="Score bins of the mean average precision in evaluation; 16 bytes per class each.",
    )
    mixup_alpha: Real = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Beta parameter of MixUp of sound, and of video with it; 0 is off (CNN-14: 1).",
    )
    mixup_on: Literal["waveform", "spectrogram"] = Field(
        default="waveform", description="What MixUp mixes: samples, or log-mel values after SpecAugment (CNN-14)."
    )
    seed: Seed = Field(default=0, description="Seed of MixUp.")
    blend: dict[str, NonNegative] | None = Field(
        default=None,
        description="Weights of the losses of a late_fusion's classifiers by the names of its branches, and joint "
        "(G-blend); a missing one is 0. `perceiver blend` estimates them.",
    )
    blend_every: Positive | None = Field(
        default=None, description="Epochs between two new estimates of the weights of `blend`; null: they stay."
    )
    blend_split: str | None = Field(
        default=None,
        description="Split of held-out training samples for these estimates, of which no result is reported; null: "
        "data.eval_split.",
    )

    @model_validator(mode="after")
    def _some_weight(self) -> "TaggingConfig":
        if self.blend is not None and not sum(self.blend.values()):
            raise ValueError("blend has no weight above 0")
        if self.blend_every and self.blend is None:
            raise ValueError("blend_every needs blend, the weights until the first estimate")
        return self

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return Tagging(self, classes)


def binned_precision(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the average precision of each class (K,) from counts by score bin, and the least and greatest it can be.

    The first takes the positives of a bin as spread evenly among its negatives: the i-th of p comes after i n / (p + 1)
    of n. A model that gives all samples one score has the share of positives, as in scikit-learn.

    Whatever the order and the ties within a bin, the precision at the bin's i-th best positive is at least
    (T + i) / (T + i + F + n) and at most (T + p) / (T + p + F), where T and F are the positives and negatives of the
    better bins, p and n those of this one. Sums over i of such fractions are differences of digamma functions.

    Args:
        positive: (K, bins) samples of the class, best scores first.
        negative: (K, bins) the others.
    """
    positive, negative = positive.double(), negative.double()
    true, false = positive.cumsum(1) - positive, negative.cumsum(1)
    better = false - negative
    total = positive.sum(1)

    def summed(before: Tensor, each: Tensor) -> Tensor:
        """Return the sum over i of (T + i) / (`before` + `each` * i)."""
        start = before / each
        harmonic = torch.digamma(start + positive + 1) - torch.digamma(start + 1)
        return ((positive + (true - start) * harmonic) / each).sum(1) / total

    even = summed(true + better, 1 + negative / (positive + 1))
    least = summed(true + false, torch.ones_like(true))
    most = positive * (true + positive) / (true + positive + better).clamp(min=1)
    return even, least, most.sum(1) / total


class Tagging(RandomTask):
    """See `TaggingConfig`."""

    def __init__(self, config: TaggingConfig, classes: int) -> None:
        super().__init__(config.seed)
        self.config, self.classes = config, classes
        self.weights = weight_tensor(config.class_weights, classes)
        self.blend = dict(config.blend or {})

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid samples with a label."""
        return self._known(batch).any(1).sum().float()

    def _known(self, batch: Batch) -> Tensor:
        """Return which entries of the labels count, (B, K) bool."""
        label = batch["label"]
        return valid_rows(batch, len(label), label.device)[:, None] & (label >= 0)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the valid samples of the known classes' mean cross-entropy; in evaluation also counts by score.

        The accuracy of mixed training batches is against the labels whose mixed target is above 0.5.
        """
        known = self._known(batch)
        labels = batch["label"].float().where(known, 0)
        if model.training and self.config.mixup_alpha > 0:
            batch, labels, known = self._mix(batch, labels, known)
        share = known / known.sum(1, keepdim=True).clamp(min=1)
        logits = clip_logits(model, batch, mean_sigmoid)
        sums: dict[str, Tensor] = {}
        if self.blend:
            loss_sum, sums, logits = self._blended(network(model).head_names, logits, labels, share)
        else:
            loss_sum = self._cross_entropy(logits, labels, share)
        sums["loss"] = loss_sum.detach()
        with torch.no_grad():
            sums["correct"] = (((logits > 0) == (labels > 0.5)) * share).sum()
            if not model.training:
                sums |= self._histograms(logits, labels, known)
        return LossOutput(loss_sum, sums)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        """Return the sum over the samples of the mean over the classes; `share` (B, K) has what each of them counts."""
        weight = None if self.weights is None else self.weights.to(logits.device)
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none", pos_weight=weight)
        return (each * share).sum()

    def _blended(
        self, names: Sequence[str], logits: Tensor, labels: Tensor, share: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the weighted loss of logits (B, H, K), the losses of the H classifiers, and the last one's logits."""
        losses = [self._cross_entropy(one, labels, share) for one in logits.unbind(1)]
        weighted = [self.blend.get(name, 0.0) * loss for name, loss in zip(names, losses, strict=True)]
        sums = {f"{HEAD_LOSS}{name}": loss.detach() for name, loss in zip(names, losses, strict=True)}
        return torch.stack(weighted).sum(), sums, logits[:, -1]

    def _mix(self, batch: Batch, labels: Tensor, known: Tensor) -> tuple[Batch, Tensor, Tensor]:
        """Mix sound, video and labels of each pair; classes that only one of the two knows do not count.

        A pair without a class that both know, such as one with a padding row or an unlabelled sample, is not mixed.
        """
        if "audio" not in batch:
            raise UserError("task.mixup_alpha: got MixUp of tags without sound; wanted the batch key 'audio'")
        partner = partners(len(labels), labels.device)
        both = known & known[partner]
        mixed = both.any(1)
        share = pair_shares(self.config.mixup_alpha, self.seed, self.step, batch["sample_id"]).to(labels.device)
        share = share.where(mixed, 1)
        labels = torch.lerp(labels[partner], labels, share[:, None])
        known = both.where(mixed[:, None], known)
        batch = dict(batch)
        if self.config.mixup_on == "spectrogram":
            batch |= {"mix_partner": partner, "mix_share": share}
        for key in ("audio", "video") if self.config.mixup_on == "waveform" else ("video",):
            if key in batch:
                batch[key] = mixed_pairs(batch[key], partner, share)
        return batch, labels, known

    def _histograms(self, logits: Tensor, labels: Tensor, known: Tensor) -> dict[str, Tensor]:
        """Count known positives and negatives (K, bins) by class and score bin, best scores first."""
        bins = self.config.bins
        index = ((SPAN - logits) / (2 * SPAN) * bins).nan_to_num().clamp(0, bins - 1).long()
        index = index + torch.arange(self.classes, device=logits.device) * bins
        positive = labels > 0.5
        return {
            name: torch.bincount(index[chosen], minlength=self.classes * bins).view(self.classes, bins).double()
            for name, chosen in (("positive", known & positive), ("negative", known & ~positive))
        }

    def summarise(self, sums: Mapping[str, Any], count: float) -> dict[str, float]:
        """Return loss, accuracy of single labels, `loss_NAME` of several classifiers, and in evaluation
        mean_average_precision.

        The latter is of the classes that have a positive, from score bins; scikit-learn's value of the exact scores is
        within mean_average_precision_error of it.
        """
        count = max(count, 1.0)
        metrics = {"loss": sums["loss"] / count, "label_accuracy": sums["correct"] / count}
        metrics |= {name: value / count for name, value in sums.items() if name.startswith(HEAD_LOSS)}
        if "positive" in sums:
            found = binned_precision(sums["positive"], sums["negative"])
            value, low, high = (float(each.nanmean().nan_to_num()) for each in found)
            metrics["mean_average_precision"] = value
            metrics["mean_average_precision_error"] = max(high - value, value - low)
        return metrics

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `probability` (B, K), and `prediction` (B, K) bool at 0.5."""
        probability = self.finish(clip_logits(model, batch, mean_sigmoid)).sigmoid()
        return {"prediction": probability > 0.5, "probability": probability}

    def finish(self, output: Tensor) -> Tensor:
        """Return the logits (B, K) of an exported model: of several classifiers those of the last, the joint one."""
        return output[:, -1] if output.ndim == 3 else output
