"""Images: from encoded bytes to uint8 pixels, random views for training, one fixed view for evaluation."""

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageOps
from pydantic import Field, model_validator

from perceiver.config import Config
from pipelines.transforms import BadSample, check_range
from pipelines.transforms.randaugment import RandAugmentConfig, rand_augment
from pipelines.transforms.resize import Box, Pixels, resized, to_pixels

MAX_PIXELS = 100_000_000
"""Larger images are refused by their header, before memory is spent on them."""
CROP_ATTEMPTS = 10


class CropConfig(Config):
    """Random resized crop, as Inception and the Perceiver's ImageNet pipeline use it."""

    area: tuple[float, float] = Field(default=(0.08, 1.0), description="share of the image's area, uniform")
    aspect: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="width / height, log-uniform")

    @model_validator(mode="after")
    def _ordered(self) -> "CropConfig":
        check_range("area", self.area, 1)
        check_range("aspect", self.aspect)
        return self


class AugmentConfig(Config):
    """Random changes to training images; the defaults change nothing."""

    crop: CropConfig | None = Field(default=None, description="random crop, resized to the image size")
    flip: bool = Field(default=False, description="mirror left and right, half of the time")
    shift: int = Field(default=0, ge=0, description="move by up to so many pixels in x and y, uniform; black moves in")
    rotate: float = Field(default=0.0, ge=0, le=180, description="turn by up to so many degrees either way, uniform")
    scale: tuple[float, float] = Field(default=(1.0, 1.0), description="zoom by a factor in this range, uniform")
    rand_augment: RandAugmentConfig | None = Field(default=None, description="random operations, before any resizing")
    shear: float = Field(default=0.0, ge=0, lt=90, description="slant by up to so many degrees either way, uniform")

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        check_range("scale", self.scale)
        return self

    @property
    def affine(self) -> bool:
        """Whether pixels must be interpolated."""
        return bool(self.rotate or self.shear or self.scale != (1.0, 1.0))


UNCHANGED = AugmentConfig()


def decode(encoded: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to a Pillow image of mode L (1 channel) or RGB (3), turned upright as its EXIF tag says.

    16-bit grey is scaled to 8 bits; alpha is laid over white; CMYK and palettes are converted.

    Raises:
        BadSample: empty, truncated, not an image, or larger than `max_pixels`.
    """
    if not encoded:
        raise BadSample("0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            if image.width * image.height > max_pixels:
                raise BadSample(f"{image.width}x{image.height} is more than {max_pixels} pixels")
            image.load()
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(f"more than {max_pixels} pixels") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files (struct, Value, Syntax, ...).
        raise BadSample(f"undecodable image: {_reason(error)}") from error
    return _mode(_upright(image), "L" if channels == 1 else "RGB")


def _reason(error: Exception) -> str:
    """The error's first line, without the memory addresses that would make each reason unique."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(" <")[0][:80]


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if image.format in ("JPEG", "TIFF", "WEBP", "PNG", "MPO") and (
        "exif" in image.info or image.format == "TIFF") else image


def _mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float64)
        top = 65535.0 if pixels.max(initial=0) > 255 else 255.0
        image = Image.fromarray((pixels.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def training_view(image: Image.Image, size: tuple[int, int], config: AugmentConfig, random: Callable[[], Generator]
                  ) -> Pixels:
    """A random view of a training image, (C, height, width) uint8.

    Args:
        image: decoded image, mode L or RGB.
        size: (height, width) wanted. Without a crop, an image of another size is fitted as in evaluation.
        config: what to vary.
        random: gives the only source of randomness; called if the configuration changes anything.
    """
    if config == UNCHANGED:
        return evaluation_view(image, size, 1.0)
    rng = random()
    flip = config.flip and rng.random() < 0.5
    box = crop_box(image.height, image.width, config.crop, rng) if config.crop else centred_box(image, size, 1.0)
    if config.rand_augment:
        left, top, right, bottom = map(round, box)
        image = rand_augment(image.crop((left, top, right, bottom)), config.rand_augment, rng)
        box = (0, 0, *image.size)
    pixels = resized(image, size, box, flip=flip)
    if config.affine:
        return transformed(pixels, affine_coefficients(size, config, rng))
    if config.shift:
        down, right = rng.integers(-config.shift, config.shift + 1, 2)
        return shifted(pixels, int(down), int(right))
    return pixels


def evaluation_view(image: Image.Image, size: tuple[int, int], crop: float) -> Pixels:
    """The fixed view of an evaluation image: unchanged if it has the size wanted, else fitted."""
    if image.size == (size[1], size[0]):
        return to_pixels(image)
    return resized(image, size, centred_box(image, size, crop))


def centred_box(image: Image.Image, size: tuple[int, int], crop: float) -> Box:
    """The largest centred box of the shape of `size`, times `crop`.

    With crop 224/256 and a square size this is the papers' evaluation crop.
    """
    ratio = crop * min(image.height / size[0], image.width / size[1])
    height, width = size[0] * ratio, size[1] * ratio
    top, left = (image.height - height) / 2, (image.width - width) / 2
    return left, top, left + width, top + height


def crop_box(height: int, width: int, config: CropConfig, rng: Generator) -> Box:
    """A random box (left, top, right, bottom) of the wanted area and aspect; the centre square if ten tries miss."""
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


def affine_coefficients(size: tuple[int, int], config: AugmentConfig, rng: Generator) -> tuple[float, ...]:
    """Pillow's coefficients (output to input) of a random zoom, turn, slant and shift about the centre."""
    turn, slant, right, down = rng.uniform(-1.0, 1.0, 4)
    zoom = rng.uniform(*config.scale)
    angle, k = math.radians(turn * config.rotate), math.tan(math.radians(slant * config.shear))
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    # The forward map is zoom * turn * slant, then the shift; its inverse is written out.
    a, b, d, e = cos + k * sin, sin - k * cos, -sin, cos
    x, y = size[1] / 2, size[0] / 2
    out_x, out_y = x + right * config.shift, y + down * config.shift
    return a, b, x - a * out_x - b * out_y, d, e, y - d * out_x - e * out_y


def transformed(pixels: Pixels, coefficients: tuple[float, ...]) -> Pixels:
    """Pixels (C, H, W) under an affine map from output to input, see `affine_coefficients`; black moves in."""
    height, width = pixels.shape[1:]
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return to_pixels(image.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))


def shifted(pixels: Pixels, down: int, right: int) -> Pixels:
    """Pixels (C, H, W) moved down and right by whole pixels; zeros move in."""
    out = np.zeros_like(pixels)
    height, width = pixels.shape[1:]
    out[:, max(0, down):height + min(0, down), max(0, right):width + min(0, right)] = \
        pixels[:, max(0, -down):height - max(0, down), max(0, -right):width - max(0, right)]
    return out
