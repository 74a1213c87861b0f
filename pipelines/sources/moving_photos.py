"""Synthetic motion of real photographs, for examples of optical flow: the two pictures in scikit-learn.

The first frame is a piece of a photograph; the second is the view of a camera that shifted, turned and zoomed a little.
So the flow is an affine map of the position, known exactly. Test pieces come from the right quarter of each photograph,
which training never sees.
"""

import importlib.metadata
import io
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from perceiver.config import UserError
from pipelines.features.flow import FlowFeature
from pipelines.sources import Listing, Sample, Unit, refuse_options
from pipelines.sources._common import item_seed, number, shuffled_units
from pipelines.transforms.optical_flow import FLO_MAGIC, pack

PHOTOS = ("china.jpg", "flower.jpg")
SIZE = (24, 32)
SHIFT, TURN, ZOOM = 2.0, 2.0, 0.03
"""Largest motion of the camera in pixels, degrees and relative size, uniform."""
MARGIN = 12
"""Pixels around a piece that the second frame may show."""
HELD_OUT = 0.25


def photo_path(name: str) -> Path:
    """Return where scikit-learn keeps a photograph."""
    try:
        return Path(str(importlib.metadata.distribution("scikit-learn").locate_file(f"sklearn/datasets/images/{name}")))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "source moving_photos needs the pictures of scikit-learn: install it, or give a folder with"
            f" {' and '.join(PHOTOS)} as SRC"
        ) from None


def moved(photo: Image.Image, seed: int, part: tuple[float, float]) -> tuple[Image.Image, Image.Image, np.ndarray]:
    """Return a random piece of a photograph, the same after a random motion, and the flow (H, W, 2) between them.

    Args:
        photo: RGB.
        seed: of place and motion.
        part: the share of the photograph's width to take pieces from, [from, to).
    """
    rng, (height, width) = np.random.default_rng(seed), SIZE
    left = int(rng.integers(round(part[0] * photo.width) + MARGIN, round(part[1] * photo.width) - width - MARGIN + 1))
    top = int(rng.integers(MARGIN, photo.height - height - MARGIN + 1))
    shift, angle = rng.uniform(-SHIFT, SHIFT, 2), math.radians(rng.uniform(-TURN, TURN))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn * (1 + rng.uniform(-ZOOM, ZOOM))
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    place = np.stack([columns, rows], axis=2) - middle
    flow = (place @ matrix.T + shift - place).astype(np.float32)
    # Pillow takes the inverse map: from a pixel's corner in the second frame to the photograph.
    back = np.linalg.inv(matrix)
    offset = np.array([left, top]) + middle + 0.5 - back @ (middle + 0.5 + shift)
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    second = photo.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return photo.crop((left, top, left + width, top + height)), second, flow


class MovingPhotos:
    """The source. Options: `pairs` (to train on, 2,000), `held_out` (to test on, 200)."""

    title = "synthetic motion of two real photographs (in scikit-learn), with its optical flow"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the pairs to make; `src` is a folder with the two pictures, those of scikit-learn if None."""
        refuse_options(options, ("pairs", "held_out"))
        for name in PHOTOS:
            if not _path(src, name).is_file():
                raise UserError(f"no file {_path(src, name)}: wanted {' and '.join(PHOTOS)}")
        counts = {"train": number(options, "pairs", 2000), "test": number(options, "held_out", 200)}
        rows = {split: range(count) for split, count in counts.items()}
        units = shuffled_units(rows, random.Random(seed), shard_rows, src=src, seed=seed)
        licence = "photographs by danielbuechele and vultilion (Flickr), CC BY 2.0"
        origin = "scikit-learn, sklearn/datasets/images; the motion is synthetic"
        return Listing("moving_photos", {"flow": FlowFeature(size=SIZE)}, (), licence, origin, units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Make the unit's pairs."""
        photos = [Image.open(_path(unit.content["src"], name)).convert("RGB") for name in PHOTOS]
        part = (0.0, 1 - HELD_OUT) if unit.split == "train" else (1 - HELD_OUT, 1.0)
        for row in unit.content["items"]:
            key = f"{unit.split}/{PHOTOS[row % 2]}/{row}"
            first, second, flow = moved(photos[row % 2], item_seed(unit.content["seed"], key), part)
            yield {"key": key, "flow": pack([_png(first), _png(second), flo(flow)], "flo")}


def flo(flow: np.ndarray) -> bytes:
    """Return flow (H, W, 2) as a Middlebury .flo file."""
    size = np.array([flow.shape[1], flow.shape[0]], "<i4").tobytes()
    return FLO_MAGIC + size + np.ascontiguousarray(flow, "<f4").tobytes()


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _path(src: str | None, name: str) -> Path:
    return Path(src) / name if src else photo_path(name)


source = MovingPhotos()
