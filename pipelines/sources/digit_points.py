"""Handwritten digits as 3-D point clouds: points on the ink, with its darkness as their height."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from pipelines.features import LabelFeature, PointsFeature
from pipelines.sources import Listing, Sample, Unit, digits, refuse_options

POINTS = 512


def lift(image: np.ndarray, number: int) -> np.ndarray:
    """Return points (512, 3) float32 of an image (H, W) uint8: x right and y up in -1..1, height in 0..1.

    Pixels are drawn by their darkness, and points at random within them; the number of the sample is the seed.
    """
    rng = np.random.default_rng(number)
    ink = image.astype(np.float64).ravel()
    chosen = rng.choice(ink.size, POINTS, p=ink / ink.sum())
    row, column = np.divmod(chosen, image.shape[1])
    place = np.stack([column, row], axis=1) + rng.random((POINTS, 2))
    flat = 2 * place / [image.shape[1], image.shape[0]] - 1
    return np.stack([flat[:, 0], -flat[:, 1], ink[chosen] / 255], axis=1).astype("<f4")


class DigitPoints(digits.Digits):
    """The source: the samples and splits of `digits`, as 512 points each."""

    title = "the 5,000 digits as clouds of 512 points in 3-D"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the digits; `src` is a copy of the package's file, downloaded if None."""
        refuse_options(options)
        listing = super().listing(src, seed=seed, shard_rows=shard_rows, options=options)
        return replace(listing, name="digit_points", features={"points": PointsFeature(), "label": LabelFeature()})

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Lift the unit's digits."""
        images, labels = digits.unit_archive(unit)
        for row in unit.content["rows"]:
            yield {"key": f"mnist_5k/{row}", "points": lift(images[row], row).tobytes(), "label": int(labels[row])}


source = DigitPoints()
