"""What every kind of feature answers, and the options a recipe gives for them."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.random import Generator
from pydantic import Field, PositiveInt

from perceiver.config import Config
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.clip import ClipConfig
from pipelines.transforms.decode import MAX_PIXELS
from pipelines.transforms.image import AugmentConfig
from pipelines.transforms.optical_flow import FlowViewConfig
from pipelines.transforms.points import PointsViewConfig
from pipelines.transforms.video import VideoViewConfig

Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]
"""Shape of one sample and type, by batch key."""
RngFactory = Callable[[], Generator]
"""Gives the sample's generator; it is made only if something is random, since that takes as long as a small image."""


class ViewConfig(Config):
    """How samples are shown to the model; part of the recipe's `data:` section."""

    image_size: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="(height, width) in a batch; null: as stored"
    )
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random changes to training images")
    eval_crop: float = Field(default=0.875, gt=0, le=1, description="share of a larger image that evaluation covers")
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, description="larger images are bad samples")
    text_length: int = Field(default=2048, ge=2, description="tokens of a text, cut or padded to it")
    points: PointsViewConfig = Field(
        default=PointsViewConfig(), description="number of points and their random changes"
    )
    audio: AudioViewConfig = Field(default=AudioViewConfig(), description="rate and length of sound")
    video: VideoViewConfig = Field(default=VideoViewConfig(), description="frames, their size and random changes")
    flow: FlowViewConfig = Field(default=FlowViewConfig(), description="random changes to frames and their flow")
    clip: ClipConfig = Field(default=ClipConfig(), description="which parts of recordings are shown")


class BaseFeature(Config):
    """One kind of feature. `name` is the key under which it is stored and, mostly, given to the model."""

    arrow: ClassVar[pa.DataType]
    """Type of its column in a shard."""
    clips: ClassVar[bool] = False
    """Whether an evaluation sample may come as several clips; its arrays then have an axis of clips in front."""

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """What it puts into a batch: of recordings, one clip.

        Raises:
            UserError: the view leaves something open that the data do not fix.
        """
        raise NotImplementedError

    def decoded_bytes(self) -> int:
        """Size of a decoded sample where all have the same; 0 means that decoded samples are not worth keeping."""
        return 0

    def imports(self, view: ViewConfig) -> tuple[str, ...]:
        """Modules that its transforms import when they first need them, for processes that are started early."""
        return ()

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """The sample ready to be shown, without anything random.

        Raises:
            BadSample: it is damaged.
        """
        raise NotImplementedError

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Values for all keys of `shapes`: a random view in training, the fixed one in evaluation."""
        raise NotImplementedError
