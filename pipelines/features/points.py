"""Point clouds."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms.points import decode_points, evaluation_view, training_view


class PointsFeature(BaseFeature):
    """The points of one object per sample, stored as little-endian float32 x, y, z; float32 (M, 3) in a batch."""

    arrow: ClassVar[pa.DataType] = pa.binary()
    kind: Literal["points"] = "points"

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (M, 3) float32, M = data.points.count."""
        return {name: ((view.points.count, 3), np.float32)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return all stored points, (n, 3)."""
        return decode_points(stored or b"")

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Choose and normalise points."""
        return {name: training_view(decoded, view.points, rng()) if training else evaluation_view(decoded, view.points)}
