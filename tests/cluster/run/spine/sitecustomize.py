"""Record the call stacks of a run; Python loads this module in each process that has it on its path.

`SPINE_FOLDER` receives our own frames of the first call of each of `POINTS` in each process.
"""

import functools
import importlib.util
import json
import os
import sys
import threading
import traceback
from collections.abc import Sequence
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
ROOT = Path(__file__).parents[4]


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


class Patch(MetaPathFinder):
    """Wraps the methods of `POINTS` when their modules are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See the base class."""
        if fullname not in POINTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        load, (owner, name) = spec.loader.exec_module, POINTS[fullname]

        def exec_module(module: ModuleType) -> None:
            load(module)
            recorded(getattr(module, owner), name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "SPINE_FOLDER" in os.environ:
    sys.meta_path.insert(0, Patch())
    remember_starters()
