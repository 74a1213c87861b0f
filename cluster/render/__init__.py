"""Files that start a real cluster, written from a recipe and the settings of the machines it is meant for."""

import importlib
import os
from pathlib import Path

from cluster.recipe import Recipe
from cluster.render.settings import Settings
from perceiver.config import UserError

KINDS = {
    "kuberay": "kuberay",
    "autoscaler-aws": "autoscaler",
    "autoscaler-gcp": "autoscaler",
    "slurm": "slurm",
    "docker": "images",
    "compose": "images",
    "grafana": "grafana",
}
"""What can be rendered, and the module of this package that does it by a function ``render``."""


def render(kind: str, recipe: Recipe, recipe_file: str, settings: Settings) -> dict[str, str]:
    """Return the files of a kind: their text by name.

    Raises:
        UserError: the kind is unknown, or the recipe's workers fit on no machine of the settings.
    """
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}: wanted one of {', '.join(KINDS)}")
    module = importlib.import_module(f"cluster.render.{KINDS[kind]}")
    return module.render(kind, recipe, recipe_file, settings)


def write(files: dict[str, str], folder: str) -> list[Path]:
    """Write files into a folder; return their paths.

    Raises:
        UserError: the folder cannot be written to.
    """
    written = []
    # Where the files lie is known only now: docker's paths lead from there to the sources, and back.
    places = {"@FOLDER@": folder.rstrip("/"), "@ROOT@": os.path.relpath(Path.cwd(), folder)}
    for name, text in files.items():
        for mark, place in places.items():
            text = text.replace(mark, place)
        path = Path(folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): give another -o FOLDER") from None
        written.append(path)
    return written
