"""Tasks define targets, loss and metrics, one file each. A new one is a file with a config of `kind` and `build`."""

from typing import TYPE_CHECKING, Any, cast

from perceiver import registry
from perceiver.config import Config
from perceiver.tasks._base import Batch, LossOutput, Task, model_inputs

if TYPE_CHECKING:
    TaskConfig = Config
else:

    def __getattr__(name: str) -> Any:
        # Made on use, since a plug-in that imports this package may be the first to do so.
        if name == "TaskConfig":
            return registry.union(registry.members(__name__))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_task(config: Config, *, classes: int) -> Task:
    """Build the task of a recipe's `task:` section for a data set of `classes` classes."""
    return cast(Any, config).build(classes=classes)


__all__ = ["Batch", "LossOutput", "Task", "TaskConfig", "build_task", "model_inputs"]
