"""What there is to see, to hear and to measure of a sample: one small function a kind of feature, found by its name."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.inspect.pieces import Piece, picture
from pipelines.inspect.samples import (
    measure_audio,
    measure_flow,
    measure_media,
    measure_video,
    show_audio,
    show_flow,
    show_media,
    show_video,
)
from pipelines.transforms.decode import Picture, to_image
from pipelines.transforms.points import normalised

POINTS = 2048
CHARACTERS = 600


@dataclass(frozen=True)
class View:
    """How one kind of feature is looked at.

    Attributes:
        show: the pieces of a sample, from what is stored and what was decoded.
        measure: name and value of what is worth a statistic, from what was decoded.
    """

    show: Callable[[Any, Any], list[Piece]]
    measure: Callable[[Any], Mapping[str, float]]


def _show_image(stored: Any, decoded: Picture) -> list[Piece]:
    height, width = decoded.shape[:2]
    return [picture(to_image(decoded), f"{width} × {height}")]


def _measure_image(decoded: Picture) -> Mapping[str, float]:
    height, width = decoded.shape[:2]
    return {"height": height, "width": width}


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
    "audio": View(show_audio, measure_audio),
    "video": View(show_video, measure_video),
    "media": View(show_media, measure_media),
    "flow": View(show_flow, measure_flow),
}
"""By the `kind` of a feature. A kind that is not here has nothing to see: labels are said, not shown."""
