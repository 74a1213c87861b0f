"""RandAugment (Cubuk et al. 2019) as the Perceiver's ImageNet recipe uses it: 16 operations, 4 in a row, magnitude 5.

Magnitudes follow the TensorFlow reference: a level of 0 to 10 of each operation's full range. Uncovered pixels are grey
(128). At level 5 Color, Contrast, Brightness and Sharpness have the factor 1 and change nothing.
"""

from collections.abc import Callable
from typing import Any

from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field

from perceiver.config import Config, Real

FILL = 128
SOLARIZE_ADD_BELOW = 128

Operation = Callable[[Image.Image, float, Generator], Image.Image]
"""Image, level as a share of the full range (0 to 1), generator."""


class RandAugmentConfig(Config):
    """The number and strength of the operations."""

    layers: int = Field(
        default=4, ge=1, le=100, description="operations applied one after the other, each chosen uniformly"
    )
    magnitude: Real = Field(default=5.0, ge=0, le=10, description="level of all operations, of 10")


def rand_augment(image: Image.Image, config: RandAugmentConfig, rng: Generator) -> Image.Image:
    """Apply random operations to an image of mode L or RGB; it keeps size and mode."""
    for number in rng.integers(len(OPERATIONS), size=config.layers):
        image = list(OPERATIONS.values())[number](image, config.magnitude / 10, rng)
    return image


def _signed(value: float, rng: Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _fill(image: Image.Image) -> int | tuple[int, ...]:
    return FILL if image.mode == "L" else (FILL,) * 3


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    """Transform with nearest neighbours, as the reference does; coefficients map output to input."""
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=_fill(image)
    )


def _rotate(image: Image.Image, level: float, rng: Generator) -> Image.Image:
    return image.rotate(_signed(30 * level, rng), Image.Resampling.NEAREST, fillcolor=_fill(image))


def _table(image: Image.Image, values: list[int]) -> Image.Image:
    return image.point(values * len(image.getbands()))


def _posterize(image: Image.Image, level: float, rng: Generator) -> Image.Image:
    bits = int(4 * level)
    return _table(image, [value & ~(0xFF >> bits) & 0xFF for value in range(256)])


def _solarize(image: Image.Image, level: float, rng: Generator) -> Image.Image:
    return ImageOps.solarize(image, int(256 * level))


def _solarize_add(image: Image.Image, level: float, rng: Generator) -> Image.Image:
    added = int(110 * level)
    return _table(image, [min(255, value + added) if value < SOLARIZE_ADD_BELOW else value for value in range(256)])


def _cutout(image: Image.Image, level: float, rng: Generator) -> Image.Image:
    """Cover a square of up to 80 pixels around a random place with grey, clipped at the border."""
    half = int(40 * level)
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    out = image.copy()
    out.paste(
        _fill(image), (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
    )
    return out


def _enhance(kind: Any) -> Operation:
    """Return an operation that blends the image with a degenerate one; factor 1, as at level 5, changes nothing."""

    def operation(image: Image.Image, level: float, rng: Generator) -> Image.Image:
        factor = 1.8 * level + 0.1
        return image if factor == 1 else kind(image).enhance(factor)

    return operation


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, level, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, rng: ImageOps.equalize(image),
    "Invert": lambda image, level, rng: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level, rng: _affine(image, (1, _signed(0.3 * level, rng), 0, 0, 1, 0)),
    "ShearY": lambda image, level, rng: _affine(image, (1, 0, 0, _signed(0.3 * level, rng), 1, 0)),
    "TranslateX": lambda image, level, rng: _affine(image, (1, 0, _signed(100 * level, rng), 0, 1, 0)),
    "TranslateY": lambda image, level, rng: _affine(image, (1, 0, 0, 0, 1, _signed(100 * level, rng))),
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
