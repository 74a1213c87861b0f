"""Modalities map raw tensors to inputs, one file each. A new one is a file with a config of `kind` and `build`."""

from typing import TYPE_CHECKING

from perceiver import registry
from perceiver.config import Config

if TYPE_CHECKING:
    InputsConfig = Config
else:
    InputsConfig = registry.union(registry.members(__name__))

__all__ = ["InputsConfig"]
