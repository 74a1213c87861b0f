"""Perceiver and Perceiver IO models and their training.

`perceiver.list_models()` lists the presets, `perceiver.create_model(name)` builds one with initial weights, and
`perceiver.load_model(place)` builds one with the weights of a run, a checkpoint or a file.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver.export.weights import load_model
    from perceiver.factory import create_model
    from perceiver.presets import list_models

__all__ = ["create_model", "list_models", "load_model"]

_HOMES = {"create_model": "factory", "list_models": "presets", "load_model": "export.weights"}


def __getattr__(name: str) -> Any:
    # Imported on use, so that `import perceiver` does not load torch.
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(f"perceiver.{_HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            from perceiver_train.extras import lacks

            raise ImportError(lacks(f"perceiver.{name}", error) or str(error), name=error.name) from error
    raise AttributeError(f"module 'perceiver' has no attribute {name!r}")
