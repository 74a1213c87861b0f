"""Perceiver and Perceiver IO: `perceiver.list_models()` names the models, `perceiver.create_model(name)` makes one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver.presets import create_model, list_models

__all__ = ["create_model", "list_models"]


def __getattr__(name: str) -> Any:
    # Imported on use, so that `import perceiver` does not load torch.
    if name in __all__:
        from perceiver import presets

        return getattr(presets, name)
    raise AttributeError(f"module 'perceiver' has no attribute {name!r}")
