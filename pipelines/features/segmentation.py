"""Images with a class for each pixel."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import UserError
from pipelines.features.base import BaseFeature, Channels, PixelSize, RngFactory, Shapes, ViewConfig
from pipelines.transforms.decode import MAX_PIXELS
from pipelines.transforms.image import some_pixels
from pipelines.transforms.mask import IGNORED, evaluation_view, training_view, unpack


class SegmentationFeature(BaseFeature):
    """An image and a mask per sample, stored as their files in one uncompressed archive.

    In a batch, whatever the feature's name: `image` uint8 (C, H, W) and `mask` uint8 (H, W), a class of the data set
    for each pixel; 255 does not count.
    """

    arrow: ClassVar[pa.DataType] = pa.binary()
    kind: Literal["segmentation"] = "segmentation"
    channels: Channels = Field(default=3, description="channels after decoding: 1 (grey) or 3 (RGB)")
    size: PixelSize | None = Field(default=None, description="(height, width) of all images; null if they differ")

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return the image (C, H, W) uint8 and the mask (H, W) uint8."""
        size = view.image_size or self.size
        if size is None:
            raise UserError(
                f"the images of feature '{name}' differ in size: set data.image_size, for example [224, 224]"
            )
        if view.augment.rand_augment:
            raise UserError("data.augment.rand_augment moves pixels without their masks: remove it")
        return {"image": ((self.channels, *size), np.uint8), "mask": (size, np.uint8)}

    def decoded_bytes(self) -> int:
        """Return the size of pixels and mask, if all images have the same size."""
        return (self.channels + 1) * math.prod(self.size) if self.size else 0

    def normalised(self, name: str) -> dict[str, int]:
        """Return the channels of the image."""
        return {"image": self.channels}

    def values(self, name: str, stored: Any) -> Mapping[str, NDArray[np.floating]]:
        """Return pixels of the image in [0, 1], of a large one some of them."""
        return {"image": some_pixels(unpack(stored or b"", self.channels, MAX_PIXELS, IGNORED).picture)}

    def imports(self, view: ViewConfig) -> tuple[str, ...]:
        """Return torch if images are resized."""
        return ("torch",) if view.augment.crop or (view.image_size or self.size) != self.size else ()

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Decode to a `Masked`."""
        return unpack(stored or b"", self.channels, view.max_pixels, classes)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return image and mask under the same view."""
        size = view.image_size or self.size
        assert size is not None, "shapes() is called first"
        if training:
            found = training_view(decoded, size, view.augment, rng, stretch=view.stretch)
        else:
            found = evaluation_view(decoded, size, view.eval_crop, stretch=view.stretch)
        return dict(zip(("image", "mask"), found, strict=True))
