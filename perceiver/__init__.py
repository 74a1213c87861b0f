"""Perceiver and Perceiver IO: `perceiver.list_models()` names the models, `perceiver.create_model(name)` makes one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver.factory import create_model
    from perceiver.presets import list_models

__all__ = ["create_model", "list_models"]


def __getattr__(name: str) -> Any:
    # Imported on use, so that `import perceiver` does not load torch.
    if name == "list_models":
        from perceiver.presets import list_models

        return list_models
    if name == "create_model":
        from perceiver.factory import create_model

        return create_model
    raise AttributeError(f"module 'perceiver' has no attribute {name!r}")
