"""Two frames for optical flow: 3x3 neighbourhoods of both, stacked, through a linear layer, with 2-D positions.

Source: Perceiver IO §4.2 and App. H: images in [-1, 1], 54 values per pixel -> 64, Fourier 64 bands at (368, 496); the
ablation has the frames apart, and windows of one pixel. The normalisation of each pair is ours, for small data.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.attention import haiku_default, linear
from perceiver.config import Config, Size, UserError
from perceiver.modalities._positions import Positions
from perceiver.positions import FourierConfig, Inputs, PositionConfig


class FlowFramesConfig(Config):
    """Two frames under the batch key `video` (B, 2, C, H, W): uint8 is normalised, floats are taken as normalised."""

    kind: Literal["flow_frames"] = "flow_frames"
    channels: Size = Field(default=3, description="Channels of a frame.")
    size: tuple[Size, Size] = Field(default=(368, 496), description="Height and width.")
    normalise: Literal["range", "pair"] = Field(
        default="range", description="Pixels are mapped to [-1, 1], or to mean 0 and deviation 1 of their own pair."
    )
    frames_apart: bool = Field(
        default=False,
        description="An input for each frame, whose position begins with the frame; not one for both.",
    )
    window: int = Field(default=3, ge=1, le=99, description="Side of the neighbourhood of a pixel; odd.")
    front_end_channels: Size = Field(default=64, description="Width after the linear layer.")
    positions: PositionConfig = Field(default=FourierConfig(), discriminator="kind", description="Positions.")

    def build(self) -> nn.Module:
        """Build the module."""
        return FlowFrames(self)


class FlowFrames(nn.Module):
    """Turns two frames into inputs, one per pixel: [64 of both frames' neighbourhood | position].

    With the frames apart the first frame's inputs come first; a decoder's queries are these.
    """

    keys = ("video",)

    def __init__(self, config: FlowFramesConfig) -> None:
        super().__init__()
        if config.window % 2 == 0:
            raise UserError(f"inputs.window: got {config.window}; wanted an odd side such as 3")
        self.config = config
        self.grid = config.size
        apart = config.frames_apart
        self.elements = (1 + apart) * config.size[0] * config.size[1]
        values = (2 - apart) * config.channels * config.window**2
        self.front_end = haiku_default(linear(values, config.front_end_channels))
        self.positions = Positions(config.positions, (2, *self.grid) if apart else self.grid)
        self.channels = config.front_end_channels + self.positions.channels

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        c = self.config
        return {"video": torch.zeros(batch, 2, c.channels, *c.size, dtype=torch.uint8, device=device)}

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map frames (B, 2, C, H, W) to inputs."""
        frames = raw["video"]
        x = frames.to(dtype) if frames.is_floating_point() else self._normalised(frames).to(dtype)
        grid: tuple[int, ...] = (x.shape[3], x.shape[4])
        if self.config.frames_apart:
            patches = torch.cat([neighbourhoods(frame, self.config.window) for frame in x.split(1, 1)], dim=1)
            grid = (2, *grid)
        else:
            patches = neighbourhoods(x, self.config.window)
        data = self.front_end(patches.to(self.front_end.weight.dtype)).to(dtype)
        return self.positions(data, grid)

    def _normalised(self, frames: Tensor) -> Tensor:
        """Map frames (B, 2, C, H, W) uint8 to float32 as configured; a pair of one grey value becomes zeros."""
        x = frames.float() / 127.5 - 1
        if self.config.normalise == "range":
            return x
        axes = (1, 2, 3, 4)
        mean, std = x.mean(axes, keepdim=True), x.std(axes, keepdim=True, correction=0)
        return (x - mean) / (std + 1 / 127.5)


def neighbourhoods(frames: Tensor, window: int) -> Tensor:
    """Map (B, F, C, H, W) to (B, H*W, F*window*window*C): frame, row, column, channel; zeros beyond the border."""
    b, f, c, h, w = frames.shape
    patches = nn.functional.unfold(frames.flatten(0, 1), window, padding=window // 2)
    patches = patches.view(b, f, c, window * window, h * w)
    return patches.permute(0, 4, 1, 3, 2).reshape(b, h * w, f * window * window * c)
