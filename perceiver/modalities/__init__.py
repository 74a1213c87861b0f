"""Modalities map raw tensors to inputs, one file each. A new one is a file with a config of `kind` and `build`."""

from typing import TYPE_CHECKING, Any

from perceiver import registry
from perceiver.config import Config

if TYPE_CHECKING:
    InputsConfig = Config
else:

    def __getattr__(name: str) -> Any:
        # Made on use, since a plug-in that imports this package may be the first to do so.
        if name == "InputsConfig":
            return registry.union(registry.members(__name__))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["InputsConfig"]
