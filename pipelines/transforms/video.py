"""Video: from the frames of a clip to uint8 pixels, random views for training, one fixed view for evaluation.

Source: Perceiver paper (4.2: Inception crop, flip, colour augmentation); the colours' ranges are those of DMVR
(`color_default_augm`).
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, PositiveInt

from perceiver.config import Config
from pipelines.transforms.image import CropConfig, centred_box, crop_box
from pipelines.transforms.media import Media, frames_at
from pipelines.transforms.resize import Box, to_pixels

MAX_PIXELS = 10_000_000


class ColourConfig(Config):
    """Random colours, the same for all frames of a clip."""

    probability: float = Field(default=0.8, ge=0, le=1, description="chance that a clip's colours are changed")
    brightness: float = Field(default=32 / 255, ge=0, le=1, description="most that is added, as a share of white")
    saturation: tuple[float, float] = Field(default=(0.6, 1.4), description="factors, uniform")
    contrast: tuple[float, float] = Field(default=(0.6, 1.4), description="factors about each frame's mean, uniform")
    hue: float = Field(default=0.2, ge=0, le=0.5, description="most that the hue turns, as a share of the circle")


class VideoAugmentConfig(Config):
    """Random changes to training clips; the defaults change nothing."""

    crop: CropConfig | None = Field(default=None, description="random crop, the same in all frames")
    flip: bool = Field(default=False, description="mirror left and right, half of the time")
    colour: ColourConfig | None = Field(default=None, description="random colours")


class VideoConfig(Config):
    """How pictures of a recording are given to the model."""

    frames: int = Field(default=32, ge=1, description="frames of a clip")
    fps: float = Field(default=25.0, gt=0, le=1000, description="frames a second in a batch, taken by time stamp")
    size: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="(height, width) in a batch; null: as stored")
    augment: VideoAugmentConfig = Field(default=VideoAugmentConfig(), description="random changes to training clips")
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, description="videos of larger frames are bad samples")

    @property
    def seconds(self) -> float:
        """Length of a clip."""
        return self.frames / self.fps


def video_clips(media: Media, starts: NDArray[np.float64], size: tuple[int, int], channels: int, config: VideoConfig,
                view: "View") -> NDArray[np.uint8]:
    """Clips (K, F, C, H, W) of a video, starting at these seconds; each frame is decoded and resized once.

    Raises:
        BadSample: damaged.
    """
    times = (starts[:, None] + np.arange(config.frames) / config.fps).ravel()
    images, index = frames_at(media, times, lambda image: view.fit(image, size), "L" if channels == 1 else "RGB")
    pixels = np.stack([to_pixels(image) for image in view.finish(images)])
    return pixels[index].reshape(len(starts), config.frames, *pixels.shape[1:])


class View:
    """The fixed view: the largest centred box of the wanted shape, times `crop`, if the size is not the one wanted."""

    def __init__(self, crop: float) -> None:
        self.crop = crop

    def box(self, image: Image.Image, size: tuple[int, int]) -> Box | None:
        """The part of each frame that is shown."""
        return None if image.size == (size[1], size[0]) else centred_box(image.height, image.width, size, self.crop)

    def fit(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """One frame in the wanted size."""
        box = self.box(image, size)
        return image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box) if box else image

    def finish(self, images: list[Image.Image]) -> list[Image.Image]:
        """All frames of the clip."""
        return images


class RandomView(View):
    """A random view: one crop, one flip and one change of colours for all frames."""

    def __init__(self, config: VideoAugmentConfig, random: Callable[[], Generator]) -> None:
        super().__init__(1.0)
        self.config, self.random = config, random
        self.shape: tuple[int, int] | None = None
        self.chosen: Box | None = None

    def box(self, image: Image.Image, size: tuple[int, int]) -> Box | None:
        """A random box, chosen at the first frame."""
        if self.config.crop is None:
            return super().box(image, size)
        if self.chosen is None or self.shape != image.size:
            # A frame of another size, which is rare, gets a box of its own.
            self.shape, self.chosen = image.size, crop_box(image.height, image.width, self.config.crop, self.random())
        return self.chosen

    def finish(self, images: list[Image.Image]) -> list[Image.Image]:
        """Flip and colour."""
        if self.config.flip and self.random().random() < 0.5:
            images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        colour = self.config.colour
        if colour and images[0].mode == "RGB" and self.random().random() < colour.probability:
            rng = self.random()
            change = (rng.uniform(-colour.brightness, colour.brightness), rng.uniform(*colour.saturation),
                      rng.uniform(*colour.contrast), rng.uniform(-colour.hue, colour.hue))
            images = [recoloured(image, *change) for image in images]
        return images


def recoloured(image: Image.Image, brightness: float, saturation: float, contrast: float, hue: float) -> Image.Image:
    """An RGB frame with other colours.

    The order is brightness, saturation and hue, contrast; DMVR turns the hue last, which comes to the same but for
    clipping, and costs a second conversion.

    Args:
        image: mode RGB.
        brightness: added, 1 is white.
        saturation: factor in HSV.
        contrast: factor about the mean of each channel.
        hue: turn, 1 is the whole circle.
    """
    levels = np.arange(256)
    if brightness:
        image = image.point(np.clip(np.rint(levels + 255 * brightness), 0, 255).astype(int).tolist() * 3)
    if saturation != 1 or hue:
        turned = (levels + round(255 * hue)) % 256
        grey = np.clip(np.rint(levels * saturation), 0, 255).astype(int)
        image = image.convert("HSV").point([*turned.tolist(), *grey.tolist(), *levels.tolist()]).convert("RGB")
    if contrast != 1:
        counts = np.array(image.histogram()).reshape(3, 256)
        means = counts @ levels / (image.width * image.height)
        table = np.clip(np.rint(means[:, None] + contrast * (levels - means[:, None])), 0, 255).astype(int)
        image = image.point(table.ravel().tolist())
    return image
