"""Images with a class for each pixel: file format and views."""

import io
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from pipelines.transforms import BadSample
from pipelines.transforms.decode import Picture, decode_image, open_image, upright_size
from pipelines.transforms.image import (
    UNCHANGED,
    AugmentConfig,
    affine_coefficients,
    centred_box,
    crop_box,
    evaluation_box,
    shifted,
    transformed,
)
from pipelines.transforms.resize import Box, Pixels, resized

IGNORED = 255
"""Pixels of this class do not count, and those that move in at the border."""
MODES = ("L", "P", "1")
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Grey values of 2 and 4 bits are decoded as multiples of these, so that the lightest one is 255."""

Mask = NDArray[np.uint8]
"""Classes (H, W)."""


class Masked(NamedTuple):
    """An image (H, W, C) and the classes of its pixels (H, W)."""

    picture: Picture
    mask: Mask


def pack(image: bytes, mask: bytes, classes: int) -> bytes:
    """Return an image's and a mask's files unchanged in one uncompressed archive.

    Raises:
        BadSample: the mask is not one for this image, see `decode_mask`.
    """
    with open_image(io.BytesIO(image)) as opened:
        size = upright_size(opened)
    found = decode_mask(mask, size[0] * size[1], classes)
    _check_sizes(size, found)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("image", image), ("mask", mask)):
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def unpack(stored: bytes, channels: int, max_pixels: int, classes: int) -> Masked:
    """Decode the archive of `pack`.

    Raises:
        BadSample: image or mask is damaged or too large, or their sizes differ.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            entries = archive.infolist()
            stored_only = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if [entry.filename for entry in entries] != ["image", "mask"] or not stored_only:
                raise BadSample("not an image and a mask")
            image, mask = (archive.read(entry) for entry in entries)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise BadSample(f"not an image and a mask: {error}") from error
    picture = decode_image(image, channels, max_pixels)
    found = decode_mask(mask, max_pixels, classes)
    _check_sizes(picture.shape[:2], found)
    return Masked(picture, found)


def decode_mask(encoded: bytes, max_pixels: int, classes: int) -> Mask:
    """Return the classes (H, W) of a mask: grey values, or the indices of a palette; 255 does not count.

    Raises:
        BadSample: another file, too large, of other modes, or a value that is no class.
    """
    with open_image(io.BytesIO(encoded)) as image:
        if image.width * image.height > max_pixels:
            raise BadSample(f"a mask of {image.width}x{image.height}: wanted up to {max_pixels} pixels")
        if image.format == "JPEG" or image.mode not in MODES:
            raise BadSample(f"a mask of format {image.format} and mode {image.mode}: wanted a grey PNG, or a palette")
        tiles: Any = getattr(image, "tile", [])
        step = GREY_STEPS.get(str(tiles[0].args), 1) if image.mode == "L" and tiles else 1
        try:
            mask = np.array(image, np.uint8) // step
        except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
            raise BadSample("undecodable mask") from error
    strange = mask[(mask >= classes) & (mask != IGNORED)]
    if strange.size:
        raise BadSample(f"a mask with the class {strange[0]}, wanted 0 to {classes - 1} or {IGNORED}")
    return mask


def _check_sizes(size: tuple[int, ...], mask: Mask) -> None:
    if mask.shape != tuple(size):
        raise BadSample(f"a mask of {mask.shape[1]}x{mask.shape[0]} for an image of {size[1]}x{size[0]}")


def training_view(
    found: Masked,
    size: tuple[int, int],
    config: AugmentConfig,
    random: Callable[[], Generator],
    *,
    stretch: bool = False,
) -> tuple[Pixels, Mask]:
    """Return a random view: pixels (C, height, width), and the mask under the same changes, to the nearest pixel."""
    if config == UNCHANGED:
        return evaluation_view(found, size, 1.0, stretch=stretch)
    rng = random()
    flip = config.flip and rng.random() < 0.5
    height, width = found.mask.shape
    shape = (height, width) if stretch else size
    box = crop_box(height, width, config.crop, rng) if config.crop else centred_box(height, width, shape, 1.0)
    pixels, mask = resized(found.picture, size, box, flip=flip), nearest(found.mask, size, box, flip=flip)
    if config.affine:
        coefficients = affine_coefficients(size, config, rng)
        image = Image.fromarray(mask).transform(
            (size[1], size[0]), Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=IGNORED
        )
        return transformed(pixels, coefficients), np.array(image)
    if config.shift:
        down, right = (int(step) for step in rng.integers(-config.shift, config.shift + 1, 2))
        return shifted(pixels, down, right), IGNORED - shifted(IGNORED - mask[None], down, right)[0]
    return pixels, mask


def evaluation_view(found: Masked, size: tuple[int, int], crop: float, *, stretch: bool = False) -> tuple[Pixels, Mask]:
    """Return the fixed view of an evaluation sample."""
    height, width = found.mask.shape
    box = evaluation_box(height, width, size, crop, stretch=stretch)
    return resized(found.picture, size, box), nearest(found.mask, size, box)


def nearest(mask: Mask, size: tuple[int, int], box: Box, *, flip: bool = False) -> Mask:
    """Resize a box of a mask to (height, width), each pixel that of the nearest centre."""
    left, top, right, bottom = box
    rows, columns = (
        start + ((np.arange(new) + 0.5) * old / new).astype(int)
        for start, old, new in ((top, bottom - top, size[0]), (left, right - left, size[1]))
    )
    shown = mask[np.ix_(rows, columns)]
    return np.ascontiguousarray(shown[:, ::-1]) if flip else shown


def mask_colours(mask: Mask) -> Image.Image:
    """Return a mask as colours: black for class 0, other classes of different hues, grey where it does not count."""
    from matplotlib.colors import hsv_to_rgb

    number = np.arange(256)
    hues = (number * 0.618034) % 1
    colours = hsv_to_rgb(np.stack([hues, np.full(256, 0.75), np.full(256, 0.95)], axis=-1))
    colours[0], colours[IGNORED] = 0.0, 0.5
    return Image.fromarray((colours[mask] * 255).astype(np.uint8))
