"""Encoded images (PNG, JPEG, WebP, ...)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import UserError
from pipelines.features.base import BaseFeature, Channels, PixelSize, RngFactory, Shapes, ViewConfig
from pipelines.transforms.decode import decode_image
from pipelines.transforms.image import Placement, placed_evaluation_view, placed_training_view, some_pixels
from pipelines.transforms.store import StoreConfig, fitted_size, stored_image


class ImageFeature(BaseFeature):
    """One encoded image per sample; uint8 (C, H, W) in a batch."""

    arrow: ClassVar[pa.DataType] = pa.binary()
    stores: ClassVar[tuple[str, ...]] = ("resize", "quality")
    kind: Literal["image"] = "image"
    channels: Channels = Field(description="channels after decoding: 1 (grey) or 3 (RGB)")
    size: PixelSize | None = Field(default=None, description="(height, width) of all images; null if they differ")

    def smaller(self, stored: Any, config: StoreConfig) -> Any:
        """Return a JPEG of the smaller image."""
        return stored_image(stored or b"", self.channels, config)

    def after(self, config: StoreConfig) -> Self:
        """Return the feature with the size of the smaller images."""
        return self.model_copy(update={"size": self.size and fitted_size(*self.size, config.resize)})

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (C, height, width) uint8."""
        size = view.image_size or self.size
        if size is None:
            raise UserError(
                f"the images of feature '{name}' differ in size: set data.image_size, for example [224, 224]"
            )
        return {name: ((self.channels, *size), np.uint8)}

    def decoded_bytes(self) -> int:
        """Return the size of the pixels, if all images have the same size."""
        return self.channels * math.prod(self.size) if self.size else 0

    def normalised(self, name: str) -> dict[str, int]:
        """Return the channels."""
        return {name: self.channels}

    def values(self, name: str, stored: Any) -> Mapping[str, NDArray[np.floating]]:
        """Return pixels in [0, 1], of a large image some of them."""
        return {name: some_pixels(decode_image(stored or b"", self.channels))}

    def imports(self, view: ViewConfig) -> tuple[str, ...]:
        """Return torch if images are resized."""
        return ("torch",) if view.augment.crop or (view.image_size or self.size) != self.size else ()

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Decode to pixels (H, W, C)."""
        return decode_image(stored or b"", self.channels, view.max_pixels)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the pixels of a view, (C, height, width)."""
        return self.show_placed(name, decoded, view, training, rng)[0]

    def show_placed(
        self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory
    ) -> tuple[Mapping[str, Any], Placement]:
        """Return what `show` does, and where the view is in the image."""
        size = view.image_size or self.size
        assert size is not None, "shapes() is called first"
        if training:
            found, place = placed_training_view(decoded, size, view.augment, rng, stretch=view.stretch)
        else:
            found, place = placed_evaluation_view(decoded, size, view.eval_crop, stretch=view.stretch)
        return {name: found}, place
