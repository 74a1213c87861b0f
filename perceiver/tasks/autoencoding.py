"""Multimodal autoencoding: video, audio and label from one set of latents, with subsampled queries in training.

Source: Perceiver IO §4.3 and App. I: L1 on video (weight 0.03) and audio (1), cross-entropy on the label (1e-4); 512
audio patches and 512 pixels of each example are decoded in training.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, NonNegative, Seed, Size
from perceiver.modalities.audio import normalise_audio
from perceiver.tasks._base import Batch, LossOutput, RandomTask, Task, labelled_rows, model_inputs, valid_rows

Signal = Literal["video", "audio"]
_SIGNALS: tuple[Signal, ...] = ("video", "audio")


class AutoencodingConfig(Config):
    """Reconstructs the batch keys `video` (B, F, C, H, W), `audio` (B, T) and predicts `label` (B,), as weighted.

    A sample with a negative label has none: its signals count, its label does not.
    """

    kind: Literal["autoencoding"] = "autoencoding"
    weights: dict[Literal["video", "audio", "label"], NonNegative] = Field(
        default={"video": 0.03, "audio": 1.0, "label": 1e-4}, description="Loss weight by modality; 0 or none is off."
    )
    video_range: Literal["unit", "signed"] = Field(
        default="unit", description="Pixels are reconstructed in [0, 1] (unit, as the released model does) or [-1, 1]."
    )
    audio_patch: Size = Field(default=16, description="Samples in one audio output.")
    queries: dict[Literal["video", "audio"], Size] = Field(
        default={"video": 512, "audio": 512}, description="Elements decoded per sample in training."
    )
    evaluation_queries: dict[Literal["video", "audio"], Size] = Field(
        default={"video": 8192, "audio": 1920}, description="Elements decoded per sample in evaluation."
    )
    seed: Seed = Field(default=0, description="Seed of the subsampling.")

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return Autoencoding(self)


class Autoencoding(RandomTask):
    """See `AutoencodingConfig`; losses are means over a sample's decoded numbers, summed over the valid samples."""

    def __init__(self, config: AutoencodingConfig) -> None:
        super().__init__(config.seed)
        self.config = config
        self.grids: list[Signal] = [name for name in _SIGNALS if config.weights.get(name)]
        self.label = bool(config.weights.get("label"))

    def count(self, batch: Batch) -> Tensor:
        """Return the number of valid samples."""
        return self._valid(batch).sum().float()

    def _valid(self, batch: Batch) -> Tensor:
        if not self.grids:
            return labelled_rows(batch)
        first = batch[self.grids[0]]
        return valid_rows(batch, len(first), first.device)

    def targets(self, batch: Batch, name: str) -> Tensor:
        """Return what is reconstructed, (B, elements, values): pixels in `video_range`, or patches of samples."""
        x = batch[name]
        if name == "audio":
            return normalise_audio(x, torch.float32).unflatten(1, (-1, self.config.audio_patch))
        if x.is_floating_point():
            x = x.float()
        else:
            x = x.float() / 255 if self.config.video_range == "unit" else x.float() / 127.5 - 1
        return x.transpose(2, 3).transpose(3, 4).flatten(1, 3)

    def asked(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        """Draw the elements to decode for each sample, without repetition: {name: (B, q) int64}."""
        generator = self.generator(batch)
        sizes = self.config.queries if training else self.config.evaluation_queries
        result = {}
        for name in self.grids:
            x = batch[name]
            elements = x.shape[1] // self.config.audio_patch if name == "audio" else x[0, :, 0].numel()
            count = min(elements, sizes.get(name, elements))
            draws = [torch.randperm(elements, generator=generator)[:count] for _ in range(len(x))]
            result[name] = torch.stack(draws).to(x.device)
        return result

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the weighted losses over the valid samples; sums squared errors for the PSNR."""
        valid = self._valid(batch)
        asked = self.asked(batch, training=model.training)
        outputs = model(model_inputs(model, batch), asked)
        losses, sums = [], {}
        for name in self.grids:
            index = asked[name][..., None]
            target = self.targets(batch, name)
            target = target.gather(1, index.expand(-1, -1, target.shape[2]))
            error = outputs[name].float() - target
            losses.append(self.config.weights[name] * (error.abs().mean((1, 2)) * valid).sum())
            sums[f"square/{name}"] = (error.detach().square().mean((1, 2)) * valid).sum()
        if self.label:
            known = labelled_rows(batch)
            label = batch["label"].where(known, torch.zeros_like(batch["label"]))
            scores = outputs["label"].float()
            each = nn.functional.cross_entropy(scores, label, reduction="none")
            losses.append(self.config.weights["label"] * (each * known).sum())
            sums["correct"] = ((scores.argmax(1) == label) & known).sum().float()
            sums["labels"] = known.sum().float()
        loss_sum = torch.stack(losses).sum()
        return LossOutput(loss_sum, {"loss": loss_sum.detach(), **sums})

    def psnr(self, name: str, square: float) -> float:
        """Return the PSNR in dB of a signal's mean square error.

        It refers to the range of the values: 2 of samples in [-1, 1], of pixels that of `video_range`.
        """
        span = 1 if name == "video" and self.config.video_range == "unit" else 2
        return 10 * math.log10(span**2 / max(square, 1e-12))

    def summarise(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """Return loss, PSNR in dB of each signal and the label's accuracy."""
        count = max(count, 1.0)
        metrics = {"loss": sums["loss"] / count}
        for name in self.grids:
            metrics[f"psnr_{name}"] = self.psnr(name, sums[f"square/{name}"] / count)
        if self.label:
            metrics["accuracy"] = sums["correct"] / max(sums["labels"], 1.0)
        return metrics

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the whole reconstructions `video` and `audio` (B, elements, values), decoded piece by piece, and the
        label's `prediction` and `probability`."""
        inputs, pieces = model_inputs(model, batch), 8192
        result: dict[str, Tensor] = {}
        for name in self.grids:
            elements = self.targets(batch, name).shape[1]
            parts = []
            for start in range(0, elements, pieces):
                index = torch.arange(start, min(elements, start + pieces), device=batch[name].device)
                others = {other: index[:1] * 0 for other in self.grids if other != name}
                outputs = model(inputs, {name: index, **others})
                parts.append(outputs[name].float())
                if self.label and "probability" not in result:
                    result["probability"] = outputs["label"].float().softmax(1)
                    result["prediction"] = result["probability"].argmax(1)
            result[name] = torch.cat(parts, dim=1)
        return result
