"""Finds modalities, tasks and baselines. To add one, add a file with a config class that has `kind` and `build`."""

import importlib
import pkgutil
from functools import cache
from typing import Annotated, Any, Union

from pydantic import Field

from perceiver.config import Config


@cache
def members(package: str) -> dict[str, type[Config]]:
    """Return the config classes of a package's modules by kind.

    A class counts if it is defined in the module, has a field `kind` with a default, and a method `build`.
    """
    found: dict[str, type[Config]] = {}
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        for item in vars(module).values():
            own = isinstance(item, type) and issubclass(item, Config) and item.__module__ == module.__name__
            if own and hasattr(item, "build") and "kind" in item.model_fields:
                found[item.model_fields["kind"].default] = item
    return found


def union(*groups: dict[str, type[Config]]) -> Any:
    """Return the pydantic union of config classes, discriminated by `kind`."""
    classes = tuple(cls for group in groups for cls in group.values())
    return classes[0] if len(classes) == 1 else Annotated[Union[classes], Field(discriminator="kind")]  # noqa: UP007
