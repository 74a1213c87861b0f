"""Functions on one sample: decoding, augmentation, views. No Ray; torch to resize; randomness is passed in."""

import math


class BadSample(Exception):
    """A sample that cannot be used; the message is a short reason without the sample's name."""


def check_range(name: str, limits: tuple[float, float], most: float = math.inf) -> None:
    """Refuse the limits of a random factor that are not positive, out of order or above `most`.

    Raises:
        ValueError: so.
    """
    if not 0 < limits[0] <= limits[1] <= most:
        upper = "" if most == math.inf else f" <= {most:g}"
        raise ValueError(f"{name} {list(limits)}: wanted [low, high] with 0 < low <= high{upper}")
