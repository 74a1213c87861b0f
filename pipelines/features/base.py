"""The base class of all kinds of feature, and the recipe options that they share."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from perceiver.config import Config, Count, Real, Size
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.clip import ClipConfig
from pipelines.transforms.decode import MAX_PIXELS
from pipelines.transforms.image import AugmentConfig, Placement
from pipelines.transforms.optical_flow import FlowViewConfig
from pipelines.transforms.points import PointsViewConfig
from pipelines.transforms.series import SeriesViewConfig
from pipelines.transforms.store import StoreConfig
from pipelines.transforms.video import VideoViewConfig


def _grey_or_rgb(channels: int) -> int:
    if channels == 2:
        raise ValueError("wanted 1 (grey) or 3 (RGB)")
    return channels


Channels = Annotated[int, Field(strict=True, ge=1, le=3), AfterValidator(_grey_or_rgb)]
"""Channels of an image or frame."""
_Side = Annotated[int, Field(strict=True, ge=1, le=1 << 14)]
PixelSize = tuple[_Side, _Side]
"""(height, width) of images or frames."""
Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]
"""Shape of one sample and type, by batch key."""
RngFactory = Callable[[], Generator]
"""Returns the sample's generator. It is made only if needed, since that takes as long as decoding a small image."""


def _share_of_training(given: dict[str, Any]) -> float:
    """Return the default of `eval_crop`: random crops show objects larger, as the papers' centre crop does."""
    return 0.875 if given["augment"].crop or given["video"].augment.crop else 1.0


class ViewConfig(Config):
    """How samples are shown to the model: a part of the recipe's `data:` section."""

    image_size: tuple[Size, Size] | None = Field(
        default=None, description="(height, width) in a batch; null: as stored"
    )
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random changes to training images")
    stretch: bool = Field(
        default=False, description="distort images of another shape than image_size instead of showing a centred part"
    )
    max_pixels: Count = Field(default=MAX_PIXELS, description="larger images are bad samples")
    text_length: int = Field(default=2048, ge=2, le=1 << 24, description="tokens of a text, which is cut or padded")
    answer_length: int = Field(
        default=32, ge=2, le=1 << 20, description="tokens of an answer, padded; a longer answer is a bad sample"
    )
    boxes: int = Field(default=16, ge=1, le=10_000, description="boxes of an image, padded; more are a bad sample")
    points: PointsViewConfig = Field(
        default=PointsViewConfig(), description="number of points and their random changes"
    )
    series: SeriesViewConfig = Field(default=SeriesViewConfig(), description="length of series of numbers")
    audio: AudioViewConfig = Field(default=AudioViewConfig(), description="rate and length of sound")
    video: VideoViewConfig = Field(default=VideoViewConfig(), description="frames, their size and random changes")
    flow: FlowViewConfig = Field(default=FlowViewConfig(), description="random changes to frames and their flow")
    clip: ClipConfig = Field(default=ClipConfig(), description="where clips of recordings start")
    eval_crop: Real = Field(
        default_factory=_share_of_training,
        ge=0.01,
        le=1,
        description="share of the shorter side that evaluation shows of an image or frame of another size; default: "
        "what training saw, 0.875 (the papers') with augment.crop or video.augment.crop, otherwise 1",
    )


UNLIMITED: dict[str, Any] = {"answer_length": 1 << 20, "boxes": 10_000}
"""The view in which no sample is bad for being too long for the model: for `inspect`."""


class BaseFeature(Config):
    """One kind of feature. `name` is its column in a shard and, for most kinds, its key in a batch."""

    arrow: ClassVar[pa.DataType]
    """Type of its column in a shard."""
    clips: ClassVar[bool] = False
    """Whether an evaluation sample may have several clips; its arrays then have a leading axis of clips."""
    stores: ClassVar[tuple[str, ...]] = ()
    """Settings of `StoreConfig` that apply to it."""
    bounded: ClassVar[bool] = False
    """Whether a view has a greatest length, so that a part of a longer sample may not be shown."""

    @property
    def follows(self) -> str:
        """The name of the image whose view it shares; empty: none. `show_with` then takes the place of `show`."""
        return ""

    def plain(self) -> Self:
        """Return the feature without what `prepare` measures on the data: what parts of a mixture must agree in."""
        return self

    def smaller(self, stored: Any, config: StoreConfig) -> Any:
        """Return a stored value at the size of a configuration, one of whose settings is in `stores`.

        Raises:
            BadSample: it is damaged.
        """
        return stored

    def after(self, config: StoreConfig) -> Self:
        """Return the feature of values that `smaller` returns."""
        return self

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return shape and type of what the feature puts into a batch; for recordings, of one clip.

        Raises:
            UserError: neither the view nor the data set the size.
        """
        raise NotImplementedError

    def decoded_bytes(self) -> int:
        """Return the size of a decoded sample if all have the same, else 0: decoded samples are then not cached."""
        return 0

    def imports(self, view: ViewConfig) -> tuple[str, ...]:
        """Return the modules that its transforms import on first use, for processes that are started early."""
        return ()

    def normalised(self, name: str) -> dict[str, int]:
        """Return the number of channels of each batch key whose values a model may normalise by their statistics."""
        return {}

    def values(self, name: str, stored: Any) -> Mapping[str, NDArray[np.floating]]:
        """Return some values (n, channels) of a sample for each key of `normalised`, in the units that models see.

        Raises:
            BadSample: it is damaged.
        """
        return {}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Decode a stored value, without anything random.

        Raises:
            BadSample: it is damaged.
        """
        raise NotImplementedError

    def exceeds(self, decoded: Any, view: ViewConfig) -> bool:
        """Return whether an evaluation leaves a part of a decoded sample out: of a text or a recording."""
        return False

    def excess(self, view: ViewConfig) -> str:
        """Return what happens to samples that exceed the view, and how to change that; for `pipelines.feed.excess`."""
        raise NotImplementedError

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return a value for each key of `shapes`: a random view in training, a fixed one in evaluation."""
        raise NotImplementedError

    def show_with(
        self, name: str, decoded: Any, view: ViewConfig, place: Placement, sample: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return a value for each key of `shapes` of a feature that follows an image.

        Args:
            name: of the feature.
            decoded: its value.
            view: how it is shown.
            place: where the image's view is in the image.
            sample: the decoded values of all features, by name.

        Raises:
            BadSample: it does not fit the image or another feature.
        """
        raise NotImplementedError
