"""The audio ResNet of G-blend (Perceiver Table 3; Wang et al., arXiv 1905.12681, and its code).

Its 2-D bottleneck stages all have stride 2, behind a first convolution and simple blocks; the maximum over the rest of
frames and bins is classified. The source's input is 100 frames of 40 mel bins: 4 x 2 places are left.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from perceiver.baselines._grid import BaselineConfig
from perceiver.baselines._residual import Residual, ResidualNetwork, bottleneck, initialise, simple
from perceiver.config import Layers, Size, UserError
from perceiver.model import Raw, need_classes


class AudioResNetConfig(BaselineConfig):
    """Inputs of kind mel, layout grid, positions none; 101 layers by default, 50 with depths 3, 4, 6, 3."""

    kind: Literal["audio_resnet"] = "audio_resnet"
    stem: Size = Field(default=16, description="Channels of the first convolution.")
    simple: Size = Field(default=32, description="Channels of the simple blocks, of which the first has stride 2.")
    simple_blocks: Layers = Field(default=3, description="Number of simple blocks.")
    depths: tuple[Layers, ...] = Field(default=(3, 4, 23, 3), min_length=1, description="Bottlenecks of each stage.")
    widths: tuple[Size, ...] = Field(
        default=(256, 512, 1024, 2048), min_length=1, description="Channels of each stage."
    )

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return AudioResNet(self, need_classes(classes))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class AudioResNet(ResidualNetwork):
    """See `AudioResNetConfig`."""

    def __init__(self, config: AudioResNetConfig, classes: int) -> None:
        super().__init__(config)
        if len(self.grid) != 2 or len(config.depths) != len(config.widths):
            raise UserError(
                f"model: got inputs of grid {self.grid}, {len(config.depths)} depths and {len(config.widths)} widths; "
                "wanted inputs of kind mel with layout grid, and a depth for each width"
            )
        make = (_convolution, nn.BatchNorm2d)
        self.stem = nn.Sequential(
            _convolution(self.channels, config.stem, 3, 1), nn.BatchNorm2d(config.stem), nn.ReLU()
        )
        blocks: list[Residual] = []
        width = config.stem
        for number in range(config.simple_blocks):
            blocks.append(simple(width, config.simple, 1 if number else 2, *make))
            width = config.simple
        for depth, outputs in zip(config.depths, config.widths, strict=True):
            for number in range(depth):
                blocks.append(bottleneck(width, outputs, 1 if number else 2, *make))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        initialise(self)
        self.head = nn.Linear(width, classes)

    def features(self, raw: Raw) -> Tensor:
        """Return what is classified (B, C)."""
        x = self.stem(self.image(raw))
        for block in self.blocks:
            x = block(x)
        return x.amax((2, 3))
