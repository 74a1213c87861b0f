"""One start of a run, as the parts of the driver share it."""

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
        recipe: the recipe.
        folder: folder of the run.
        preflight: results of the checks.
        console: prints lines.
        resume: whether the run is resumed.
        began: `time.monotonic()` of the start.
        command: the command as typed, without ``--resume`` and ``--run``.
        background: executor for the work that nobody waits for.
        lease: lease of the run.
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
        """Time of the checkpoint to resume from, in seconds since the epoch; None without one."""
        return self.preflight.checkpoint.created if self.preflight.checkpoint else None
