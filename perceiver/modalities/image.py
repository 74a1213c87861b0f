"""Images: pixels (B, C, H, W) -> inputs, by raw pixels, patches or a convolution, with Fourier or learned positions.

Sources: Perceiver §4.1 and App. B (raw pixels, learned positions); Perceiver IO App. A (conv and 1x1 front ends).
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.attention import haiku_default
from perceiver.config import Config, Seed, Size, UserError
from perceiver.modalities._positions import Positions
from perceiver.modalities._statistics import Deviations, Means, numbers
from perceiver.positions import FourierConfig, Inputs, PositionConfig


class ImageConfig(Config):
    """Images under the batch key `image`: uint8 is normalised on the device, floats are taken as normalised."""

    kind: Literal["image"] = "image"
    channels: Size = Field(default=3, description="Channels of the image.")
    size: tuple[Size, Size] = Field(default=(224, 224), description="Height and width that the model is built for.")
    resize: bool = Field(default=False, description="Resize images to `size` on the device.")
    mean: Means = Field(
        default=(0.485, 0.456, 0.406), description="Mean per channel, of pixels in [0, 1]; data: as measured."
    )
    std: Deviations = Field(
        default=(0.229, 0.224, 0.225), description="Deviation per channel, of pixels in [0, 1]; data: as measured."
    )
    front_end: Literal["none", "patch", "conv", "1x1"] = Field(
        default="none",
        description="Before the positions: raw pixels, patches, 7x7 stride 2 conv with max-pool, or 1x1 conv.",
    )
    patch: Size = Field(default=1, description="Side of a patch (front_end: patch).")
    front_end_channels: Size | None = Field(
        default=None, description="Channels after the front end: patch raw by default, conv 64, 1x1 256."
    )
    conv_padding: Literal["same", "symmetric"] = Field(
        default="same", description="TensorFlow's padding (56 of 224), or the transformers library's (55 of 224)."
    )
    positions: PositionConfig = Field(default=FourierConfig(), discriminator="kind", description="Positions.")
    permute: Seed | None = Field(
        default=None,
        description="Seed of one fixed permutation of the inputs, applied after the positions (Perceiver §4.1).",
    )

    def build(self) -> nn.Module:
        """Build the module."""
        return Image(self)


class ConvFrontEnd(nn.Module):
    """7x7 stride 2 convolution without bias, batch norm, ReLU, 3x3 stride 2 max-pool: a quarter of the side is left.

    Padding is TensorFlow's SAME (Perceiver IO App. A; the released Conv2DDownsample) or `symmetric`, 3 pixels around
    the image and none in the pool, as in the transformers library, which leaves one row and column less.
    """

    def __init__(self, channels: int, outputs: int, padding: Literal["same", "symmetric"]) -> None:
        super().__init__()
        self.padding = padding
        self.conv = haiku_default(nn.Conv2d(channels, outputs, 7, stride=2, bias=False))
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H/4, W/4)."""
        same = self.padding == "same"
        x = _pad_same(x, 7, 2) if same else nn.functional.pad(x, (3, 3, 3, 3))
        # Channels last: on CPUs half the time, most of it in the pool.
        x = self.norm(self.conv(x.contiguous(memory_format=torch.channels_last)))
        # SAME: an odd side is padded at both ends, an even one at the last, where the ceiling mode does it.
        odd = [side % 2 for side in x.shape[2:]] if same else 0
        return nn.functional.max_pool2d(x, 3, stride=2, padding=odd, ceil_mode=same).relu()


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros so that a window of `kernel` at `stride` gives ceil(side / stride) positions."""
    pads = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
    (top, left) = (p // 2 for p in pads)
    return nn.functional.pad(x, (left, pads[1] - left, top, pads[0] - top))


class Image(nn.Module):
    """Turns images into inputs.

    Attributes: `keys`, `channels` (C of an input), `elements` (M at the configured size), `grid` (its shape).
    """

    keys = ("image",)

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.mean, self.std = (numbers(key, getattr(config, key), config.channels) for key in ("mean", "std"))
        (height, width), c = config.size, config.channels
        self.grid = (_elements(height, config), _elements(width, config))
        self.front_end, data = _front_end(config, c)
        self.positions = Positions(config.positions, self.grid)
        self.channels = data + self.positions.channels
        self.elements = self.grid[0] * self.grid[1]

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map pixels (B, C, H, W), uint8 or float, to inputs."""
        x = normalise_pixels(raw["image"], self.mean, self.std, dtype)
        if self.config.resize and x.shape[2:] != self.config.size:
            x = nn.functional.interpolate(x, self.config.size, mode="area")
        if self.config.front_end == "patch":
            x = nn.functional.pixel_unshuffle(x, self.config.patch)
        if self.front_end is not None:
            x = self.front_end(x.to(next(self.front_end.parameters()).dtype)).to(dtype)
        grid = (x.shape[2], x.shape[3])
        return self.positions(x.flatten(2).transpose(1, 2), grid, order=self._order(grid, x.device))

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        c = self.config
        return {"image": torch.zeros(batch, c.channels, *c.size, dtype=torch.uint8, device=device)}

    def _order(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if self.config.permute is None:
            return None
        generator = torch.Generator().manual_seed(self.config.permute)
        return torch.randperm(grid[0] * grid[1], generator=generator).to(device)


def _elements(side: int, config: ImageConfig) -> int:
    """Grid points along a side of the image."""
    if config.front_end == "conv" and config.conv_padding == "symmetric":
        return ((side - 1) // 2 + 1 - 3) // 2 + 1
    step = {"none": 1, "patch": config.patch, "conv": 4, "1x1": 1}[config.front_end]
    return -(-side // step)


def _check(config: ImageConfig) -> None:
    if config.front_end == "patch" and any(side % config.patch for side in config.size):
        raise UserError(f"inputs.patch: got {config.patch} for size {config.size}; wanted a divisor of both sides")
    if config.permute is not None and config.front_end == "conv":
        raise UserError("inputs.permute: got a permutation with a conv front end; wanted raw pixels: front_end none")


def _front_end(config: ImageConfig, channels: int) -> tuple[nn.Module | None, int]:
    """Return the front end's module, if it has parameters, and the data channels after it."""
    if config.front_end == "conv":
        outputs = config.front_end_channels or 64
        return ConvFrontEnd(channels, outputs, config.conv_padding), outputs
    if config.front_end == "1x1":
        outputs = config.front_end_channels or 256
        return haiku_default(nn.Conv2d(channels, outputs, 1)), outputs
    data = channels * config.patch**2 if config.front_end == "patch" else channels
    if config.front_end == "patch" and config.front_end_channels:
        return haiku_default(nn.Conv2d(data, config.front_end_channels, 1)), config.front_end_channels
    return None, data


def normalise_pixels(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Map uint8 pixels (B, ..., C, H, W) to (x/255 - mean)/std; floats only change their type."""
    if x.is_floating_point():
        return x.to(dtype)
    # While torch.export traces, a cached tensor would be one without data.
    scale = _pixel_scale.__wrapped__ if torch.compiler.is_compiling() else _pixel_scale
    gain, shift = scale(tuple(mean), tuple(std), dtype, x.device)
    return torch.addcmul(shift, x.to(dtype), gain)


@lru_cache(maxsize=32)
def _pixel_scale(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what uint8 pixels are multiplied by, and what is then added, (C, 1, 1); copied to a device once."""
    gain = torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=device)
    return gain[:, None, None], shift[:, None, None]
