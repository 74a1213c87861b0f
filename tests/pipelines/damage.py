"""Every kind of damage in real data, and every unusual but valid sample, with the expected result.

A sample has an image, a sound, points, a text and a label. A kind of damage replaces one of them. Add a kind by adding
a line: to `BAD` with the reason that the quarantine gives, or to `ODD` with what the model should get.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import soundfile
from PIL import Image

from tests.pipelines.raw import png16

SIDE, RATE, SAMPLES, POINTS = 8, 8000, 80, 16
PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
TONE = (np.sin(np.arange(SAMPLES) / 3) * 12_000).astype(np.int16)


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image file."""
    stream = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(stream, kind, **options)
    return stream.getvalue()


def sound(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """Encode a sound file."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, subtype=subtype, format=kind)
    return stream.getvalue()


def numbered(number: int) -> dict[str, Any]:
    """Return a valid sample with its number in each of its parts."""
    rng = np.random.default_rng(number)
    pixels = PIXELS.copy()
    pixels[0, 0] = number % 256, number // 256, 7
    points = rng.normal(size=(POINTS, 3)).astype("<f4")
    return {
        "key": f"sample/{number:05d}.png",
        "image": encoded(pixels),
        "audio": sound(TONE + number % 100),
        "points": points.tobytes(),
        "text": f"text number {number}",
        "label": number % 4,
    }


BOMB = png16(np.zeros((1, 1, 3)), (60_000, 60_000))
JPEG = encoded(PIXELS, "JPEG", quality=95)
LONG = sound(np.zeros(RATE * 700, np.int16), kind="FLAC")
NOT_A_NUMBER = np.array([[0, np.nan, 1]] * POINTS, "<f4").tobytes()

BAD: Mapping[str, tuple[str, Any, str]] = {
    "truncated JPEG": ("image", JPEG[: len(JPEG) // 2], "undecodable image: Truncated File Read|.*truncated"),
    "truncated PNG": ("image", encoded(PIXELS)[:60], "undecodable image"),
    "0-byte image": ("image", b"", "0 bytes"),
    "no image at all": ("image", None, "0 bytes"),
    "a web page in an image's place": ("image", b"<html>404 not found</html>", "undecodable image: cannot identify"),
    "decompression bomb by its header": ("image", BOMB, "60000x60000 is more than 100000000 pixels|more than"),
    "scrambled JPEG header": ("image", JPEG[:2] + JPEG[200:], "undecodable image"),
    "empty mesh": ("points", b"", "no points"),
    "NaN points": ("points", NOT_A_NUMBER, "NaN or infinite points"),
    "infinite points": ("points", NOT_A_NUMBER.replace(b"\0\0\xc0\x7f", b"\0\0\x80\x7f"), "NaN or infinite points"),
    "half a point": ("points", b"1234567", "7 bytes are not rows"),
    "empty text": ("text", "", "empty text"),
    "no text": ("text", None, "empty text"),
    "invalid UTF-8": ("text", b"caf\xe9", "invalid UTF-8"),
    "text cut inside a character": ("text", "Straße".encode()[:5], "invalid UTF-8"),
    "unknown label": ("label", -1, "label -1 is not one of 4 classes"),
    "label beyond the classes": ("label", 4, "label 4 is not one of 4 classes"),
    "no label": ("label", None, "label None is not one of 4 classes"),
    "0-byte sound": ("audio", b"", "0 bytes"),
    "0-length sound": ("audio", sound(np.zeros(0, np.int16)), "0 seconds of sound"),
    "NaN sound": ("audio", sound(np.full(SAMPLES, np.nan, np.float32), subtype="FLOAT"), "NaN or infinite samples"),
    "truncated sound": ("audio", sound(TONE)[:100], "truncated"),
    "sound longer than the cap": ("audio", LONG, "longer than 600 seconds"),
    "a picture in a sound's place": ("audio", encoded(PIXELS), "undecodable media"),
}
"""Kind: (part, stored value, reason in the quarantine)."""


class Odd(NamedTuple):
    """Something unusual that is read correctly.

    Attributes:
        part: the part of the sample.
        stored: what is stored.
        seen: what the model should get.
        within: largest difference of a value from that.
    """

    part: str
    stored: Any
    seen: Callable[[], np.ndarray]
    within: float = 0


def _gray(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[None], 3, axis=0)


def _chw(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1)


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[274] = 6  # The camera was turned: the picture is upright after a quarter turn clockwise.
    return encoded(np.rot90(PIXELS).copy(), "PNG", exif=exif)


def _with_alpha() -> bytes:
    alpha = np.full((SIDE, SIDE, 1), 255, np.uint8)
    alpha[:2] = 0
    return encoded(np.concatenate([PIXELS, alpha], axis=2))


def _over_white() -> np.ndarray:
    return _chw(np.concatenate([np.full((2, SIDE, 3), 255, np.uint8), PIXELS[2:]]))


SMOOTH = np.linspace(0, 255, SIDE * SIDE).astype(np.uint8).reshape(SIDE, SIDE)
CMYK = Image.fromarray(np.stack([SMOOTH] * 3, axis=2)).convert("CMYK")

ODD: Mapping[str, Odd] = {
    "CMYK JPEG": Odd("image", encoded(CMYK, "JPEG", quality=100), lambda: np.repeat(SMOOTH[None], 3, axis=0), 6),
    "grey image": Odd("image", encoded(np.asarray(Image.fromarray(PIXELS).convert("L"))), lambda: _gray(PIXELS)),
    "alpha": Odd("image", _with_alpha(), _over_white),
    "16-bit grey": Odd("image", encoded(SMOOTH.astype(np.uint16) * 257), lambda: np.repeat(SMOOTH[None], 3, axis=0)),
    "palette": Odd("image", encoded(Image.fromarray(PIXELS).quantize(64)), lambda: _chw(PIXELS), 60),
    "EXIF rotation": Odd("image", _rotated(), lambda: _chw(PIXELS)),
    "wrong extension": Odd("image", encoded(PIXELS, "WEBP", lossless=True), lambda: _chw(PIXELS)),
    "silence": Odd("audio", sound(np.zeros(SAMPLES, np.int16)), lambda: np.zeros(SAMPLES)),
    "stereo": Odd("audio", sound(np.stack([TONE, TONE], axis=1)), lambda: TONE, 1),
    "FLAC named WAV": Odd("audio", sound(TONE, kind="FLAC"), lambda: TONE),
    "another rate": Odd("audio", sound(np.repeat(TONE, 2), 2 * RATE), lambda: TONE, 6000),
    "float sound": Odd("audio", sound((TONE / 32768).astype(np.float32), subtype="FLOAT"), lambda: TONE, 1),
    "a short sound": Odd("audio", sound(TONE[:40]), lambda: np.concatenate([TONE[:40], np.zeros(40)])),
    "few points": Odd(
        "points",
        np.ones((3, 3), "<f4").cumsum(axis=0, dtype="<f4").tobytes(),
        lambda: np.repeat([[-1.0] * 3, [0.0] * 3, [1.0] * 3], [6, 5, 5], axis=0),
        0.12,
    ),
    "other scripts": Odd("text", "日本語 🙂", lambda: np.frombuffer("日本語 🙂".encode(), np.uint8) + 6),
}
