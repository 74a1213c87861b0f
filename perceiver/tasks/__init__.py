"""Targets, loss and metrics: one file each; a new task is a new file with a config that has `kind` and `build`."""

from typing import TYPE_CHECKING, Any, cast

from perceiver import registry
from perceiver.config import Config
from perceiver.tasks._base import Batch, LossOutput, Task, model_inputs

if TYPE_CHECKING:
    TaskConfig = Config
else:
    TaskConfig = registry.union(registry.members(__name__))


def build_task(config: Config, *, classes: int) -> Task:
    """Make the task that a recipe's `task:` describes, for a data set of `classes` classes."""
    return cast(Any, config).build(classes=classes)


__all__ = ["Batch", "LossOutput", "Task", "TaskConfig", "build_task", "model_inputs"]
