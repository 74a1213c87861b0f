"""Encoded images to pixels: JPEGs with libjpeg-turbo, every other format with Pillow."""

import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLESPERPIXEL

from perceiver.storage import first_line
from pipelines.transforms import BadSample

Picture = NDArray[np.uint8]
"""Pixels (H, W, C)."""

MAX_PIXELS = 100_000_000
"""Larger images are refused by their header, before memory is allocated."""
MAX_BYTES = 512 << 20
"""Images whose decoding and conversion would take more memory are refused by their header."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that Pillow may open. Others are refused: for EPS, for example, it would start the program `gs`."""
FLOAT_SLACK = 1e-3
EXIF = b"Exif\0\0"

_TURNS: dict[int, Callable[[Picture], Picture]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
"""Functions that turn a picture upright, by Exif orientation; 1 is upright."""
SIDEWAYS = (5, 6, 7, 8)
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_APP1, _START_OF_SCAN = 0xE1, 0xDA


def decode_image(encoded: bytes | memoryview, channels: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode to pixels (H, W, C) uint8, grey (1 channel) or RGB (3), turned upright by the Exif tag.

    16-bit grey and floats from 0 to 1 are scaled to 8 bits, alpha is composited over white, CMYK and palettes are
    converted.

    Of a file with several pictures the first is decoded.

    Raises:
        BadSample: empty, truncated, not of `FORMATS`, larger than `max_pixels`, decoding would take more than
            `MAX_BYTES`, or pixels have no known range.
    """
    if not encoded:
        raise BadSample("0 bytes")
    picture = _plain_jpeg(encoded, channels, max_pixels)
    return _by_pillow(encoded, channels, max_pixels) if picture is None else picture


def open_image(stream: BinaryIO) -> Image.Image:
    """Open an image of one of `FORMATS`; only its header is read. Every image from outside is opened here.

    Raises:
        BadSample: the file is none of these, damaged, or announces pictures beyond Pillow's limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files (struct, Value, Syntax, ...).
        raise BadSample(f"undecodable image: {_reason(error)}") from error


def to_image(picture: Picture) -> Image.Image:
    """Return pixels (H, W, C) as a Pillow image, mode L or RGB."""
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def to_picture(image: Image.Image) -> Picture:
    """Return the pixels (H, W, C) of a Pillow image, mode L or RGB; a copy that may be written to."""
    return np.array(image).reshape(image.height, image.width, -1)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) of an image that Pillow has opened, as `decode_image` returns it."""
    return (image.width, image.height) if _turned(image) in SIDEWAYS else (image.height, image.width)


def _plain_jpeg(encoded: bytes | memoryview, channels: int, max_pixels: int) -> Picture | None:
    """Decode a JPEG as Pillow does, in six sevenths of the time; return None if Pillow has to decode it.

    Pillow decodes files that are not JPEGs, are damaged or too large, need a conversion of colours, or contain XMP,
    which may have an orientation, too.
    """
    if encoded[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        pixels, exif = int(height) * int(width), _exif(encoded)
        grey = colours == "Gray"
        if (
            exif is None
            or not (grey or channels == 3 and colours in ("YCbCr", "RGB"))
            or pixels > max_pixels
            or pixels * channels > MAX_BYTES
        ):
            return None
        picture = simplejpeg.decode_jpeg(encoded, "GRAY" if channels == 1 else "RGB")
    except ValueError:
        return None
    return _upright(picture, _orientation(partial(_loaded, exif))) if exif else picture


def _exif(encoded: bytes | memoryview) -> bytes | None:
    """Return the Exif segment of a JPEG, empty if it has none; None if there is another APP1 segment."""
    exif, place = b"", 2
    while encoded[place : place + 1] == b"\xff" and len(encoded) > place + 4:
        kind, size = encoded[place + 1], int.from_bytes(encoded[place + 2 : place + 4], "big")
        if kind == _START_OF_SCAN:
            return exif
        if kind == _APP1:
            if exif or encoded[place + 4 : place + 10] != EXIF:
                return None
            exif = bytes(encoded[place + 4 : place + 2 + size])
        place += 2 + size
    raise ValueError("no scan")


def _upright(picture: Picture, orientation: int) -> Picture:
    """Turn a picture upright."""
    turn = _TURNS.get(orientation)
    return np.ascontiguousarray(turn(picture)) if turn else picture


def _orientation(exif: Callable[[], Image.Exif]) -> int:
    """Return Exif's orientation; 1 (upright) if there is none or it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return exif().get(Base.Orientation, 1)
    except Exception:  # noqa: BLE001  Pillow raises a dozen types on damaged metadata
        return 1


def _loaded(exif: bytes) -> Image.Exif:
    found = Image.Exif()
    found.load(exif)
    return found


def _by_pillow(encoded: bytes | memoryview, channels: int, max_pixels: int) -> Picture:
    image = open_image(io.BytesIO(encoded))
    pixels, size = image.width * image.height, f"{image.width}x{image.height}"
    if pixels > max_pixels:
        raise BadSample(f"{size} is more than {max_pixels} pixels")
    try:
        if _memory(image, channels) > MAX_BYTES:
            raise BadSample(
                f"decoding {size} pixels of mode {image.mode} takes more than {MAX_BYTES >> 20} MiB: resize it"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            converted = _mode(image, "L" if channels == 1 else "RGB")
    except BadSample:
        raise
    except Exception as error:  # as in `open_image`
        raise BadSample(f"undecodable image: {_reason(error)}") from error
    return _upright(to_picture(converted), _turned(image))


def _memory(image: Image.Image, channels: int) -> int:
    """Return about how many bytes decoding takes at most: Pillow's pixels, those of conversions, and two copies.

    A tile of a TIFF may be larger than its image.
    """
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    if image.mode == ("L" if channels == 1 else "RGB") and not _has_alpha(image):
        converted = 2 * channels
    elif image.mode.startswith("I") or image.mode == "F":
        converted = 10
    else:
        converted = max(12 if _has_alpha(image) else 0, (1 if channels == 1 else 4) + 2 * channels)
    stored += 8 if image.format == "WEBP" else 0  # its decoder allocates two canvases
    tags = getattr(image, "tag_v2", {})
    width, height, samples = (int(tags.get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_LENGTH, SAMPLESPERPIXEL))
    tile = width * height * max(samples, 1) * -(-max(tags.get(BITSPERSAMPLE, (8,))) // 8)
    return image.width * image.height * (stored + converted) + tile


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _turned(image: Image.Image) -> int:
    """Return the orientation of an image that its decoder does not apply (a TIFF's decoder does)."""
    known = image.format in ("JPEG", "MPO", "PNG", "WEBP") and "exif" in image.info
    return _orientation(image.getexif) if known else 1


def _reason(error: Exception) -> str:
    """Return the error's first line, without the memory addresses that would make each reason unique."""
    return first_line(error).split(" <")[0][:80]


def _white(image: Image.Image, pixels: NDArray[np.float32]) -> float:
    """Return the value of white of an image of wide numbers, which is that of its type, not of its brightest pixel.

    Raises:
        BadSample: the type has no usual range, or pixels are outside it.
    """
    bits = max(getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (16,)))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 2 ** min(bits, 16) - 1
    if image.mode == "I":
        raise BadSample("pixels of 32 bits or with a sign, which have no usual white: convert them to 8 or 16 bits")
    if not (pixels.min(initial=0) >= -FLOAT_SLACK and pixels.max(initial=0) <= 1 + FLOAT_SLACK):
        raise BadSample("pixels as floats outside 0 to 1: scale them, or convert them to 8 or 16 bits")
    pixels.clip(0, 1, out=pixels)
    return 1.0


def _mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and not _has_alpha(image):
        return image
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.array(image, np.float32)
        pixels *= np.float32(255 / _white(image, pixels))
        image = Image.fromarray(pixels.round(out=pixels).astype(np.uint8))
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow has no other conversion of it
    elif _has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
