"""Encoded images to pixels: JPEGs by libjpeg-turbo at once, every other format by Pillow."""

import io
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base

from perceiver.storage import first_line
from pipelines.transforms import BadSample

Picture = NDArray[np.uint8]
"""Pixels (H, W, C)."""

MAX_PIXELS = 100_000_000
"""Larger images are refused by their header, before memory is spent on them."""
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
"""What brings a picture upright, by Exif's orientation; 1 is upright."""
SIDEWAYS = (5, 6, 7, 8)
_APP1, _START_OF_SCAN = 0xE1, 0xDA


def decode(encoded: bytes | memoryview, channels: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode to grey (1 channel) or RGB (3), turned upright as its Exif tag says.

    16-bit grey is scaled to 8 bits; alpha is laid over white; CMYK and palettes are converted.

    Returns:
        Pixels (H, W, C) uint8.

    Raises:
        BadSample: empty, truncated, not an image, or larger than `max_pixels`.
    """
    if not encoded:
        raise BadSample("0 bytes")
    picture = _plain_jpeg(encoded, channels, max_pixels)
    return _by_pillow(encoded, channels, max_pixels) if picture is None else picture


def to_image(picture: Picture) -> Image.Image:
    """Pixels (H, W, C) as a Pillow image, mode L or RGB."""
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def to_picture(image: Image.Image) -> Picture:
    """Pixels (H, W, C) of a Pillow image, mode L or RGB; a copy that may be written to."""
    return np.array(image).reshape(image.height, image.width, -1)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image that Pillow has opened, as `decode` gives it."""
    return (image.width, image.height) if _turned(image) in SIDEWAYS else (image.height, image.width)


def _plain_jpeg(encoded: bytes | memoryview, channels: int, max_pixels: int) -> Picture | None:
    """Pixels of a JPEG, the same as Pillow's in six sevenths of the time; None if Pillow should decode it.

    That is: whatever is no JPEG, is damaged (Pillow has the last word on damage), too large, of colours to be
    converted, or described by XMP, which may know an orientation, too.
    """
    if encoded[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        pixels, exif = int(height) * int(width), _exif(encoded)
        grey = colours == "Gray"
        if exif is None or not (grey or channels == 3 and colours in ("YCbCr", "RGB")) or pixels > max_pixels:
            return None
        picture = simplejpeg.decode_jpeg(encoded, "GRAY" if channels == 1 else "RGB")
    except ValueError:
        return None
    return _upright(picture, _orientation(partial(_loaded, exif))) if exif else picture


def _exif(encoded: bytes | memoryview) -> bytes | None:
    """The Exif segment of a JPEG, empty if it has none; None if something else of its kind is there.

    Raises:
        ValueError: the segments do not follow each other.
    """
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
    """The picture as it was seen."""
    turn = _TURNS.get(orientation)
    return np.ascontiguousarray(turn(picture)) if turn else picture


def _orientation(exif: Callable[[], Image.Exif]) -> int:
    """What Exif says; 1 (upright) if it says nothing or cannot be read."""
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
    return _upright(to_picture(_mode(image, "L" if channels == 1 else "RGB")), _turned(image))


def _turned(image: Image.Image) -> int:
    """The orientation of an image whose decoder leaves it as it is stored; a TIFF's turns it."""
    known = image.format in ("JPEG", "MPO", "PNG", "WEBP") and "exif" in image.info
    return _orientation(image.getexif) if known else 1


def _reason(error: Exception) -> str:
    """The error's first line, without the memory addresses that would make each reason unique."""
    return first_line(error).split(" <")[0][:80]


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
