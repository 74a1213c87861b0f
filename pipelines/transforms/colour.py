"""Random colours of video clips: DMVR's `color_default_augm`, as in the Perceiver's video pipeline (paper, 4.2)."""

from typing import TYPE_CHECKING

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
    return x.round_().clamp_(0, 255).to(torch.uint8).numpy()


def _value_and_chroma(x: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Return HSV's value and chroma: the largest channel, and its distance from the smallest."""
    red, green, blue = x
    value = red.maximum(green).maximum(blue)
    return value, value - red.minimum(green).minimum(blue)


def _saturated(x: "Tensor", factor: float) -> "Tensor":
    """Multiply HSV's saturation, chroma / value, by a factor, up to 1."""
    value, chroma = _value_and_chroma(x)
    wanted = (chroma * factor).minimum(value).clamp_(min=0)
    return value - (value - x) * (wanted / chroma.clamp_(min=TINY))


def _turned(x: "Tensor", turn: float) -> "Tensor":
    """Turn HSV's hue.

    A channel is below the value by the chroma times a trapezoid of the hue in sixths of the circle: 0 over two of them,
    1 over two, and one for each slope.
    """
    red, green, blue = x
    value, chroma = _value_and_chroma(x)
    scale = chroma.clamp(min=TINY).reciprocal_()
    hue = ((blue - red) * scale + 2).where(value == green, (red - green) * scale + 4)
    hue = ((green - blue) * scale).where(value == red, hue)
    out = x.new_empty(x.shape)
    for channel, start in enumerate((5, 3, 1)):
        place = hue + (start + 6 * turn)
        place -= 6 * (place / 6).floor_()
        out[channel] = value - chroma * place.minimum(4 - place).clamp_(0, 1)
    return out
