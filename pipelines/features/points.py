"""Point clouds."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms.points import decode_points, evaluation_view, training_view


class PointsFeature(BaseFeature):
    """The points of one object per sample, stored as little-endian float32 x, y, z and features.

    float32 (M, 3 + features) in a batch.
    """

    arrow: ClassVar[pa.DataType] = pa.binary()
    kind: Literal["points"] = "points"
    features: int = Field(default=0, ge=0, le=1000, description="columns of a point after x, y, z, such as normals")

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (M, 3 + features) float32, M = data.points.count."""
        return {name: ((view.points.count, 3 + self.features), np.float32)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return all stored points, (n, 3 + features)."""
        return decode_points(stored or b"", 3 + self.features)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Choose and normalise points."""
        return {name: training_view(decoded, view.points, rng()) if training else evaluation_view(decoded, view.points)}
