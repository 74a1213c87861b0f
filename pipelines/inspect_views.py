"""What there is to see, to hear and to measure of a sample: one small function a kind of feature, found by its name."""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.transforms.points import normalised

PICTURE = 256
"""Longest side of a picture on the page, in pixels."""
SMALL = 96
"""Pictures of fewer pixels a side are enlarged without smoothing."""
POINTS = 2048
CHARACTERS = 600


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


@dataclass(frozen=True)
class View:
    """How one kind of feature is looked at.

    Attributes:
        show: the pieces of a sample, from what is stored and what was decoded.
        measure: name and value of what is worth a statistic, from what was decoded.
    """

    show: Callable[[Any, Any], list[Piece]]
    measure: Callable[[Any], Mapping[str, float]]


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a `data:` URI of that media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(image: Image.Image, note: str = "", kind: Literal["picture", "strip"] = "picture",
            longest: int = PICTURE) -> Piece:
    """A picture, made smaller if it is large: PNG where small or grey, JPEG where that is much smaller."""
    small = max(image.size) < SMALL
    image = image.copy()
    image.thumbnail((longest, longest))
    sink = io.BytesIO()
    png = small or image.mode != "RGB"
    image.save(sink, "PNG", optimize=True) if png else image.save(sink, "JPEG", quality=85)
    return Piece(kind, data_uri(sink.getvalue(), "image/png" if png else "image/jpeg"), note, pixelated=small)


def _show_image(stored: Any, decoded: Image.Image) -> list[Piece]:
    return [picture(decoded, f"{decoded.width} × {decoded.height}")]


def _measure_image(decoded: Image.Image) -> Mapping[str, float]:
    return {"height": decoded.height, "width": decoded.width}


def _show_text(stored: Any, decoded: str) -> list[Piece]:
    cut = decoded if len(decoded) <= CHARACTERS else decoded[:CHARACTERS] + "…"
    return [Piece("text", cut, f"{len(decoded):,} characters")]


def _measure_text(decoded: str) -> Mapping[str, float]:
    return {"characters": len(decoded), "bytes": len(decoded.encode())}


def _show_points(stored: Any, decoded: NDArray[np.float32]) -> list[Piece]:
    """At most 2,048 points, spread over the stored order, in a cube of -127 to 127."""
    chosen = decoded[np.linspace(0, len(decoded) - 1, min(len(decoded), POINTS)).astype(int), :3]
    coarse = np.round(127 * normalised(chosen)).astype(np.int8)
    return [Piece("points", base64.b64encode(coarse.tobytes()).decode(), f"{len(decoded):,} points")]


def _measure_points(decoded: NDArray[np.float32]) -> Mapping[str, float]:
    extent = decoded[:, :3].max(axis=0) - decoded[:, :3].min(axis=0)
    return {"points": len(decoded), "longest side": float(extent.max())}


VIEWS: Mapping[str, View] = {
    "image": View(_show_image, _measure_image),
    "text": View(_show_text, _measure_text),
    "points": View(_show_points, _measure_points),
}
"""By the `kind` of a feature. A kind that is not here has nothing to see: labels are said, not shown."""
