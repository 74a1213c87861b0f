"""Embeddings of the segments of a recording, as bytes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from perceiver.config import Size
from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms import BadSample


class EmbeddingsFeature(BaseFeature):
    """Up to `segments` vectors of `channels` quantised values per sample, stored as bytes, segment by segment.

    In a batch uint8 (T, D), T = segments, with zeros after the last one, and bool `<name>_mask` (T,), True where there
    is a segment. Bad samples: no segments, more than T, an incomplete one.
    """

    arrow: ClassVar[pa.DataType] = pa.binary()
    kind: Literal["embeddings"] = "embeddings"
    segments: Size = Field(default=10, description="segments of the longest recording")
    channels: Size = Field(default=128, description="values of a segment")

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (T, D) uint8 and (T,) bool."""
        shape = (self.segments, self.channels)
        return {name: (shape, np.uint8), f"{name}_mask": (shape[:1], np.bool_)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the segments that there are, (t, D)."""
        stored = stored or b""
        if not stored or len(stored) % self.channels:
            raise BadSample(f"{len(stored)} bytes are not segments of {self.channels} values")
        found = np.frombuffer(stored, np.uint8).reshape(-1, self.channels)
        if len(found) > self.segments:
            raise BadSample(f"{len(found)} segments, wanted at most {self.segments}")
        return found

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the segments, padded, and the mask."""
        shown = np.zeros((self.segments, self.channels), np.uint8)
        shown[: len(decoded)] = decoded
        return {name: shown, f"{name}_mask": np.arange(self.segments) < len(decoded)}
