"""Views of images: random ones for training, one fixed view for evaluation."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from perceiver.config import Config, Factors, Probability, Real, Shares
from pipelines.transforms.decode import Picture, to_image, to_picture
from pipelines.transforms.randaugment import RandAugmentConfig, rand_augment
from pipelines.transforms.resize import Box, Pixels, resized

CROP_ATTEMPTS = 10
RELEASED_CROP = 224 / (224 + 32)
"""Share of the shorter side that the released pipeline's centre crop keeps."""
MEASURED_SIDE = 128
"""About how many rows and columns of an image, at least, are looked at for the statistics of a data set."""
ROUNDING = 1e-6
"""Pixels by which a product of fractions may miss a whole number."""


class CropConfig(Config):
    """Random resized crop.

    `draw: side` is what the Perceiver's released ImageNet pipeline does by TensorFlow's
    `sample_distorted_bounding_box`, `draw: area` is torchvision's `RandomResizedCrop`.
    """

    draw: Literal["area", "side"] = Field(
        default="area",
        description="area: uniform area, log-uniform aspect; side: uniform height and aspect, as released",
    )
    area: Shares = Field(default=(0.08, 1.0), description="share of the image's area")
    aspect: Factors = Field(default=(3 / 4, 4 / 3), description="width / height")
    covered: Probability = Field(default=0.1, description="draw side: least share of the image's area that is kept")


class AugmentConfig(Config):
    """Random changes to training images; the defaults change nothing."""

    crop: CropConfig | None = Field(default=None, description="random crop, resized to the image size")
    flip: bool = Field(default=False, description="mirror left and right with probability 0.5")
    shift: int = Field(
        default=0, ge=0, le=100_000, description="largest move in x and y in pixels, uniform; black moves in"
    )
    rotate: Real = Field(default=0.0, ge=0, le=180, description="largest turn in degrees, uniform")
    scale: Factors = Field(default=(1.0, 1.0), description="range of the zoom factor, uniform")
    rand_augment: RandAugmentConfig | None = Field(default=None, description="random operations before resizing")
    shear: Real = Field(default=0.0, ge=0, lt=90, description="largest shear in degrees, uniform")

    @property
    def affine(self) -> bool:
        """Return whether pixels must be interpolated."""
        return bool(self.rotate or self.shear or self.scale != (1.0, 1.0))


UNCHANGED = AugmentConfig()


class Placement(NamedTuple):
    """Where a view takes its pixels from: what else belongs to the image, such as boxes, moves with it.

    Attributes:
        picture: (height, width) of the image.
        size: (height, width) of the view.
        box: the part of the image that is resized to the view.
        flip: whether it is then mirrored left and right.
        affine: what then moves the view's pixels, see `affine_coefficients`; None: nothing.
    """

    picture: tuple[int, int]
    size: tuple[int, int]
    box: Box
    flip: bool = False
    affine: tuple[float, ...] | None = None


def training_view(
    picture: Picture,
    size: tuple[int, int],
    config: AugmentConfig,
    random: Callable[[], Generator],
    *,
    stretch: bool = False,
) -> Pixels:
    """Return a random view of a training image, (C, height, width) uint8; see `placed_training_view`."""
    return placed_training_view(picture, size, config, random, stretch=stretch)[0]


def placed_training_view(
    picture: Picture,
    size: tuple[int, int],
    config: AugmentConfig,
    random: Callable[[], Generator],
    *,
    stretch: bool = False,
) -> tuple[Pixels, Placement]:
    """Return a random view of a training image, (C, height, width) uint8, and where it is in the image.

    Args:
        picture: decoded image, grey or RGB.
        size: (height, width). Without a crop, an image of another size is fitted as in evaluation.
        config: the augmentation. The operations of `rand_augment` that move pixels are not in the placement.
        random: returns the generator; called only if the configuration changes anything.
        stretch: see `evaluation_box`.
    """
    if config == UNCHANGED:
        return placed_evaluation_view(picture, size, 1.0, stretch=stretch)
    rng = random()
    flip = config.flip and rng.random() < 0.5
    height, width = picture.shape[:2]
    shape = (height, width) if stretch else size
    box = crop_box(height, width, config.crop, rng) if config.crop else centred_box(height, width, shape, 1.0)
    place = Placement((height, width), size, box, flip)
    if config.rand_augment:
        left, top, right, bottom = box
        image = rand_augment(to_image(picture[top:bottom, left:right]), config.rand_augment, rng)
        picture, box = to_picture(image), (0, 0, *image.size)
    pixels = resized(picture, size, box, flip=flip)
    if config.affine:
        coefficients = affine_coefficients(size, config, rng)
        return transformed(pixels, coefficients), place._replace(affine=coefficients)
    if config.shift:
        down, right = (int(step) for step in rng.integers(-config.shift, config.shift + 1, 2))
        return shifted(pixels, down, right), place._replace(affine=(1, 0, -right, 0, 1, -down))
    return pixels, place


def some_pixels(picture: Picture) -> NDArray[np.float32]:
    """Return pixels (n, channels) of an image in [0, 1]: all of a small one, else those of an even grid."""
    step = max(1, min(picture.shape[:2]) // MEASURED_SIDE)
    return picture[::step, ::step].reshape(-1, picture.shape[2]).astype(np.float32) / np.float32(255)


def evaluation_view(picture: Picture, size: tuple[int, int], crop: float, *, stretch: bool = False) -> Pixels:
    """Return the fixed view of an evaluation image: unchanged if it has the wanted size, else fitted."""
    return placed_evaluation_view(picture, size, crop, stretch=stretch)[0]


def placed_evaluation_view(
    picture: Picture, size: tuple[int, int], crop: float, *, stretch: bool = False
) -> tuple[Pixels, Placement]:
    """Return the fixed view of an evaluation image, and where it is in the image."""
    height, width = picture.shape[:2]
    box = evaluation_box(height, width, size, crop, stretch=stretch)
    return resized(picture, size, box), Placement((height, width), size, box)


def evaluation_box(height: int, width: int, size: tuple[int, int], crop: float, *, stretch: bool = False) -> Box:
    """Return the box that evaluation shows: all of an image of the wanted size, else a centred box.

    The centred box has the shape of `size`, or with `stretch` that of the image.
    """
    whole = height, width
    return (0, 0, width, height) if whole == size else centred_box(height, width, whole if stretch else size, crop)


def centred_box(height: int, width: int, size: tuple[int, int], crop: float) -> Box:
    """Return the largest centred box of the shape of `size` in an image, times `crop`, on whole pixels.

    With crop 224/256 and a square size this is the papers' evaluation crop, to the pixel.
    """
    ratio = crop * min(height / size[0], width / size[1])
    box_height, box_width = (max(1, int(length * ratio + ROUNDING)) for length in size)
    top, left = (height - box_height + 1) // 2, (width - box_width + 1) // 2
    return left, top, left + box_width, top + box_height


def crop_box(height: int, width: int, config: CropConfig, rng: Generator) -> Box:
    """Return a random box of the wanted area and aspect; the centre square if ten attempts fail."""
    if config.draw == "side":
        return _side_box(height, width, config, rng)
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*config.area)
        aspect = math.exp(rng.uniform(math.log(config.aspect[0]), math.log(config.aspect[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
            return left, top, left + box_width, top + box_height
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return left, top, left + side, top + side


def _side_box(height: int, width: int, config: CropConfig, rng: Generator) -> Box:
    """Return a random box as TensorFlow draws it; the released evaluation crop if ten attempts fail or keep all.

    The height is uniform between those of the least and the greatest area that fit. As there, the last possible offset
    is never drawn.
    """
    least, most = (share * height * width for share in config.area)
    for _ in range(CROP_ATTEMPTS):
        aspect = rng.uniform(*config.aspect)
        low, high = round(math.sqrt(least / aspect)), round(math.sqrt(most / aspect))
        if round(high * aspect) > width:
            high = int((width + 0.5 - ROUNDING) / aspect)
        high = min(high, height)
        tall = int(rng.integers(min(low, high), high + 1))
        if tall * round(tall * aspect) < least:
            tall += 1
        if tall * round(tall * aspect) > most:
            tall -= 1
        wide = round(tall * aspect)
        fits = 0 < tall <= height and 0 < wide <= width and least <= tall * wide <= most
        if fits and tall * wide >= config.covered * height * width:
            if (tall, wide) == (height, width):
                break
            top, left = int(rng.integers(max(height - tall, 1))), int(rng.integers(max(width - wide, 1)))
            return left, top, left + wide, top + tall
    return centred_box(height, width, (1, 1), RELEASED_CROP)


def affine_coefficients(size: tuple[int, int], config: AugmentConfig, rng: Generator) -> tuple[float, ...]:
    """Return Pillow's coefficients (output to input) of a random zoom, turn, shear and shift about the centre."""
    turn, slant, right, down = rng.uniform(-1.0, 1.0, 4)
    zoom = rng.uniform(*config.scale)
    angle, k = math.radians(turn * config.rotate), math.tan(math.radians(slant * config.shear))
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    # The inverse of zoom * turn * shear, then the shift.
    a, b, d, e = cos + k * sin, sin - k * cos, -sin, cos
    x, y = size[1] / 2, size[0] / 2
    out_x, out_y = x + right * config.shift, y + down * config.shift
    return a, b, x - a * out_x - b * out_y, d, e, y - d * out_x - e * out_y


def transformed(pixels: Pixels, coefficients: tuple[float, ...]) -> Pixels:
    """Apply an affine map (output to input, see `affine_coefficients`) to pixels (C, H, W); black moves in."""
    height, width = pixels.shape[1:]
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    image = image.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return to_picture(image).transpose(2, 0, 1)


def shifted(pixels: Pixels, down: int, right: int) -> Pixels:
    """Move pixels (C, H, W) down and right by whole pixels; zeros move in."""
    out = np.zeros_like(pixels)
    height, width = pixels.shape[1:]
    out[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = pixels[
        :, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)
    ]
    return out
