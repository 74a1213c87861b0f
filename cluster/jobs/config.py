"""A job as the user requests it, and the work that it consists of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.recipe.config import Recipe
from cluster.recipe.placement import Node


@dataclass(frozen=True)
class Submission:
    """The user's request; the fields after ``run`` and before ``secrets`` are flags of ``ray job submit``.

    Attributes:
        recipe: local file of a recipe or a search.
        overrides: ``key=value``, as typed.
        run: name of the run, continued if it exists; default: the recipe's name.
        secrets: environment variables that must be set on the cluster; only their names are sent.
        env: environment variables of this machine whose values are sent.
        plugins: packages with plug-ins that the job takes along: folders or wheels.
        install: install the locked dependencies for the job instead of using the cluster's.
        sent: the file exists in the job's package only, since its content came from Python.
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
    plugins: Sequence[str] = ()
    install: bool = False
    sent: bool = False


@dataclass(frozen=True)
class JobSpec:
    """The work of a job: a perceiver command and everything that it reads when it starts.

    Attributes:
        verb: the command.
        recipe: the recipe, overrides applied.
        name: default name of the run.
        tree: all settings that are sent, the recipe's first.
        files: local files that are sent; the command's own is the first.
        fits: raises a UserError if the job does not fit on the given nodes.
        found_by: overrides by which the files find each other in the package.
    """

    verb: str
    recipe: Recipe
    name: str
    tree: Mapping[str, Any]
    files: Sequence[str]
    fits: Callable[[Sequence[Node]], None]
    found_by: Sequence[str] = ()
