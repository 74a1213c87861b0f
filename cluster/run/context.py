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
        command: the command as typed, without ``--resume`` and ``--run``.
        background: executor for the work that nobody waits for.
        lease: lease of the run.
    """

    recipe: Recipe
    folder: RunFolder
    preflight: Preflight
    console: RunConsole
    resume: bool
    command: str
    background: ThreadPoolExecutor
    lease: Lease

    @property
    def start_step(self) -> int:
        """Step of the checkpoint to resume from; 0 without one."""
        return self.preflight.checkpoint.step if self.preflight.checkpoint else 0

    @property
    def trained(self) -> bool:
        """Whether all steps are done, so that only results may be missing."""
        return self.start_step >= self.preflight.total_steps or bool(self.preflight.early_stop)

    @property
    def change_tag(self) -> dict[str, str]:
        """What has changed since the last start, by the name of its tag in MLflow; empty if nothing has."""
        changes = self.preflight.changes
        return {f"changed.step-{self.start_step:08d}": "\n".join(changes)} if changes else {}

    @property
    def saved_at(self) -> float | None:
        """Time of the checkpoint to resume from, in seconds since the epoch; None without one."""
        return self.preflight.checkpoint.created if self.preflight.checkpoint else None
