"""The hook `step_log`: a line in a file for each of a number of steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from perceiver.config import Config, Count, Location
from perceiver.train.loop import StepInfo


class StepLogConfig(Config):
    """Appends step and loss to a file. A recipe lists this below `hooks:`."""

    kind: Literal["step_log"] = "step_log"
    file: Location = Field(default="step_log.txt", description="The file, a path on the first worker's machine.")
    every: Count = Field(default=10, description="Steps between two lines.")

    def build(self, *, rank: int, world: int) -> Callable[[StepInfo], None]:
        """Build the hook of one of `world` workers; only the first one writes."""
        return StepLog(self, rank)


class StepLog:
    """See `StepLogConfig`. Called on every rank after each step."""

    def __init__(self, config: StepLogConfig, rank: int) -> None:
        self.config, self.first = config, rank == 0

    def __call__(self, info: StepInfo) -> None:
        """Write a line if it is time."""
        if self.first and (info.step % self.config.every == 0 or info.last):
            with Path(self.config.file).open("a", encoding="utf-8") as file:
                file.write(f"{info.step} {info.result.loss:.6f}\n")
