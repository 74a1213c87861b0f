"""Point clouds: (B, M, 3) coordinates -> their Fourier features.

Source: Perceiver §4.3: 64 bands with the highest frequency 1,120 (10 times the images' 112), coordinates in [-1, 1].
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Bands, Config, Scale, Size, UserError
from perceiver.positions import Inputs, fourier_features


class PointsConfig(Config):
    """Points under the batch key `points` with coordinates in [-1, 1]; further columns are features."""

    kind: Literal["points"] = "points"
    points: Size = Field(default=2048, description="Points per cloud for counting FLOPs; any number can be used.")
    dimensions: int = Field(default=3, ge=1, le=1000, description="Coordinates of a point.")
    features: int = Field(default=0, ge=0, le=1 << 24, description="Further columns of a point, passed on as they are.")
    bands: Bands = Field(default=64, description="Frequencies per coordinate.")
    max_resolution: Scale = Field(default=2240.0, description="Twice the highest frequency.")

    def build(self) -> nn.Module:
        """Build the module."""
        return Points(self)


class Points(nn.Module):
    """Turns points into inputs: [features | coordinates, sines, cosines]."""

    keys = ("points",)

    def __init__(self, config: PointsConfig) -> None:
        super().__init__()
        self.config = config
        self.elements = config.points
        self.channels = config.features + config.dimensions * (2 * config.bands + 1)

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        c = self.config
        return {"points": torch.zeros(batch, c.points, c.dimensions + c.features, device=device)}

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map points (B, M, dimensions + features) to inputs."""
        c, points = self.config, raw["points"].to(dtype)
        if points.shape[2] != c.dimensions + c.features:
            raise UserError(
                f"points: got {points.shape[2]} columns; wanted {c.dimensions} coordinates and {c.features} features: "
                "set model.inputs.features"
            )
        encoded = fourier_features(points[..., : c.dimensions], c.bands, (c.max_resolution,) * c.dimensions)
        return Inputs(torch.cat([points[..., c.dimensions :], encoded], dim=-1))
