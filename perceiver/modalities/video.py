"""Video: frames (B, F, C, H, W) -> space-time patches with 3-D positions.

Sources: Perceiver §4.2 (224 x 224, patches of 2 x 8 x 8: 12,544 inputs of 384 for 32 frames); Perceiver IO App. I
(patches of 1 x 4 x 4).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Size, UserError
from perceiver.modalities._positions import Positions
from perceiver.modalities._statistics import Deviations, Means, numbers
from perceiver.modalities.image import normalise_pixels
from perceiver.positions import FourierConfig, Inputs, PositionConfig


class VideoConfig(Config):
    """Video under the batch key `video`: uint8 is normalised on the device, floats are taken as normalised."""

    kind: Literal["video"] = "video"
    frames: Size = Field(default=32, description="Frames of a clip.")
    channels: Size = Field(default=3, description="Channels of a frame.")
    size: tuple[Size, Size] = Field(default=(224, 224), description="Height and width of a frame.")
    patch: tuple[Size, Size, Size] = Field(default=(2, 8, 8), description="Frames, height and width of a patch.")
    mean: Means = Field(default=(0.485, 0.456, 0.406), description="Mean per channel, in [0, 1]; data: as measured.")
    std: Deviations = Field(
        default=(0.229, 0.224, 0.225), description="Deviation per channel, in [0, 1]; data: as measured."
    )
    positions: PositionConfig = Field(default=FourierConfig(), discriminator="kind", description="Positions.")

    def build(self) -> nn.Module:
        """Build the module."""
        return Video(self)


class Video(nn.Module):
    """Turns video into inputs: [patch, its frames, rows, columns, then channels | position]."""

    keys = ("video",)

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        sides = (config.frames, *config.size)
        if any(side % step for side, step in zip(sides, config.patch, strict=True)):
            raise UserError(f"inputs.patch: got {config.patch} for frames and size {sides}; wanted divisors of each")
        self.config = config
        self.mean, self.std = (numbers(key, getattr(config, key), config.channels) for key in ("mean", "std"))
        self.grid = tuple(side // step for side, step in zip(sides, config.patch, strict=True))
        self.elements = self.grid[0] * self.grid[1] * self.grid[2]
        self.positions = Positions(config.positions, self.grid)
        t, h, w = config.patch
        self.channels = t * h * w * config.channels + self.positions.channels

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        c = self.config
        size = (batch, c.frames, c.channels, *c.size)
        return {"video": torch.zeros(size, dtype=torch.uint8, device=device)}

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map frames (B, F, C, H, W), uint8 or float, to inputs."""
        x = normalise_pixels(raw["video"], self.mean, self.std, dtype)
        x, grid = space_time_patches(x, self.config.patch)
        return self.positions(x, grid)


def space_time_patches(x: Tensor, patch: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """Map (B, F, C, H, W) to patches (B, M, t*h*w*C) in row-major order, and the grid's shape."""
    b, f, c, height, width = x.shape
    t, h, w = patch
    grid = (f // t, height // h, width // w)
    if (f % t, height % h, width % w) != (0, 0, 0):
        raise UserError(f"video: got {f} frames of {height} x {width} for patches of {patch}; wanted multiples")
    x = x.reshape(b, grid[0], t, c, grid[1], h, grid[2], w).permute(0, 1, 4, 6, 2, 5, 7, 3)
    return x.reshape(b, grid[0] * grid[1] * grid[2], t * h * w * c), grid
