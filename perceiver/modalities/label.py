"""A class label as an input, for multimodal autoencoding (Perceiver IO §4.3): ids (B,) -> one one-hot element."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Size
from perceiver.positions import Inputs


class LabelConfig(Config):
    """A class id under the batch key `label`; where the batch has none, or the id is negative, zeros."""

    kind: Literal["label"] = "label"
    classes: Size = Field(default=700, description="Number of classes.")

    def build(self) -> nn.Module:
        """Build the module."""
        return Label(self)


class Label(nn.Module):
    """Turns an id (B,), or a vector over the classes (B, K), into one input of K channels."""

    keys = ("label",)

    def __init__(self, config: LabelConfig) -> None:
        super().__init__()
        self.config = config
        self.elements, self.channels = 1, config.classes

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        return {"label": torch.zeros(batch, dtype=torch.int64, device=device)}

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map the label to (B, 1, K)."""
        label = raw["label"]
        if label.dim() == 1:
            one_hot = nn.functional.one_hot(label.clamp(min=0), self.config.classes)
            label = one_hot * (label >= 0)[:, None]
        return Inputs(label.to(dtype)[:, None])
