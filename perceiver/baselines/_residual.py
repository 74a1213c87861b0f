"""What the networks of G-blend share, on images or on videos: which convolutions is up to the caller."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from perceiver.baselines._grid import Baseline
from perceiver.model import Raw, numbered

Convolution = Callable[[int, int, int, int], nn.Module]
"""Makes a convolution without a bias from inputs, outputs, kernel size and stride, padded to keep the size."""
Norm = Callable[[int], nn.Module]
RATIO = 4
"""Outputs of a bottleneck over its inner channels."""


class Residual(nn.Module):
    """Adds the output of some layers to the input, which a convolution of size 1 maps if its shape is another; ReLU."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum after ReLU."""
        return (self.body(x) + self.shortcut(x)).relu()


def bottleneck(inputs: int, outputs: int, stride: int, conv: Convolution, norm: Norm) -> Residual:
    """Return a block of convolutions of size 1, 3, 1; the middle one has the stride and a quarter of the channels."""
    inner = max(1, outputs // RATIO)
    body = nn.Sequential(
        conv(inputs, inner, 1, 1), norm(inner), nn.ReLU(),
        conv(inner, inner, 3, stride), norm(inner), nn.ReLU(),
        conv(inner, outputs, 1, 1), norm(outputs),
    )  # fmt: skip
    return Residual(body, _shortcut(inputs, outputs, stride, conv, norm))


def simple(inputs: int, outputs: int, stride: int, conv: Convolution, norm: Norm) -> Residual:
    """Return a block of two convolutions of size 3, the first with the stride."""
    body = nn.Sequential(
        conv(inputs, outputs, 3, stride), norm(outputs), nn.ReLU(), conv(outputs, outputs, 3, 1), norm(outputs)
    )
    return Residual(body, _shortcut(inputs, outputs, stride, conv, norm))


def _shortcut(inputs: int, outputs: int, stride: int, conv: Convolution, norm: Norm) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))


def initialise(module: nn.Module) -> None:
    """Give the convolutions He's normal weights, and the norms the source's eps and momentum."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            norm = cast(nn.BatchNorm3d, layer)
            norm.eps, norm.momentum = 1e-3, 0.1


class ResidualNetwork(Baseline):
    """A network of residual `blocks` with a linear `head`; a subclass makes them, and has `features`."""

    blocks: nn.ModuleList
    head: nn.Linear

    def layer_names(self) -> list[str]:
        """Return the names of the blocks, in order."""
        return numbered("blocks", self.blocks)

    def features(self, raw: Raw) -> Tensor:
        """Return what is classified (B, C)."""
        raise NotImplementedError

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K)."""
        return self.head(self.features(raw))
