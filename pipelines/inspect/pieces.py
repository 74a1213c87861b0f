"""What the page of `perceiver inspect` is made of: pictures, sounds, videos, points and texts as plain strings."""

import base64
import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

PICTURE = 256
"""Longest side of a picture on the page, in pixels."""
SMALL = 96
"""Pictures of fewer pixels a side are enlarged without smoothing."""


@dataclass(frozen=True)
class Piece:
    """One thing to look at or to listen to.

    Attributes:
        kind: how the page shows it.
        content: a data URI; the text itself; for points base64 of int8 x, y, z.
        note: said below it.
        pixelated: enlarge a picture without smoothing.
    """

    kind: Literal["picture", "strip", "audio", "video", "points", "text"]
    content: str
    note: str = ""
    pixelated: bool = False


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a `data:` URI of that media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(
    image: Image.Image, note: str = "", kind: Literal["picture", "strip"] = "picture", longest: int = PICTURE
) -> Piece:
    """A picture, made smaller if it is large: PNG where small or grey, JPEG where that is much smaller."""
    small = max(image.size) < SMALL
    image = image.copy()
    image.thumbnail((longest, longest))
    sink = io.BytesIO()
    png = small or image.mode != "RGB"
    image.save(sink, "PNG", optimize=True) if png else image.save(sink, "JPEG", quality=85)
    return Piece(kind, data_uri(sink.getvalue(), "image/png" if png else "image/jpeg"), note, pixelated=small)
