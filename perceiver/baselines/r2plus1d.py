"""R(2+1)D, a ResNet on videos whose convolutions over time and space are apart (Tran et al., arXiv 1711.11248).

The source's code for G-blend (Perceiver Table 3; Wang et al., arXiv 1905.12681) trains it on 16 frames of 224 x 224.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from perceiver.baselines._grid import BaselineConfig
from perceiver.baselines._residual import Residual, ResidualNetwork, bottleneck, initialise
from perceiver.config import Layers, Size, UserError
from perceiver.model import Raw, need_classes


class R2Plus1DConfig(BaselineConfig):
    """Inputs of kind video with patch [1, 1, 1] and positions none; 101 layers by default.

    Stages after the first halve time and space. The mean over time and space is classified.
    """

    kind: Literal["r2plus1d"] = "r2plus1d"
    stem: tuple[Size, Size] = Field(
        default=(45, 64), description="Channels of the first convolutions over space, with stride 2, and over time."
    )
    depths: tuple[Layers, ...] = Field(default=(3, 4, 23, 3), min_length=1, description="Bottlenecks of each stage.")
    widths: tuple[Size, ...] = Field(
        default=(256, 512, 1024, 2048), min_length=1, description="Channels of each stage."
    )

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return R2Plus1D(self, need_classes(classes))


def middle(inputs: int, outputs: int) -> int:
    """Return the channels between the parts of a 3x3x3 convolution with which both have as many weights as it."""
    return 27 * inputs * outputs // (9 * inputs + 3 * outputs)


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
    if size == 1:
        return nn.Conv3d(inputs, outputs, 1, stride, bias=False)
    between = max(1, middle(inputs, outputs))
    space = nn.Conv3d(inputs, between, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
    time = nn.Conv3d(between, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
    return nn.Sequential(space, nn.BatchNorm3d(between), nn.ReLU(), time)


class R2Plus1D(ResidualNetwork):
    """See `R2Plus1DConfig`."""

    def __init__(self, config: R2Plus1DConfig, classes: int) -> None:
        super().__init__(config)
        if len(self.grid) != 3 or len(config.depths) != len(config.widths):
            raise UserError(
                f"model: got inputs of grid {self.grid}, {len(config.depths)} depths and {len(config.widths)} widths; "
                "wanted inputs of kind video with patch [1, 1, 1], and a depth for each width"
            )
        first, width = config.stem
        self.stem = nn.Sequential(
            nn.Conv3d(self.channels, first, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            nn.BatchNorm3d(first),
            nn.ReLU(),
            nn.Conv3d(first, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
        )
        blocks: list[Residual] = []
        for stage, (depth, outputs) in enumerate(zip(config.depths, config.widths, strict=True)):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                blocks.append(bottleneck(width, outputs, stride, _convolution, nn.BatchNorm3d))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        initialise(self)
        self.head = nn.Linear(width, classes)

    def features(self, raw: Raw) -> Tensor:
        """Return what is classified (B, C)."""
        x, _ = self.tokens(raw)
        x = self.stem(x.transpose(1, 2).unflatten(2, self.grid))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3, 4))
