"""Point clouds: from stored bytes to normalised points, as for ModelNet40 in the Perceiver paper (4.3)."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Config, Factors, Size
from pipelines.transforms import BadSample

Points = NDArray[np.float32]


class PointsViewConfig(Config):
    """The number of points, and their random changes in training."""

    count: Size = Field(default=2048, description="points in a batch; repeated if fewer are stored")
    scale: Factors = Field(default=(0.99, 1.01), description="range of the factor of each point's coordinates")


def decode_points(stored: bytes, columns: int = 3) -> Points:
    """Return points (n, columns) from little-endian float32 bytes.

    Raises:
        BadSample: no points, an incomplete row, NaN or infinity.
    """
    if not stored:
        raise BadSample("no points")
    if len(stored) % (4 * columns):
        raise BadSample(f"{len(stored)} bytes are not rows of {columns} float32")
    points = np.frombuffer(stored, "<f4").reshape(-1, columns)
    if not np.isfinite(points).all():
        raise BadSample("NaN or infinite points")
    return points


def points_of_rows(rows: list[list[float]], features: int = 0) -> Points:
    """Return float32 (n, 3 + features) of lists of numbers; further columns are left out.

    Raises:
        BadSample: no points, too few columns, rows of different lengths, NaN or infinity.
    """
    try:
        values = np.asarray(rows, np.float64)
    except (ValueError, TypeError) as error:
        raise BadSample("rows of different lengths, or no numbers") from error
    if values.ndim != 2 or values.shape[1] < 3 + features:
        raise BadSample(f"an array of {values.shape}, wanted points of {3 + features} columns")
    with np.errstate(over="ignore"):
        return decode_points(np.ascontiguousarray(values[:, : 3 + features], "<f4").tobytes(), 3 + features)


def normalised(points: Points) -> Points:
    """Return points (n, 3) with zero mean, in a cube from -1 to 1."""
    return _in_cube(_centred(points.T.copy())).T


def training_view(points: Points, config: PointsViewConfig, rng: Generator) -> Points:
    """Return a random choice of points: coordinates centred, each scaled at random, normalised.

    If fewer are stored all are shown, as in an evaluation; those that are repeated are chosen at random.

    Args:
        points: (n, 3 + features); the features stay as they are.
        config: the number of points, and the range of the scale.
        rng: of the choice.

    Returns:
        (count, 3 + features).
    """
    rounds, rest = divmod(config.count, len(points))
    chosen = points.take(rng.choice(len(points), rest, replace=False, shuffle=False), axis=0)
    if rounds:
        chosen = np.concatenate([*[points] * rounds, chosen])
    scales = rng.uniform(*config.scale, config.count).astype(np.float32)
    return _with_features(_in_cube(_centred(_centred(chosen[:, :3].T.copy()) * scales)).T, chosen)


def evaluation_view(points: Points, config: PointsViewConfig) -> Points:
    """Return points spread evenly over the stored order, normalised: (count, 3 + features)."""
    chosen = points[np.arange(config.count) * len(points) // config.count % len(points)]
    return _with_features(normalised(chosen[:, :3]), chosen)


def _with_features(coordinates: Points, points: Points) -> Points:
    return coordinates if points.shape[1] == 3 else np.hstack([coordinates, points[:, 3:]])


def _centred(axes: Points) -> Points:
    """Return coordinates (3, n) with zero mean; numpy sums rows of three ten times as slowly."""
    return axes - np.add.reduce(axes, axis=1, keepdims=True) / axes.shape[1]


def _in_cube(axes: Points) -> Points:
    """Return coordinates (3, n) divided by the largest."""
    return axes / max(float(np.abs(axes).max()), 1e-12)
