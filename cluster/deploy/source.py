"""The recipe that files are rendered for, with its overrides, and the commands that train it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.deploy.settings import Settings, placement_overrides
from cluster.jobs.config import Submission
from cluster.jobs.secrets import check_secrets, needed
from cluster.jobs.submit import training
from cluster.recipe.config import Recipe
from perceiver.train.engine.deepspeed_config import read_config


@dataclass(frozen=True)
class Source:
    """A recipe as the user names it.

    Attributes:
        recipe: the recipe, overrides applied.
        file: its file on this machine.
        overrides: ``key=value``, as typed; every rendered command repeats them.
        needs: environment variables that the recipe names, which the cluster must hold.
    """

    recipe: Recipe
    file: str
    overrides: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def read_source(file: str, overrides: Sequence[str] = ()) -> Source:
    """Read a recipe to render files for.

    Raises:
        UserError: a mistake in the recipe, or a secret by value, which the files would show.
    """
    wanted = Submission(recipe=file, overrides=tuple(overrides))
    work = training(wanted)
    check_secrets(work.tree, wanted, {})
    return Source(work.recipe, file, tuple(overrides), tuple(needed(work.tree, wanted)))


def job_command(source: Source, file: str, overrides: Sequence[str]) -> str:
    """Return the shell command that starts the run on the cluster, or resumes it.

    Args:
        source: the recipe.
        file: its file there.
        overrides: all of them.
    """
    words = ["python", "-m", "cluster.jobs.entrypoint", "--run", source.recipe.name, "--output", source.recipe.output]
    words += ["--needs", ",".join(source.needs)] if source.needs else []
    return shlex.join([*words, "train", file, *overrides])


def submit_command(source: Source, overrides: Sequence[str]) -> str:
    """Return the shell command that submits the recipe to a cluster whose dashboard is reached at this machine."""
    return shlex.join(["perceiver", "submit", source.file, *overrides, "--address", "http://127.0.0.1:8265"])


def growing_overrides(source: Source, settings: Settings, *, contents: bool = False) -> list[str]:
    """Return the user's overrides, and ours for a cluster that adds nodes of both kinds on demand.

    Args:
        source: the recipe.
        settings: the machines.
        contents: give the contents of a DeepSpeed file that the nodes lack instead of its path.
    """
    overrides = [*source.overrides, *placement_overrides(source.recipe, settings), "cluster.autoscaling=true"]
    given = source.recipe.deepspeed.config
    if contents and isinstance(given, str) and not Path(given).is_absolute():
        overrides.append(f"deepspeed.config={json.dumps(read_config(source.recipe.deepspeed))}")
    return overrides


def store_overrides(source: Source, bucket: str) -> list[str]:
    """Return the user's overrides, and ours that put data and runs into a bucket where the recipe has no URLs."""
    places = {"data.url": (source.recipe.data.url, "data"), "output": (source.recipe.output, "runs")}
    ours = [f"{key}=s3://{bucket}/{folder}" for key, (url, folder) in places.items() if "://" not in url]
    return [*source.overrides, *ours]
