"""Names of the classes of masks."""

from collections.abc import Mapping

from perceiver.config import UserError
from pipelines.transforms.mask import IGNORED


def mask_classes(options: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the classes that the option `classes` gives, from class 0 on.

    Raises:
        UserError: there are fewer than two or more than 255, or one is named twice.
    """
    names = tuple(options.get("classes", "").split(","))
    if len(names) < 2 or len(names) > IGNORED or len(set(names)) < len(names):
        raise UserError(
            f"option classes={options.get('classes', '')}: masks need the names of their 2 to {IGNORED} classes, from"
            " class 0 on, all different: set --option classes=background,cat,dog"
        )
    return names
