"""What was measured on a machine for a recipe, kept in a file beside the compiled kernels."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from cluster.recipe.config import Recipe
from perceiver.config import Config
from perceiver.storage import cache_folder


class Timing(Config):
    """Seconds of a training pass on each of some processes that run side by side."""

    processes: PositiveInt = Field(description="workers on the machine")
    micro_batch: PositiveInt = Field(description="samples of a pass")
    seconds: PositiveFloat = Field(description="median of a step with the optimizer, without exchange of gradients")
    bytes: float = Field(ge=0, description="peak memory of a step: weights, optimizer and all that passes through")
    base_bytes: PositiveFloat = Field(
        description="memory of such a process before it builds a model, less what it shares with those beside it"
    )
    surroundings: float = Field(
        default=1.0,
        ge=1,
        description="how much longer a step takes in a run by Ray than by itself: what Ray's own "
        "processes, data tasks and waiting for each other cost",
    )


class Calibration(Config):
    """Measured on one machine with one recipe."""

    device: str = Field(description="name of the device, or cpu")
    cores: PositiveInt = Field(description="CPU cores of the machine")
    timings: tuple[Timing, ...] = Field(min_length=2, description="of the training pass")
    sample_cpu_seconds: PositiveFloat = Field(description="CPU time to read, decode and augment a sample")
    exchange_latency: float = Field(ge=0, description="seconds of an exchange of nothing between the processes")
    exchange_bytes_s: PositiveFloat = Field(description="bytes a second a process sends in an exchange")
    save_bytes_s: PositiveFloat = Field(description="bytes a second written to the output folder")

    def compute_seconds(self, micro: int, processes: int) -> float:
        """Seconds of a training pass of `micro` samples on each of `processes` side by side.

        Linear in the samples through the two measured sizes; other numbers of processes than the measured ones by
        the cores that each would get.
        """
        small, large = self._measured(processes)
        each = (large.seconds - small.seconds) / max(1, large.micro_batch - small.micro_batch)
        seconds = max(large.seconds + each * (micro - large.micro_batch), 0.2 * small.seconds)
        return seconds * (processes / large.processes if processes > large.processes else 1.0)

    def step_seconds(self, batch: int, micro: int, accumulation: int, processes: int, nodes: int = 1) -> float:
        """Seconds of a step by itself: passes and optimizer, and the data tasks' share of the cores.

        Where data tasks share the cores with the workers, each second of theirs is one that a worker does not get.
        """
        passes = accumulation * self.compute_seconds(micro, processes // nodes)
        return passes + batch * self.sample_cpu_seconds / self.cores / nodes

    def passing_bytes(self, micro: int, processes: int, state_bytes: Callable[[int], float]) -> float:
        """Memory that passes through a step of `micro` samples on each of `processes` side by side, beside the state.

        Linear in the samples through the two measured sizes: a part of it does not depend on them.

        Args:
            micro: samples of a pass.
            processes: on the machine.
            state_bytes: what weights, gradients and optimizer take by the number of workers.
        """
        small, large = self._measured(processes)
        each = max(0.0, large.bytes - small.bytes) / max(1, large.micro_batch - small.micro_batch)
        return max(0.0, large.bytes - state_bytes(large.processes) + each * (micro - large.micro_batch))

    def surroundings(self, processes: int) -> float:
        """How much longer a step takes in a run by Ray, with so many workers on a machine, than by itself."""
        return self._measured(processes)[1].surroundings

    def base_bytes(self, processes: int) -> float:
        """Memory of one of so many workers on a machine before it builds a model, shared with no other."""
        return self._measured(processes)[1].base_bytes

    def _measured(self, processes: int) -> tuple[Timing, Timing]:
        """The smallest and the largest step on the nearest number of processes."""
        nearest = min({timing.processes for timing in self.timings}, key=lambda count: (abs(count - processes), count))
        here = sorted((t for t in self.timings if t.processes == nearest), key=lambda t: t.micro_batch)
        return here[0], here[-1]


def calibration_file(recipe: Recipe) -> Path:
    """Where a recipe's calibration is kept: by what changes its speed, not by its length or name."""
    parts: dict[str, Any] = dict.fromkeys(("model", "task", "optim", "data", "deepspeed"), True)
    facts = recipe.model_dump(mode="json", include={**parts, "train": {"precision"}})
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder("calibrations", f"{name}.json")


def load_calibration(recipe: Recipe, device: str) -> Calibration | None:
    """This machine's calibration for a recipe, if there is one for a device whose name contains `device`."""
    try:
        found = Calibration.model_validate_json(calibration_file(recipe).read_text())
    except (FileNotFoundError, ValidationError):
        return None
    return found if matches(device, found.device) else None


def matches(device: str, name: str) -> bool:
    """Whether a machine's device of this name is the table's `device` (its key `match`)."""
    return device.lower() in name.lower()
