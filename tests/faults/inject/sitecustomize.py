"""Python loads this module in each process of a run that has it on its path: steps fail or are slowed down.

`FAULT_INJECT` names a JSON file ``{"kind": "nan" | "spike" | "raise" | "barrier", "step": 12, "rank": 0}``: that
step of that rank is harmed, once; who takes it renames it. `FAULT_STEP_S` are seconds that each step of a run waits, so
that it lasts for some time; steps that are measured by themselves do not.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PLAN = os.environ.get("FAULT_INJECT", "")
STEP_S = float(os.environ.get("FAULT_STEP_S", "0"))
POISON = {"nan": float("nan"), "spike": 1e12}
MODULE, RUN = "perceiver.train.engine.deepspeed_engine", "perceiver.train.loop"


class Patch(MetaPathFinder):
    """Wraps the engine when its module is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See the base class."""
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            harm_steps(module.DeepSpeedEngine)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def harm_steps(engine: Any) -> None:
    """Wrap the step of an engine class."""
    undisturbed = engine.step

    def step(self: Any, micro_batches: Any, number: int) -> Any:
        if sys._getframe(1).f_globals["__name__"] == RUN:
            time.sleep(STEP_S)
        kind = taken(self.rank, number + 1)
        if kind == "raise":
            raise RuntimeError("an exception planted by the fault tests")
        if kind == "barrier":  # the other ranks do not call it
            sys.modules["torch"].distributed.barrier()
        if kind not in POISON:
            return undisturbed(self, micro_batches, number)
        task, self._task = self._task, Poisoned(self._task, POISON[kind])
        try:
            return undisturbed(self, micro_batches, number)
        finally:
            self._task = task

    engine.step = step


class Poisoned:
    """A task whose loss is multiplied by a factor."""

    def __init__(self, task: Any, factor: float) -> None:
        self._task, self._factor = task, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, module: Any, batch: Any) -> Any:
        """Return the task's output with another loss, and so other gradients."""
        output = self._task.loss(module, batch)
        return dataclasses.replace(output, loss_sum=output.loss_sum * self._factor)


def taken(rank: int, step: int) -> str | None:
    """Return the fault planned for this step of this rank; only the first caller gets it."""
    try:
        with open(PLAN) as file:  # noqa: PTH123  pathlib would be imported in every process
            plan = json.load(file)
        if (plan["rank"], plan["step"]) != (rank, step):
            return None
        os.rename(PLAN, PLAN + ".taken")  # noqa: PTH104
    except FileNotFoundError:
        return None
    return plan["kind"]


if PLAN or STEP_S:
    sys.meta_path.insert(0, Patch())
if "SPINE_FOLDER" in os.environ:
    import stacks  # noqa: F401
