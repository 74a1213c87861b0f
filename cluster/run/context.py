"""What one start of a run consists of, for the driver's parts."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.recipe.config import Recipe
from cluster.recipe.preflight import Preflight
from cluster.record.lease import Lease
from cluster.record.run_folder import RunFolder
from cluster.run.console import RunConsole


@dataclass(frozen=True)
class Launch:
    """One start of a run.

    Attributes:
        recipe: of the run.
        folder: of the run.
        preflight: what the checks found.
        console: where lines are printed.
        resume: whether the run continues.
        began: `time.monotonic()` of the start.
        command: what was typed, without ``--resume`` and ``--run``.
        background: does what nobody needs to wait for.
        lease: on the run.
    """

    recipe: Recipe
    folder: RunFolder
    preflight: Preflight
    console: RunConsole
    resume: bool
    began: float
    command: str
    background: ThreadPoolExecutor
    lease: Lease

    @property
    def saved_at(self) -> float | None:
        """When the checkpoint to resume from was saved, in seconds since the epoch; None without one."""
        return self.preflight.checkpoint.created if self.preflight.checkpoint else None
