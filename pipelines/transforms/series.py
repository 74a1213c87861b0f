"""Series of numbers: from stored bytes to the steps that are shown, with padding at the end."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Config, Size
from pipelines.transforms import BadSample

Steps = NDArray[np.float32]
"""Numbers (length, channels)."""


class SeriesViewConfig(Config):
    """How series are shown to the model."""

    length: Size | None = Field(
        default=None, description="steps in a batch: longer series are cut, shorter ones padded; null: as stored"
    )


def decode_series(stored: bytes, channels: int) -> Steps:
    """Return steps (length, channels) from little-endian float32 bytes.

    Raises:
        BadSample: no steps, an incomplete one, NaN or infinity.
    """
    if not stored:
        raise BadSample("no steps")
    if len(stored) % (4 * channels):
        raise BadSample(f"{len(stored)} bytes are not steps of {channels} float32")
    steps = np.frombuffer(stored, "<f4").reshape(-1, channels)
    if not np.isfinite(steps).all():
        raise BadSample("NaN or infinite numbers")
    return steps


def shown_steps(steps: Steps, length: int, rng: Generator | None) -> Steps:
    """Return `length` steps: of a longer series a random part, or the middle without a generator; zeros at the end."""
    room = len(steps) - length
    if room > 0:
        start = int(rng.integers(room + 1)) if rng else room // 2
        return steps[start : start + length]
    return steps if not room else np.pad(steps, ((0, -room), (0, 0)))
