"""What the doctor looks at, and what it says about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.recipe.config import Recipe
from cluster.recipe.resources import SHARED_MEMORY, ClusterConfig
from perceiver.config import UserError
from perceiver.tracking.runs import TrackingConfig

OK, WARN, FAIL = "ok", "warn", "fail"

Result = tuple[str, str, str]
"""State, what was found, and what to do."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        state: ``ok``, ``warn`` (a run may be slow or end early) or ``fail`` (it will not start).
        found: what there is.
        fix: what to do; empty if nothing.
    """

    check: str
    state: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Patient:
    """What is looked at.

    Attributes:
        output: where runs are to be written.
        tracking: MLflow, as the recipe wants it.
        cluster: workers, as the recipe wants them.
        recipe: the recipe itself, if one is given.
        nodes: a function that connects to the cluster of ``--address`` and returns one line about it, or None.
    """

    output: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    recipe: Recipe | None = None
    nodes: Callable[[], str] | None = None
    proc: Path = field(default=Path("/sys/fs/cgroup"))
    shm: Path = field(default=SHARED_MEMORY)

    @property
    def stops(self) -> str:
        """The state of what stops a run here, but perhaps not a job on the cluster that was asked about."""
        return WARN if self.nodes else FAIL


def patient_of(recipe: Recipe | None, nodes: Callable[[], str] | None = None) -> Patient:
    """Return what a recipe's run touches; without a recipe, the defaults."""
    if recipe is None:
        return Patient(nodes=nodes)
    return Patient(recipe.output, recipe.tracking, recipe.cluster, recipe, nodes)


def refusal(state: str, error: UserError) -> Result:
    """Return an error's line as a result: what stands behind its last colon is what to do."""
    text, _, fix = str(error).rpartition(": ")
    return state, text or str(error), fix if text else ""
