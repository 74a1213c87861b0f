"""Position encodings: Fourier features of grids and of points, learned tables, and the inputs that carry them.

Shape letters: B batch, M inputs, N latents, C input channels, D latent channels, O outputs.
Source: Perceiver (arXiv 2103.03206v2) §3.2; DeepMind's released code for the order of the channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Bands, Config, Scale, Size

LAYER_NORM_EPS = 1e-5


class FourierConfig(Config):
    """Fourier features: for each axis the coordinate in [-1, 1] and sin, cos at linearly spaced frequencies."""

    kind: Literal["fourier"] = "fourier"
    bands: Bands = Field(default=64, description="Frequencies per axis (K).")
    max_resolution: tuple[Scale, ...] | None = Field(
        default=None,
        description="Sampling rate per axis (mu); the highest frequency is mu/2. Default: the grid's size.",
    )

    def channels(self, axes: int) -> int:
        """Return the number of position channels for `axes` coordinates: axes * (2K + 1)."""
        return axes * (2 * self.bands + 1)


class LearnedConfig(Config):
    """A learned vector for each index, concatenated to the data."""

    kind: Literal["learned"] = "learned"
    channels: Size = Field(default=128, description="Width of the learned table.")
    init_std: Scale = Field(default=1.0, description="Scale of the truncated normal it starts from.")
    projection: Size | None = Field(
        default=None, description="Width of a linear layer after the table; none by default."
    )


class NoPositionConfig(Config):
    """No position encoding: the inputs are an unordered set."""

    kind: Literal["none"] = "none"


PositionConfig = FourierConfig | LearnedConfig | NoPositionConfig


def fourier_features(positions: Tensor, bands: int, max_resolution: Sequence[float]) -> Tensor:
    """Encode coordinates as [raw | all sines, axis by axis | all cosines, axis by axis].

    Args:
        positions: (..., d) coordinates in [-1, 1].
        bands: number of frequencies K, linearly spaced from 1 to max_resolution / 2 inclusive.
        max_resolution: d sampling rates.

    Returns:
        (..., d * (2K + 1)) features: x, sin(pi f x), cos(pi f x). Source: Perceiver §3.2.
    """
    frequencies = torch.stack(
        [torch.linspace(1.0, r / 2, bands, dtype=positions.dtype, device=positions.device) for r in max_resolution]
    )
    angles = (math.pi * positions[..., None] * frequencies).flatten(-2)
    return torch.cat([positions, angles.sin(), angles.cos()], dim=-1)


@lru_cache(maxsize=32)
def grid_tables(
    shape: tuple[int, ...], bands: int, max_resolution: tuple[Scale, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the axis tables of a Fourier grid, stacked: (sum(shape), P), P = d(2K+1).

    The row for index i of axis a has the channels of that axis at their positions in the encoding and zero elsewhere,
    so the encoding of a grid point is the sum of one row per axis. Computed in float64, then rounded.
    """
    axes = len(shape)
    rows = []
    for axis, size in enumerate(shape):
        coordinate = torch.zeros(size, axes, dtype=torch.float64)
        coordinate[:, axis] = torch.linspace(-1, 1, size, dtype=torch.float64)
        features = fourier_features(coordinate, bands, max_resolution)
        keep = torch.zeros(features.shape[-1], dtype=torch.bool)
        keep[axis] = True
        for part in range(2):
            start = axes + (part * axes + axis) * bands
            keep[start : start + bands] = True
        rows.append(features * keep)
    return torch.cat(rows).to(dtype=dtype, device=device)


def spread(per_axis: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum values given per axis index over a grid of one axis or more: (..., sum(shape)) -> (..., prod(shape))."""
    views = [[size if other == axis else 1 for other in range(len(shape))] for axis, size in enumerate(shape)]
    parts = [part.unflatten(-1, view) for part, view in zip(per_axis.split(shape, dim=-1), views, strict=True)]
    return reduce(torch.add, parts).flatten(-len(shape))


@dataclass(frozen=True)
class Grid:
    """Fixed Fourier positions of a grid, kept as axis tables: `table` is (sum(shape), P), see `grid_tables`."""

    shape: tuple[int, ...]
    table: Tensor

    @property
    def channels(self) -> int:
        """Number of position channels P."""
        return self.table.shape[1]

    def dense(self) -> Tensor:
        """Return the (M, P) encoding of each grid point, row-major."""
        return spread(self.table.t(), self.shape).t()


@dataclass
class Inputs:
    """The inputs of a cross-attention: M elements of C channels, [data | position].

    Args:
        data: (B, M, C_data) data channels; may be a transposed view of (B, C_data, M).
        grid: fixed positions of a grid of M points, or None if `data` has all channels.
        mask: (B, M) bool, True for an element that exists; None if all do.
        order: (M,) permutation: element i of the set is grid point order[i], its data and its position alike.
            Attention is invariant to it, so only `dense` applies it.
    """

    data: Tensor
    grid: Grid | None = None
    mask: Tensor | None = None
    order: Tensor | None = None

    @property
    def elements(self) -> int:
        """Number of inputs M."""
        return self.data.shape[1]

    @property
    def channels(self) -> int:
        """Number of channels C of an element."""
        return self.data.shape[2] + (self.grid.channels if self.grid else 0)

    @property
    def fixed(self) -> bool:
        """Whether the inputs need no gradient."""
        return not self.data.requires_grad

    @cached_property
    def dense(self) -> Tensor:
        """The whole (B, M, C) array of inputs."""
        if self.grid is None:
            x = self.data
        else:
            positions = self.grid.dense().to(self.data.dtype)
            x = torch.cat([self.data, positions.expand(self.data.shape[0], -1, -1)], dim=-1)
        return x if self.order is None else x[:, self.order]

    @cached_property
    def normalised(self) -> Tensor:
        """The inputs, each element with mean 0 and variance 1: layer normalisation without gain and bias, (B, M, C)."""
        return nn.functional.layer_norm(self.dense, (self.channels,), eps=LAYER_NORM_EPS)

    @cached_property
    def separable_factors(self) -> tuple[Tensor, Tensor]:
        """The factors of `normalised` on a grid: features (B, C_data, M) and scale (B, M), never (B, M, C).

        With mean m and scale r = 1/std of an element: normalised = r (x - m). The features are r * data.
        """
        assert self.grid is not None
        table = self.grid.table.to(self.data.dtype)
        data = self.data.transpose(1, 2)
        sums = spread(torch.stack([table.sum(1), table.square().sum(1)]), self.grid.shape)
        mean = (data.sum(1) + sums[0]) / self.channels
        square = (data.square().sum(1) + sums[1]) / self.channels
        scale = (square - mean.square() + LAYER_NORM_EPS).rsqrt()
        return data * scale[:, None], scale
