"""Perceiver and Perceiver IO: models, and their training on Ray.

Models: `list_models`, `create_model`, `load_model`. Training: `prepare`, `train`, `resume`, `tune`, `evaluate`,
`predict`, `ask`, `export`, `submit`, `build_trainer`. docs/python.md describes them.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.recipe.config import Recipe
    from perceiver.api.asking import Reply, ask
    from perceiver.api.background import BackgroundRun
    from perceiver.api.data import Data, prepare
    from perceiver.api.exports import export
    from perceiver.api.jobs import SubmittedJob, submit
    from perceiver.api.models import Predictions, evaluate, load_model, predict
    from perceiver.api.run_record import Run, RunError
    from perceiver.api.runs import build_trainer, resume, train
    from perceiver.api.searches import SearchError, SearchRun, tune
    from perceiver.config import UserError
    from perceiver.factory import create_model
    from perceiver.presets import list_models

__all__ = [
    "BackgroundRun",
    "Data",
    "Predictions",
    "Recipe",
    "Reply",
    "Run",
    "RunError",
    "SearchError",
    "SearchRun",
    "SubmittedJob",
    "UserError",
    "ask",
    "build_trainer",
    "create_model",
    "evaluate",
    "export",
    "list_models",
    "load_model",
    "predict",
    "prepare",
    "resume",
    "submit",
    "train",
    "tune",
]


HOMES = {
    "BackgroundRun": "perceiver.api.background",
    "Data": "perceiver.api.data",
    "Predictions": "perceiver.api.models",
    "Recipe": "cluster.recipe.config",
    "Reply": "perceiver.api.asking",
    "Run": "perceiver.api.run_record",
    "RunError": "perceiver.api.run_record",
    "SearchError": "perceiver.api.searches",
    "SearchRun": "perceiver.api.searches",
    "SubmittedJob": "perceiver.api.jobs",
    "UserError": "perceiver.config",
    "ask": "perceiver.api.asking",
    "build_trainer": "perceiver.api.runs",
    "create_model": "perceiver.factory",
    "evaluate": "perceiver.api.models",
    "export": "perceiver.api.exports",
    "list_models": "perceiver.presets",
    "load_model": "perceiver.api.models",
    "predict": "perceiver.api.models",
    "prepare": "perceiver.api.data",
    "resume": "perceiver.api.runs",
    "submit": "perceiver.api.jobs",
    "train": "perceiver.api.runs",
    "tune": "perceiver.api.searches",
}
"""The module of each name, imported on use: `import perceiver` loads neither torch nor Ray."""
ALONE = ("UserError", "create_model", "list_models")
"""Names that need none of our other packages, so that modules of a user's may have their names."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        if name not in ALONE:
            import perceiver_train
            from perceiver_train.extras import check

            check(f"perceiver.{name}")
            perceiver_train.pin()  # a script's folder may contain files with the names of our packages
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'perceiver' has no attribute {name!r}")


class _Module(ModuleType):
    def __reduce__(self) -> tuple[Any, ...]:  # cloudpickle knows the type of other modules only
        return importlib.import_module, (self.__name__,)


class _Interface(_Module):
    """The type of this package: its folders `train` and `export` can be called like the functions of these names.

    Python sets the attribute `perceiver.train` to the folder's package as soon as something imports that.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in HOMES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


class _CallablePackage(_Module):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*args, **kwargs)


sys.modules[__name__].__class__ = _Interface
