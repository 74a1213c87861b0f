"""Random colours of video clips: DMVR's `color_default_augm`, as in the Perceiver's video pipeline (paper, 4.2)."""

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from perceiver.config import Config, Probability, Range, Real
from pipelines.transforms.resize import Pixels

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-6


class ColourConfig(Config):
    """Random colours, the same for all frames of a clip."""

    probability: Probability = Field(default=0.8, description="chance that a clip's colours are changed")
    brightness: Probability = Field(default=32 / 255, description="largest change, as a share of white")
    saturation: Range = Field(default=(0.6, 1.4), description="factors, uniform")
    contrast: Range = Field(default=(0.6, 1.4), description="factors about each frame's mean, uniform")
    hue: Real = Field(default=0.2, ge=0, le=0.5, description="largest turn of the hue, as a share of the circle")


def recoloured(frame: Pixels, brightness: float, saturation: float, contrast: float, hue: float) -> Pixels:
    """Return a frame (3, H, W) in other colours, in DMVR's order, clipped at the end. Imports torch.

    Args:
        frame: RGB.
        brightness: added, 1 is white.
        saturation: factor in HSV.
        contrast: factor about the mean of each channel.
        hue: turn in HSV, 1 is the whole circle.
    """
    import torch

    x = torch.from_numpy(frame).float()
    if brightness:
        x += 255 * brightness
    if saturation != 1:
        x = _saturated(x, saturation)
    if contrast != 1:
        x = torch.lerp(x.mean((1, 2), keepdim=True), x, contrast)
    if hue:
        x = _turned(x, hue)
    return x.round_().clamp_(0, 255).numpy().astype(np.uint8)  # six times as fast as torch's conversion


def _value_and_chroma(x: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Return HSV's value and chroma: the largest channel, and its distance from the smallest."""
    red, green, blue = x
    value = red.maximum(green).maximum(blue)
    return value, value - red.minimum(green).minimum(blue)


def _saturated(x: "Tensor", factor: float) -> "Tensor":
    """Multiply HSV's saturation, chroma / value, by a factor, up to 1. Changes x."""
    value, chroma = _value_and_chroma(x)
    ratio = (chroma * factor).minimum(value).clamp_(min=0).div_(chroma.clamp_(min=TINY))
    return x.sub_(value).mul_(ratio).add_(value)


def _turned(x: "Tensor", turn: float) -> "Tensor":
    """Turn HSV's hue.

    A channel is below the value by the chroma times a trapezoid of the hue in sixths of the circle: 0 over two of them,
    1 over two, and one for each slope. All is multiplied by the chroma here, which spares the divisions.
    """
    import torch

    red, green, blue = x
    value, chroma = _value_and_chroma(x)
    out, half, mask = torch.empty_like(x), 3 * chroma, torch.empty_like(value)
    # The hue times the chroma, from -1 to 5. lerp by a mask of 0 and 1 takes a fifth of the time of where by booleans.
    hue = (red - green).add_(chroma, alpha=4)
    hue.lerp_((blue - red).add_(chroma, alpha=2), torch.eq(value, green, out=mask))
    hue.lerp_(green - blue, torch.eq(value, red, out=mask))
    for channel, middle in zip(out, (3, 5, 1), strict=True):  # the middle of the trapezoid's 1
        moved = (6 * turn - middle + 5) % 6 - 5  # so that the distance from the middle is at most 6
        channel.copy_(hue).add_(chroma, alpha=moved).abs_().sub_(half).abs_().sub_(chroma).clamp_(min=0)
        channel.copy_(value - channel.minimum(chroma))
    return out
