"""Mean and deviation of a modality's values: numbers, or `data` for those that `perceiver prepare` has measured."""

from collections.abc import Sequence
from typing import Literal

from perceiver.config import Scale, Shift, UserError

FromData = Literal["data"]
"""Stands for the statistics of the prepared data; a run replaces it by the numbers before it builds the model."""
Mean = Shift | FromData
Deviation = Scale | FromData
Means = tuple[Shift, ...] | FromData
Deviations = tuple[Scale, ...] | FromData


def numbers(key: str, value: float | Sequence[float] | FromData, channels: int = 1) -> tuple[float, ...]:
    """Return the number of each channel.

    Raises:
        UserError: it is still `data`, or there are more or fewer numbers than channels.
    """
    if isinstance(value, str):
        raise UserError(f"inputs.{key} = data: wanted numbers; `perceiver train` takes them from the prepared data")
    found = (value,) if isinstance(value, int | float) else tuple(value)
    if len(found) != channels:
        raise UserError(
            f"inputs.{key}: got {len(found)} values for {channels} channels; wanted {channels}, one per channel"
        )
    return found
