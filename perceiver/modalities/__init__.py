"""Raw tensors -> inputs: one file each; a new modality is a new file with a config that has `kind` and `build`."""

from typing import TYPE_CHECKING

from perceiver import registry
from perceiver.config import Config

if TYPE_CHECKING:
    InputsConfig = Config
else:
    InputsConfig = registry.union(registry.members(__name__))

__all__ = ["InputsConfig"]
