"""The positions that a modality attaches to its elements: a Fourier grid, a learned table, or none."""

import math

import torch
from torch import Tensor, nn

from perceiver.attention import haiku_default
from perceiver.config import UserError
from perceiver.model import latent_array
from perceiver.positions import FourierConfig, Grid, Inputs, LearnedConfig, PositionConfig, grid_tables


class Positions(nn.Module):
    """Attaches positions of a grid to data; see the config for the kinds.

    Args:
        config: kind of encoding.
        grid: shape of the grid that the model is built for, one to three axes.
    """

    def __init__(self, config: PositionConfig, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.channels = 0
        if isinstance(config, FourierConfig):
            self.channels = config.channels(len(grid))
            self.max_resolution = tuple(float(r) for r in config.max_resolution or grid)
            if len(self.max_resolution) != len(grid):
                raise UserError(
                    f"positions.max_resolution: got {len(self.max_resolution)} values for a grid of {len(grid)} axes; "
                    "wanted one per axis"
                )
        elif isinstance(config, LearnedConfig):
            self.table = latent_array(math.prod(grid), config.channels, config.init_std)
            width = config.projection
            self.projection = haiku_default(nn.Linear(config.channels, width)) if width else None
            self.channels = config.projection or config.channels

    def forward(self, data: Tensor, grid: tuple[int, ...], order: Tensor | None = None) -> Inputs:
        """Attach positions to data (B, M, C_data) of a grid, which may differ in size from the configured one."""
        if isinstance(self.config, FourierConfig):
            table = grid_tables(grid, self.config.bands, self.max_resolution, data.dtype, data.device)
            return Inputs(data, Grid(grid, table), order=order)
        if isinstance(self.config, LearnedConfig):
            data = torch.cat([data, self.learned(grid).to(data.dtype).expand(data.shape[0], -1, -1)], dim=-1)
        return Inputs(data, order=order)

    def learned(self, grid: tuple[int, ...]) -> Tensor:
        """Return the learned positions (M, channels), interpolated linearly if the grid is not the configured one."""
        table = self.table if grid == self.grid else resize_table(self.table, self.grid, grid)
        return table if self.projection is None else self.projection(table)


def resize_table(table: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Interpolate learned positions (prod(old), C) linearly to another grid, corner on corner: (prod(new), C)."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(new)]
    image = table.t().reshape(1, -1, *old)
    return nn.functional.interpolate(image, new, mode=mode, align_corners=True).flatten(2)[0].t()
