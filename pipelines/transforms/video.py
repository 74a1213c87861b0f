"""Video: from the frames of a clip to uint8 pixels, random views for training, one fixed view for evaluation.

Source: Perceiver paper (4.2: Inception crop, flip, colour augmentation).
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Config, Real, Size
from pipelines.transforms.colour import ColourConfig, recoloured
from pipelines.transforms.decode import Picture
from pipelines.transforms.image import CropConfig, crop_box, evaluation_box
from pipelines.transforms.media import Media, frames_at
from pipelines.transforms.resize import Box, Pixels, resized

MAX_PIXELS = 10_000_000


class VideoAugmentConfig(Config):
    """Random changes to training clips; the defaults change nothing."""

    crop: CropConfig | None = Field(default=None, description="random crop, the same in all frames")
    flip: bool = Field(default=False, description="mirror left and right with probability 0.5")
    colour: ColourConfig | None = Field(default=None, description="random colours")


class VideoViewConfig(Config):
    """How pictures of a recording are shown to the model."""

    frames: Size = Field(default=32, description="frames of a clip")
    fps: Real = Field(default=25.0, ge=0.001, le=1000, description="frames per second in a batch, taken by time stamp")
    size: tuple[Size, Size] | None = Field(default=None, description="(height, width) in a batch; null: as stored")
    augment: VideoAugmentConfig = Field(default=VideoAugmentConfig(), description="random changes to training clips")
    max_pixels: Size = Field(default=MAX_PIXELS, description="videos of larger frames are bad samples")

    @property
    def seconds(self) -> float:
        """Return the length of a clip."""
        return self.frames / self.fps


def video_clips(
    media: Media,
    starts: NDArray[np.float64],
    size: tuple[int, int],
    channels: int,
    config: VideoViewConfig,
    view: "CentredView",
) -> NDArray[np.uint8]:
    """Return clips (K, F, C, H, W) that start at these seconds; each frame is decoded and resized once."""
    times = (starts[:, None] + np.arange(config.frames) / config.fps).ravel()
    frames, index = frames_at(media, times, lambda picture: view.fit(picture, size), channels)
    pixels = view.finish(np.stack(frames))
    return pixels[index].reshape(len(starts), config.frames, *pixels.shape[1:])


class CentredView:
    """The fixed view: of frames of another size, the largest centred box of the wanted shape, times `crop`."""

    def __init__(self, crop: float) -> None:
        self.crop = crop

    def box(self, height: int, width: int, size: tuple[int, int]) -> Box:
        """Return the part of each frame that is shown."""
        return evaluation_box(height, width, size, self.crop)

    def fit(self, picture: Picture, size: tuple[int, int]) -> Pixels:
        """Return one frame in the wanted size."""
        height, width = picture.shape[:2]
        return resized(picture, size, self.box(height, width, size), filter="bilinear")

    def finish(self, pixels: Pixels) -> Pixels:
        """Return all frames of the clip, (F, C, H, W)."""
        return pixels


class RandomView(CentredView):
    """A random view: one crop, one flip and one change of colours for all frames."""

    def __init__(self, config: VideoAugmentConfig, random: Callable[[], Generator]) -> None:
        super().__init__(1.0)
        self.config, self.random = config, random
        self.shape: tuple[int, int] | None = None
        self.chosen: Box = (0, 0, 0, 0)

    def box(self, height: int, width: int, size: tuple[int, int]) -> Box:
        """Return a random box, chosen at the first frame."""
        if self.config.crop is None:
            return super().box(height, width, size)
        if self.shape != (height, width):
            # Frames of another size, which are rare, have their own box.
            self.shape, self.chosen = (height, width), crop_box(height, width, self.config.crop, self.random())
        return self.chosen

    def finish(self, pixels: Pixels) -> Pixels:
        """Flip the frames and change their colours."""
        flip, colour = self.config.flip and self.random().random() < 0.5, self.config.colour
        if colour and pixels.shape[1] == 3 and self.random().random() < colour.probability:
            rng = self.random()
            change = (
                rng.uniform(-colour.brightness, colour.brightness),
                rng.uniform(*colour.saturation),
                rng.uniform(*colour.contrast),
                rng.uniform(-colour.hue, colour.hue),
            )
            for frame in pixels:  # One at a time stays in the processor's cache.
                frame[:] = recoloured(frame, *change)
        return pixels[..., ::-1] if flip else pixels
