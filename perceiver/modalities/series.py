"""Series of numbers: (B, L, C) -> inputs of one step, of several, or of one number, with positions.

Time series are read step by step or in patches of steps, as raw audio in Perceiver §4.2. The row of a table is a series
of one step: with `elements: values` each of its numbers is an input of its own, told apart by its position.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Real, Size, UserError
from perceiver.modalities._positions import Positions
from perceiver.modalities._statistics import FromData, numbers
from perceiver.positions import FourierConfig, Inputs, PositionConfig

_Mean = Annotated[Real, Field(ge=-1e18, le=1e18)]
_Deviation = Annotated[Real, Field(ge=1e-18, le=1e18)]


class SeriesConfig(Config):
    """Numbers under the batch key `series`, and `series_mask`, True where there is a step (all, if not given)."""

    kind: Literal["series"] = "series"
    length: Size = Field(default=128, description="Steps of a series.")
    channels: Size = Field(default=1, description="Numbers of a step; of a table's row, its columns.")
    elements: Literal["steps", "values"] = Field(
        default="steps", description="What an input is: a step or a patch of them, or each number by itself."
    )
    patch: Size = Field(default=1, description="Steps in one input (elements: steps).")
    mean: tuple[_Mean, ...] | FromData = Field(default=(), description="Mean per channel; data: as measured; empty: 0.")
    std: tuple[_Deviation, ...] | FromData = Field(
        default=(), description="Deviation per channel; data: as measured; empty: 1."
    )
    embedding: Size | None = Field(
        default=None, description="Width of a linear layer before the positions; null: the numbers themselves."
    )
    positions: PositionConfig = Field(default=FourierConfig(), discriminator="kind", description="Positions.")

    def build(self) -> nn.Module:
        """Build the module."""
        return Series(self)


class Series(nn.Module):
    """Turns numbers into inputs: [numbers, or their embedding | position]; an incomplete patch is padded with zeros.

    Inputs of `steps` have a 1-D grid of positions, `values` a 2-D one of steps and channels, 1-D of a single step.
    """

    keys = ("series",)
    optional_keys = ("series_mask",)

    def __init__(self, config: SeriesConfig) -> None:
        super().__init__()
        single = config.elements == "values"
        if config.patch > (1 if single else config.length):
            raise UserError(
                f"inputs.patch: got {config.patch} for {config.length} steps and elements {config.elements}; wanted at "
                "most the series, and 1 for values"
            )
        self.config = config
        mean = numbers("mean", config.mean or [0.0] * config.channels, config.channels)
        std = numbers("std", config.std or [1.0] * config.channels, config.channels)
        self.mean, self.std = torch.tensor(mean, device="cpu"), torch.tensor(std, device="cpu")
        self.grid = self._grid(config.length)
        self.elements = self.grid[0] * (self.grid[1] if len(self.grid) == 2 else 1)
        width = 1 if single else config.patch * config.channels
        self.embedding = nn.Linear(width, config.embedding) if config.embedding else None
        self.positions = Positions(config.positions, self.grid)
        self.channels = (config.embedding or width) + self.positions.channels

    def _grid(self, length: int) -> tuple[int, ...]:
        """Return the shape of the positions of a series."""
        if self.config.elements == "steps":
            return (-(-length // self.config.patch),)
        return (length, self.config.channels) if length > 1 else (self.config.channels,)

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        return {"series": torch.zeros(batch, self.config.length, self.config.channels, device=device)}

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map numbers (B, L, C) and the mask (B, L) to inputs."""
        c, x, mask = self.config, raw["series"], raw.get("series_mask")
        if x.shape[2] != c.channels:
            raise UserError(f"series: got {x.shape[2]} channels; wanted {c.channels}: set model.inputs.channels")
        # In float32: large numbers of small deviation would lose their digits in bfloat16.
        x = ((x.float() - self.mean.to(x.device)) / self.std.to(x.device)).to(dtype)
        grid = self._grid(x.shape[1])
        if mask is not None:
            x = x * mask[..., None]
        if c.elements == "values":
            x = x.flatten(1)[..., None]
            mask = None if mask is None else mask.repeat_interleave(c.channels, dim=1)
        else:
            missing = -x.shape[1] % c.patch
            x = nn.functional.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, c.patch)).flatten(2)
            if mask is not None:
                mask = nn.functional.pad(mask, (0, missing)).unflatten(1, (-1, c.patch)).any(2)
        if self.embedding is not None:
            x = self.embedding(x.to(self.embedding.weight.dtype)).to(dtype)
        inputs = self.positions(x, grid)
        return Inputs(inputs.data, inputs.grid, mask)
