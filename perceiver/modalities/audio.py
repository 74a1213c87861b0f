"""Raw audio: samples (B, T) -> patches of samples with 1-D positions.

Sources: Perceiver §4.2 (48 kHz, 61,440 samples as 480 vectors of 128); Perceiver IO App. I (1,920 vectors of 16).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Size, UserError
from perceiver.modalities._positions import Positions
from perceiver.modalities._statistics import Deviation, Mean, numbers
from perceiver.positions import FourierConfig, Inputs, PositionConfig


class AudioConfig(Config):
    """Mono audio under the batch key `audio`: int16 is scaled and normalised, floats are taken as normalised."""

    kind: Literal["audio"] = "audio"
    samples: Size = Field(default=61_440, description="Length of a clip in samples (1.28 s at 48 kHz).")
    patch: Size = Field(default=128, description="Samples in one input.")
    mean: Mean = Field(default=0.0, description="Subtracted from the samples in [-1, 1); data: as measured.")
    std: Deviation = Field(default=1.0, description="The samples are divided by it, after the mean; data: as measured.")
    positions: PositionConfig = Field(default=FourierConfig(), discriminator="kind", description="Positions in time.")

    def build(self) -> nn.Module:
        """Build the module."""
        return Audio(self)


class Audio(nn.Module):
    """Turns audio into inputs of `patch` samples and their position; an incomplete patch is padded with silence."""

    keys = ("audio",)

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        if config.patch > config.samples:
            raise UserError(f"inputs.patch: got {config.patch} for {config.samples} samples; wanted at most the clip")
        self.config = config
        (self.mean,), (self.std,) = (numbers(key, getattr(config, key)) for key in ("mean", "std"))
        self.elements = -(-config.samples // config.patch)
        self.grid = (self.elements,)
        self.positions = Positions(config.positions, self.grid)
        self.channels = config.patch + self.positions.channels

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        return {"audio": torch.zeros(batch, self.config.samples, dtype=torch.int16, device=device)}

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map samples (B, T), int16 or float, to inputs."""
        x = normalise_audio(raw["audio"], dtype)
        if (self.mean, self.std) != (0.0, 1.0) and not raw["audio"].is_floating_point():
            x = (x - self.mean) / self.std
        x = nn.functional.pad(x, (0, -x.shape[1] % self.config.patch)).unflatten(1, (-1, self.config.patch))
        return self.positions(x, (x.shape[1],))


def normalise_audio(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Map int16 samples to [-1, 1); floats only change their type."""
    return x.to(dtype) if x.is_floating_point() else x.to(dtype) / 32768
