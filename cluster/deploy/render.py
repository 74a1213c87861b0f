"""Render the files that start a real cluster, from templates, a recipe and the settings of the machines."""

import functools
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cluster.deploy.settings import Settings, labels, placement_overrides, train_nodes
from cluster.jobs.config import Submission
from cluster.jobs.paths import check_paths
from cluster.jobs.secrets import check_secret_files, check_secrets, needed
from cluster.jobs.submit import job_words, training
from cluster.recipe.config import Recipe
from cluster.run.metrics import FIGURES
from perceiver.config import UserError
from perceiver.storage import refusing, write_whole
from perceiver.train.engine.deepspeed_config import read_config

KINDS = {
    "kuberay": ("raycluster.yaml", "rayjob.yaml"),
    "autoscaler-aws": ("cluster.yaml",),
    "autoscaler-gcp": ("cluster.yaml",),
    "slurm": ("train.sbatch",),
    "docker": ("Dockerfile", "Dockerfile.dockerignore"),
    "compose": ("Dockerfile", "Dockerfile.dockerignore", "compose.yaml"),
    "grafana": ("grafana-perceiver.json",),
}
"""The kinds and their files; the template of a file has its name."""

ELSEWHERE = ("kuberay", "autoscaler-aws", "autoscaler-gcp")
"""Kinds whose nodes do not see files of this machine."""

DRIVER = {"driver": 1}
"""Custom resource of the pod of the driver, which does not end with the head's (`gcs_fault_tolerance`)."""

RECIPE_FOLDER = "/etc/perceiver"
"""Folder of the recipe in the pods of a RayJob."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe with its file, as the user names it.

    Attributes:
        recipe: the recipe, overrides applied.
        file: its path on this machine.
        overrides: ``key=value``, as typed; every rendered command repeats them.
        needs: environment variables that the recipe names, which must be set on the cluster.
    """

    recipe: Recipe
    file: str
    overrides: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def read_recipe_file(file: str, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read the recipe to render files for.

    Raises:
        UserError: a mistake in the recipe, or a secret value, which the files would show.
    """
    wanted = Submission(recipe=file, overrides=tuple(overrides))
    work = training(wanted)
    check_secrets(work.tree, wanted, {})
    return RecipeFile(work.recipe, file, tuple(overrides), tuple(needed(work.tree, wanted)))


def job_command(source: RecipeFile, file: str, overrides: Sequence[str]) -> str:
    """Return the shell command that starts the run on the cluster, or resumes it.

    Args:
        source: the recipe.
        file: path of the recipe on the cluster.
        overrides: all overrides.
    """
    words = job_words(source.recipe.name, source.recipe.output, source.needs)
    return shlex.join([*words, "train", file, *overrides])


def submit_command(source: RecipeFile, overrides: Sequence[str], *options: str) -> str:
    """Return the shell command that submits the recipe to a cluster whose dashboard is forwarded to this machine."""
    return shlex.join(["perceiver", "submit", source.file, *overrides, *options, "--address", "http://127.0.0.1:8265"])


def autoscaling_overrides(source: RecipeFile, settings: Settings, *, contents: bool = False) -> list[str]:
    """Return the user's overrides, and ours for an autoscaling cluster with training and data nodes.

    Args:
        source: the recipe.
        settings: the machines.
        contents: replace the path of a DeepSpeed file, which the nodes lack, by its contents.
    """
    overrides = [*source.overrides, *placement_overrides(source.recipe, settings), "cluster.autoscaling=true"]
    given = source.recipe.deepspeed.config
    if contents and isinstance(given, str) and not Path(given).is_absolute():
        overrides.append(f"deepspeed.config={json.dumps(read_config(source.recipe.deepspeed))}")
    return overrides


def store_overrides(source: RecipeFile, bucket: str) -> list[str]:
    """Return the user's overrides, and ours that move data and runs without a URL to a bucket."""
    places = {"data.url": (source.recipe.data.url, "data"), "output": (source.recipe.output, "runs")}
    ours = [f"{key}=s3://{bucket}/{folder}" for key, (url, folder) in places.items() if "://" not in url]
    return [*source.overrides, *ours]


def render(
    kind: str, source: RecipeFile, settings: Settings, folder: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, str]:
    """Return the files of a kind: their text by name.

    Args:
        kind: a key of ``KINDS``.
        source: the recipe.
        settings: the machines.
        folder: folder of the rendered files; those of docker and compose name it.
        say: prints a note about each path that all nodes must share.

    Raises:
        UserError: the kind is unknown, the recipe's workers do not fit on the machines, or a path of the recipe exists
            only on this machine.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}: wanted one of {', '.join(KINDS)}")
    if kind in ELSEWHERE:
        for line in check_paths(source.recipe, False, KINDS[kind][0]):
            say(line)
    values = _values(kind, source, settings, folder.rstrip("/"))
    return {name: environment().get_template(f"{name}.j2").render(values) for name in KINDS[kind]}


def _values(kind: str, source: RecipeFile, settings: Settings, folder: str) -> dict[str, Any]:
    """Return the variables of the templates."""
    recipe = source.recipe
    *registry, last = settings.image.split("/")
    image, _, tag = last.partition(":")
    if kind == "compose":
        ours = store_overrides(source, settings.services.bucket)
    else:
        ours = autoscaling_overrides(source, settings)
    values: dict[str, Any] = {
        "kind": kind,
        "source": source,
        "recipe": recipe,
        "settings": settings,
        "ray": ray.__version__,
        "name": recipe.name.lower().replace("_", "-").replace(".", "-"),
        "labels": labels(recipe, settings),
        "train_nodes": train_nodes(recipe, settings) if kind in (*ELSEWHERE, "slurm") else 0,
        "folder": folder,
        "root": os.path.relpath(Path.cwd(), folder),
        "mlflow_image": "/".join([*registry, f"{image}-mlflow:{tag or 'latest'}"]),
        "figures": FIGURES,
        "job": job_command(source, source.file, source.overrides),
        "submit": submit_command(source, ours),
    }
    if kind == "kuberay":
        check_secret_files([source.file])
        values |= _tolerance(settings)
        if settings.gcs_fault_tolerance:
            values["submit"] = submit_command(source, ours, "--entrypoint-resources", values["driver_need"])
        file = f"{RECIPE_FOLDER}/{Path(source.file).name}"
        values["job"] = job_command(source, file, autoscaling_overrides(source, settings, contents=True))
        values |= {"recipe_folder": RECIPE_FOLDER, "recipe_name": Path(source.file).name}
        values["recipe_text"] = Path(source.file).read_text(encoding="utf-8")
    return values


def _tolerance(settings: Settings) -> dict[str, Any]:
    """Return the variables of the templates for GCS fault tolerance.

    Ray places the driver of a job on the head, unless the job reserves a resource of another node.
    """
    (name,) = DRIVER
    return {"tolerance": settings.gcs_fault_tolerance, "driver_resource": name, "driver_need": json.dumps(DRIVER)}


def write(files: Mapping[str, str], folder: str) -> list[Path]:
    """Write files into a folder; return their paths.

    Raises:
        UserError: the folder cannot be written to.
    """
    written = []
    for name, text in files.items():
        path = Path(folder) / name
        with refusing(str(path), "choose another -o FOLDER"):
            write_whole(path, text)
        written.append(path)
    return written


@functools.cache
def environment() -> Environment:
    """Return the environment of the templates, which refuses every inserted value that no filter has quoted."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_quoted,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        yaml=in_yaml,
        yaml_text=yaml_text,
        compose=lambda value: in_yaml(str(value).replace("$", "$$")),
        json=lambda value: Markup(json.dumps(value)),
        sh=lambda value: Markup(shlex.quote(str(value))),
        comment=in_comment,
        code=Markup,
        up=math.ceil,
    )
    return environment


def _quoted(value: Any) -> Any:
    """Return a value to insert.

    Raises:
        TypeError: it is a string that no filter has quoted.
    """
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Markup | int) and not isinstance(value, bool):
        return value
    raise TypeError(f"{value!r} is inserted without a filter: add | yaml, | sh, | comment or the like")


def in_yaml(value: Any) -> Markup:
    """Return a value as YAML on one line; strings are quoted."""
    if isinstance(value, Mapping):
        return Markup("{" + ", ".join(f"{in_yaml(key)}: {in_yaml(item)}" for key, item in value.items()) + "}")
    if not isinstance(value, str):
        return Markup(json.dumps(value))
    return _dumped(value, '"')


def yaml_text(value: str) -> Markup:
    """Return a string as YAML: a literal block if all characters are printable. Indent it as its parent."""
    plain = all(line.replace("\t", " ").isprintable() for line in value.split("\n"))
    return _dumped(value, "|" if plain else '"')


def _dumped(value: str, style: str) -> Markup:
    text = yaml.dump(value, Dumper=yaml.SafeDumper, default_style=style, width=math.inf, allow_unicode=True)
    if text.endswith("\n...\n"):  # YAML's end of a document whose last lines are empty
        text = text.removesuffix("...\n")
    return Markup(text.removesuffix("\n"))


def in_comment(value: Any) -> Markup:
    """Return a string on one line; control characters and line breaks become Python's escapes."""
    return Markup("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)))
