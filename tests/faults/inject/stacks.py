"""Record the call stacks of a run; `sitecustomize` imports this module in each process of it.

`SPINE_FOLDER` receives our own frames of the first call of each of `POINTS` in each process. `SPINE_UNBUILT` names
operators of DeepSpeed that it shall not compile.
"""

import functools
import importlib.util
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

POINTS = {
    "ray.train.v2.api.data_parallel_trainer": ("DataParallelTrainer", "fit"),
    "deepspeed.runtime.engine": ("DeepSpeedEngine", "step"),
    "perceiver.train.checkpoint.store": ("CheckpointStore", "commit"),
}
ROOT = Path(__file__).parents[3]


def own_frames() -> list[str]:
    """Return our frames of this thread, oldest first, after those of the thread that started it, if known."""
    starter = getattr(threading.current_thread(), "spine", [])
    names = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
    tops = [ROOT / top for top in ("perceiver", "pipelines", "cluster", "tune")]
    here = [f"{path.relative_to(ROOT)}:{name}" for path, name in names if any(path.is_relative_to(t) for t in tops)]
    return starter + here


def remember_starters() -> None:
    """Make each thread store our frames of the thread that started it."""
    start = threading.Thread.start

    def remembering(thread: threading.Thread) -> None:
        thread.spine = own_frames()  # type: ignore[attr-defined]
        start(thread)

    threading.Thread.start = remembering  # type: ignore[method-assign]


def recorded(owner: Any, name: str) -> None:
    """Wrap a method so that its first call is recorded."""
    method = getattr(owner, name)
    file = Path(os.environ["SPINE_FOLDER"], f"{name}-{os.getpid()}.json")

    @functools.wraps(method)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        if not file.exists():
            file.write_text(json.dumps(own_frames()))
        return method(*arguments, **options)

    setattr(owner, name, wrapper)


def recorded_points(module: ModuleType) -> None:
    """Wrap the method of `POINTS` in its module."""
    owner, name = POINTS[module.__name__]
    recorded(getattr(module, owner), name)


def unbuilt(module: ModuleType) -> None:
    """Let DeepSpeed take operators for incompatible with this machine."""
    module.__compatible_ops__ = dict.fromkeys(os.environ["SPINE_UNBUILT"].split(","), False)  # type: ignore[attr-defined]


class Patch(MetaPathFinder):
    """Changes modules when they are loaded.

    Args:
        changes: a function of each module, by its name.
    """

    def __init__(self, changes: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self.changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See the base class."""
        if fullname not in self.changes:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.changes[fullname](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Patch({"deepspeed.ops": unbuilt}))
sys.meta_path.insert(0, Patch(dict.fromkeys(POINTS, recorded_points)))
remember_starters()
