"""Pairs of frames with the optical flow between them."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from perceiver.config import UserError
from pipelines.features.base import BaseFeature, Channels, PixelSize, RngFactory, Shapes, ViewConfig
from pipelines.transforms.optical_flow import decode_flow, evaluation_view, training_view


class FlowFeature(BaseFeature):
    """Two frames and a flow per sample, stored as their files in one uncompressed archive.

    In a batch, whatever the feature's name: `video` uint8 (2, C, H, W), `flow` float32 (2, H, W) in pixels, x first,
    and `flow_valid` bool (H, W).
    """

    arrow: ClassVar[pa.DataType] = pa.binary()
    kind: Literal["flow"] = "flow"
    channels: Channels = Field(default=3, description="channels of a frame after decoding: 1 (grey) or 3 (RGB)")
    size: PixelSize | None = Field(default=None, description="(height, width) of all frames; null if they differ")

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return frames (2, C, H, W) uint8, flow (2, H, W) float32 and validity (H, W) bool."""
        size = view.image_size or self.size
        if size is None:
            raise UserError(
                f"the frames of feature '{name}' differ in size: set data.image_size, for example [368, 496]"
            )
        return {
            "video": ((2, self.channels, *size), np.uint8),
            "flow": ((2, *size), np.float32),
            "flow_valid": (size, np.bool_),
        }

    def decoded_bytes(self) -> int:
        """Return the size of frames, flow and validity, if all frames have the same size."""
        return (2 * self.channels + 9) * math.prod(self.size) if self.size else 0

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Decode both frames and the flow to a `Pair`."""
        return decode_flow(stored or b"", self.channels, view.max_pixels)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Crop both frames and the flow to `view.image_size`, in evaluations `flow.eval_size` where that is given."""
        size = view.image_size or self.size
        assert size is not None, "shapes() is called first"
        found = training_view(decoded, size, view.flow, rng()) if training else evaluation_view(decoded, size)
        return dict(zip(("video", "flow", "flow_valid"), found, strict=True))
