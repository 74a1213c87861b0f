"""Fills in the templates of the files that start a real cluster, from a recipe and the settings of the machines."""

import functools
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cluster.deploy.settings import Settings, labels, train_nodes
from cluster.deploy.source import Source, growing_overrides, job_command, store_overrides, submit_command
from cluster.jobs.paths import check_paths
from cluster.jobs.secrets import check_secret_files
from cluster.run.metrics import FIGURES
from perceiver.config import UserError

KINDS = {
    "kuberay": ("raycluster.yaml", "rayjob.yaml"),
    "autoscaler-aws": ("cluster.yaml",),
    "autoscaler-gcp": ("cluster.yaml",),
    "slurm": ("train.sbatch",),
    "docker": ("Dockerfile", "Dockerfile.dockerignore"),
    "compose": ("Dockerfile", "Dockerfile.dockerignore", "compose.yaml"),
    "grafana": ("grafana-perceiver.json",),
}
"""What can be rendered, and the files of each kind; the template of a file is called after it."""

ELSEWHERE = ("kuberay", "autoscaler-aws", "autoscaler-gcp")
"""Kinds whose nodes see no file of this machine."""

RECIPE_FOLDER = "/etc/perceiver"
"""Where the pods of a RayJob find the recipe."""


def render(
    kind: str, source: Source, settings: Settings, folder: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, str]:
    """Return the files of a kind: their text by name.

    Args:
        kind: a key of ``KINDS``.
        source: the recipe.
        settings: the machines.
        folder: where the files will be written; those of docker and compose name it.
        say: takes a note about each path that all nodes must share.

    Raises:
        UserError: the kind is unknown, the recipe's workers fit on no machine of the settings, or it names a folder of
            this machine for a cluster of others.
    """
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}: wanted one of {', '.join(KINDS)}")
    if kind in ELSEWHERE:
        for line in check_paths(source.recipe, False, KINDS[kind][0]):
            say(line)
    values = _values(kind, source, settings, folder.rstrip("/"))
    return {name: environment().get_template(f"{name}.j2").render(values) for name in KINDS[kind]}


def _values(kind: str, source: Source, settings: Settings, folder: str) -> dict[str, Any]:
    """Return what the templates name."""
    recipe = source.recipe
    image, _, tag = settings.image.partition(":")
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
        "mlflow_image": f"{image}-mlflow:{tag or 'latest'}",
        "figures": FIGURES,
        "job": job_command(source, source.file, source.overrides),
        "submit": submit_command(source, growing_overrides(source, settings)),
    }
    if kind == "compose":
        values["submit"] = submit_command(source, store_overrides(source, settings.services.bucket))
    if kind == "kuberay":
        check_secret_files([source.file])
        file = f"{RECIPE_FOLDER}/{Path(source.file).name}"
        values["job"] = job_command(source, file, growing_overrides(source, settings, contents=True))
        values |= {"recipe_folder": RECIPE_FOLDER, "recipe_name": Path(source.file).name}
        values["recipe_text"] = Path(source.file).read_text()
    return values


def write(files: Mapping[str, str], folder: str) -> list[Path]:
    """Write files into a folder; return their paths.

    Raises:
        UserError: the folder cannot be written to.
    """
    written = []
    for name, text in files.items():
        path = Path(folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): give another -o FOLDER") from None
        written.append(path)
    return written


@functools.cache
def environment() -> Environment:
    """Return the environment of the templates: whatever a template inserts must have passed a filter that quotes it."""
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
    """Return a value that a template inserts.

    Raises:
        TypeError: a text that no filter has quoted.
    """
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Markup | int) and not isinstance(value, bool):
        return value
    raise TypeError(f"{value!r} is inserted without a filter: add | yaml, | sh, | comment or the like")


def in_yaml(value: Any) -> Markup:
    """Return a value as YAML on one line; texts are quoted."""
    if isinstance(value, Mapping):
        return Markup("{" + ", ".join(f"{in_yaml(key)}: {in_yaml(item)}" for key, item in value.items()) + "}")
    if not isinstance(value, str):
        return Markup(json.dumps(value))
    return _dumped(value, '"')


def yaml_text(value: str) -> Markup:
    """Return a text as YAML: a block of its lines if it has only printable characters. Indent it as its parent."""
    plain = all(line.replace("\t", " ").isprintable() for line in value.split("\n"))
    return _dumped(value, "|" if plain else '"')


def _dumped(value: str, style: str) -> Markup:
    text = yaml.dump(value, Dumper=yaml.SafeDumper, default_style=style, width=math.inf, allow_unicode=True)
    if text.endswith("\n...\n"):  # ends a document whose last lines are empty
        text = text.removesuffix("...\n")
    return Markup(text.removesuffix("\n"))


def in_comment(value: Any) -> Markup:
    """Return a text on one line; control characters and line breaks are written as Python's escapes."""
    return Markup("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)))
