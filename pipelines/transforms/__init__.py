"""Functions on one sample: decoding, augmentation, views. No Ray; torch only to resize; randomness is an argument."""

import math


class BadSample(Exception):
    """An unusable sample; the message is a short reason without the sample's name."""


def check_range(name: str, limits: tuple[float, float], most: float = math.inf) -> None:
    """Raise `ValueError` unless 0 < low <= high <= `most`, for the limits (low, high) of a random factor."""
    if not 0 < limits[0] <= limits[1] <= most:
        upper = "" if most == math.inf else f" <= {most:g}"
        raise ValueError(f"{name} {list(limits)}: wanted [low, high] with 0 < low <= high{upper}")
