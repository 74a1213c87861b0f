"""Boxes in an image."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import UserError
from perceiver.storage import NonNegativeCount
from pipelines.features.base import BaseFeature, Shapes, ViewConfig
from pipelines.transforms import BadSample
from pipelines.transforms.image import Placement

SLACK = 1.0
"""Pixels by which a box may exceed its image, since annotations are rounded; it is cut there."""

Corners = NDArray[np.float64]
"""Boxes (R, 4): left, top, right, bottom in pixels of the stored image."""


class BoxesFeature(BaseFeature):
    """Any number of boxes per sample, stored as [x, y, width, height] in pixels of the stored image.

    In a batch float32 (R, 4) cx, cy, w, h as shares of the image as shown, `<name>_mask` bool (R,), True where there is
    a box, and `<name>_count` int64 (): their number, -1 where null is stored, for samples that are not about boxes.
    Boxes are resized, cropped, mirrored and moved together with the image. Those whose centre is then outside are left
    out, which changes the count.
    """

    arrow: ClassVar[pa.DataType] = pa.list_(pa.list_(pa.float32()))
    kind: Literal["boxes"] = "boxes"
    image: str = Field(default="image", description="name of the image that they are in")
    most: NonNegativeCount | None = Field(default=None, description="most boxes of a sample; null: not known")
    located: tuple[NonNegativeCount, ...] = Field(
        default=(),
        description="classes of `label`, by index, whose samples must have boxes, if only an empty list",
    )

    @property
    def follows(self) -> str:
        """The name of its image."""
        return self.image

    def plain(self) -> Self:
        """Return the feature without what is measured on the data."""
        return self.model_copy(update={"most": None})

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (R, 4) float32, (R,) bool and () int64, R = data.boxes."""
        if (self.most or 0) > view.boxes:
            raise UserError(
                f"data.boxes = {view.boxes}, but samples have up to {self.most} boxes: set data.boxes to it"
            )
        if view.augment.rand_augment:
            raise UserError("data.augment.rand_augment moves pixels without their boxes: remove it")
        return {
            name: ((view.boxes, 4), np.float32),
            f"{name}_mask": ((view.boxes,), np.bool_),
            f"{name}_count": ((), np.int64),
        }

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the corners (R, 4) of the boxes; None where none are stored."""
        return None if stored is None else decode_boxes(stored, view.boxes)

    def show_with(
        self, name: str, decoded: Any, view: ViewConfig, place: Placement, sample: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return the boxes in the image's view, padded, with mask and count."""
        if decoded is None and sample.get("label") in self.located:
            raise BadSample("no boxes, wanted a list of them, or an empty list, for this class")
        boxes, count = np.zeros((view.boxes, 4), np.float32), -1
        if decoded is not None:
            shown = placed_boxes(inside(decoded, place.picture), place)
            count = len(shown)
            boxes[:count] = shown
        return {name: boxes, f"{name}_mask": np.arange(view.boxes) < count, f"{name}_count": count}


def decode_boxes(stored: Any, most: int) -> Corners:
    """Return stored boxes [x, y, width, height] as corners.

    Raises:
        BadSample: not a list of four numbers each, more than `most`, a number that is NaN, infinite or null, or a box
            without area or left of or above the image.
    """
    rows = list(stored)
    if len(rows) > most:
        raise BadSample(f"{len(rows)} boxes, wanted up to data.boxes = {most}")
    for row in rows:
        if row is None or len(row) != 4:
            raise BadSample(f"a box of {0 if row is None else len(row)} numbers, wanted x, y, width, height")
        if any(value is None or not math.isfinite(value) for value in row):
            raise BadSample("a box with NaN, infinity or null")
        x, y, width, height = row
        if min(width, height) <= 0:
            raise BadSample(f"a box of {width:g}x{height:g} pixels: wanted a width and a height above 0")
        if min(x, y) < -SLACK:
            raise BadSample(f"a box at {x:g}, {y:g}, outside of the image")
    found = np.array(rows, np.float64).reshape(-1, 4)
    return np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], axis=1)


def inside(boxes: Corners, picture: tuple[int, int]) -> Corners:
    """Return boxes cut at the border of their image of (height, width).

    Raises:
        BadSample: one exceeds it by more than a pixel, or is outside.
    """
    height, width = picture
    ends = np.array([width, height])
    beyond = (boxes[:, 2:] > ends + SLACK).any(1)
    cut = np.concatenate([boxes[:, :2].clip(0), np.minimum(boxes[:, 2:], ends)], axis=1)
    for number in np.flatnonzero(beyond | (cut[:, 2:] <= cut[:, :2]).any(1))[:1]:
        left, top, right, bottom = boxes[number]
        raise BadSample(
            f"a box from {left:g}, {top:g} to {right:g}, {bottom:g}, outside of the image of {width}x{height}"
        )
    return cut


def placed_boxes(boxes: Corners, place: Placement) -> NDArray[np.float32]:
    """Return boxes as a view shows them: (n, 4) cx, cy, w, h as shares of its width and height.

    Boxes whose centre the view does not show are left out; the others are cut at its border, first after the crop and
    then after `Placement.affine`. A box that is turned or sheared becomes the smallest upright box around it.
    """
    left, top, right, bottom = place.box
    height, width = place.size
    scale = np.tile((width / (right - left), height / (bottom - top)), 2)
    found = (boxes - (left, top, left, top)) * scale
    if place.flip:
        found = np.stack([width - found[:, 2], found[:, 1], width - found[:, 0], found[:, 3]], axis=1)
    found = _shown(found, width, height)
    if place.affine:
        a, b, c, d, e, f = place.affine
        forward = np.linalg.inv(np.array([[a, b], [d, e]])).T
        points = found[:, [[0, 1], [0, 3], [2, 1], [2, 3]]]
        moved = (points - (c, f)) @ forward
        found = _shown(np.concatenate([moved.min(1), moved.max(1)], axis=1), width, height)
    low, high, size = found[:, :2], found[:, 2:], np.tile((width, height), 2)
    return (np.concatenate([(low + high) / 2, high - low], axis=1) / size).astype(np.float32)


def _shown(boxes: Corners, width: int, height: int) -> Corners:
    """Return the boxes whose centre is in a view, cut at its border."""
    centre, ends = (boxes[:, :2] + boxes[:, 2:]) / 2, (width, height)
    return boxes[((centre >= 0) & (centre < ends)).all(1)].clip(0, ends * 2)
