"""Tasks define targets, loss and metrics, one file each. A new one is a file with a config of `kind` and `build`."""

from typing import TYPE_CHECKING, Any, cast

from perceiver import registry
from perceiver.config import Config
from perceiver.tasks._base import Batch, LossOutput, Task, model_inputs
from perceiver.tasks._scales import Targets, TaskTarget, label_key
from perceiver.tasks._weights import balanced, balanced_positives

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


def output_count(config: Config, classes: int) -> int:
    """Return the number of outputs of a classifier or regressor: of a task that knows it, else the data's classes."""
    return int(getattr(config, "outputs", classes))


def known_classes(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes of each task that predicts a class, of a multitask that took them from data."""
    targets = getattr(config, "targets", None)
    return {name: t.classes for name, t in targets.items() if t.classes} if isinstance(targets, dict) else {}


def known_targets(task: Task, batch: Batch) -> Batch:
    """Return the true values that predictions are written with: the task's `known`, else `label` if there is one."""
    known = getattr(task, "known", None)
    if known is not None:
        return known(batch)
    return {"label": batch["label"]} if "label" in batch else {}


__all__ = [
    "Batch",
    "LossOutput",
    "Targets",
    "Task",
    "TaskConfig",
    "TaskTarget",
    "balanced",
    "balanced_positives",
    "build_task",
    "known_classes",
    "known_targets",
    "label_key",
    "model_inputs",
    "output_count",
]
