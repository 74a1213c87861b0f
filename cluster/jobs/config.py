"""What a user asks of a job, and what the job then does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.recipe.config import Recipe
from cluster.recipe.placement import Node


@dataclass(frozen=True)
class Submission:
    """What the user asks for; the fields after ``run`` are the flags of ``ray job submit``.

    Attributes:
        recipe: file of this machine: a recipe, or a search.
        overrides: ``key=value``, as typed.
        run: name of the run, continued if it exists; default: the recipe's name.
        secrets: environment variables that the cluster must hold; only their names travel.
        env: environment variables of this machine whose values travel.
        install: install the locked dependencies for the job instead of taking the cluster's.
    """

    recipe: str
    overrides: Sequence[str] = ()
    run: str | None = None
    submission_id: str | None = None
    runtime_env_json: str | None = None
    working_dir: str | None = None
    metadata_json: str | None = None
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    entrypoint_resources: Mapping[str, float] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    env: Sequence[str] = ()
    install: bool = False


@dataclass(frozen=True)
class JobSpec:
    """What a job does: a perceiver command, and all that it reads when it starts.

    Attributes:
        verb: the command.
        recipe: what it trains, overrides applied.
        name: of the run, unless the user gives one.
        tree: every setting that travels, the recipe's first.
        files: those of this machine that travel; the command's own is the first.
        fits: refuses a cluster, given its nodes, that cannot hold it.
        found_by: overrides by which the files find each other in the package.
    """

    verb: str
    recipe: Recipe
    name: str
    tree: Mapping[str, Any]
    files: Sequence[str]
    fits: Callable[[Sequence[Node]], None]
    found_by: Sequence[str] = ()
