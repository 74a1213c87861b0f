"""Embeddings of the segments of a recording: bytes (B, T, D) -> one input per segment, with positions.

Source: AudioSet's released features, 10 segments of 0.96 s with 128 values of VGGish each, whitened, clipped to
[-2, 2] and stored as bytes. Other networks' embeddings of any size are read alike.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Size, UserError
from perceiver.modalities._positions import Positions
from perceiver.positions import Inputs, NoPositionConfig, PositionConfig


class EmbeddingsConfig(Config):
    """Bytes under the batch key `embeddings`, and `embeddings_mask`, True where there is a segment (all, if absent)."""

    kind: Literal["embeddings"] = "embeddings"
    segments: Size = Field(default=10, description="Segments of a recording.")
    channels: Size = Field(default=128, description="Values of a segment.")
    dequantise: Literal["unit", "vggish"] = Field(
        default="unit",
        description="What byte b stands for: (b - 128) / 128 (Kong et al.), or 4 b / 255 - 2, as VGGish quantised it.",
    )
    positions: PositionConfig = Field(default=NoPositionConfig(), discriminator="kind", description="Positions.")

    def build(self) -> nn.Module:
        """Build the module."""
        return Embeddings(self)


class Embeddings(nn.Module):
    """Turns bytes into one input per segment: [values | position]."""

    keys = ("embeddings",)
    optional_keys = ("embeddings_mask",)

    def __init__(self, config: EmbeddingsConfig) -> None:
        super().__init__()
        self.config = config
        self.elements, self.grid = config.segments, (config.segments,)
        self.positions = Positions(config.positions, self.grid)
        self.channels = config.channels + self.positions.channels

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        size = (batch, self.config.segments, self.config.channels)
        return {"embeddings": torch.zeros(size, dtype=torch.uint8, device=device)}

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map bytes (B, T, D) and the mask (B, T) to inputs; floats are taken as dequantised."""
        x, mask = raw["embeddings"], raw.get("embeddings_mask")
        if x.shape[2] != self.config.channels:
            wanted = self.config.channels
            raise UserError(f"embeddings: got {x.shape[2]} values; wanted {wanted}: set model.inputs.channels")
        if x.is_floating_point():
            x = x.to(dtype)
        elif self.config.dequantise == "unit":
            x = (x.to(dtype) - 128) / 128
        else:
            x = x.to(dtype) * (4 / 255) - 2
        if mask is not None:
            x = x * mask[..., None]
        inputs = self.positions(x, (x.shape[1],))
        return Inputs(inputs.data, inputs.grid, mask)
