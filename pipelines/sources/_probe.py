"""Size and channels of images, by the headers of a few."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from perceiver.storage import raise_unanswered
from pipelines.features import ImageFeature
from pipelines.sources._common import channels
from pipelines.transforms import BadSample
from pipelines.transforms.decode import open_image, upright_size

PROBE = 32
"""Images whose headers are read."""
GREY = {"1", "L", "LA", "I", "F"}


def image_feature(options: Mapping[str, str], files: Iterable[Callable[[], Any]]) -> ImageFeature:
    """Return the feature of images.

    Its channels are those of the option `channels`, else 1 if all of these images are grey; its size is that of these
    images, or left open if they differ or cannot be read.

    Args:
        options: of the source.
        files: each opens one of some images.
    """
    sizes, modes = set(), set()
    for opened in files:
        try:
            with opened() as stream, open_image(stream) as image:
                sizes.add(upright_size(image))
                modes.add(image.mode.split(";")[0])
        except (OSError, BadSample) as error:
            raise_unanswered(error)
    found = channels(options, "1" if modes <= GREY and modes else "3")
    return ImageFeature(channels=found, size=sizes.pop() if len(sizes) == 1 else None)
