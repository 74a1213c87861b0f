"""Files that start a real cluster, written from a recipe and the settings of the machines it is meant for."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from cluster.deploy.settings import Settings
from cluster.deploy.source import Source
from cluster.jobs.paths import check_paths
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

ELSEWHERE = {"kuberay": "raycluster.yaml", "autoscaler-aws": "cluster.yaml", "autoscaler-gcp": "cluster.yaml"}
"""Kinds whose nodes see no file of this machine, and the file that describes the nodes."""


def render(
    kind: str, source: Source, settings: Settings, say: Callable[[str], None] = lambda line: None
) -> dict[str, str]:
    """Return the files of a kind: their text by name.

    Args:
        kind: a key of ``KINDS``.
        source: the recipe.
        settings: the machines.
        say: takes a note about each path that all nodes must share.

    Raises:
        UserError: the kind is unknown, the recipe's workers fit on no machine of the settings, or it names a folder of
            this machine for a cluster of others.
    """
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}: wanted one of {', '.join(KINDS)}")
    if kind in ELSEWHERE:
        for line in check_paths(source.recipe, False, ELSEWHERE[kind]):
            say(line)
    module = importlib.import_module(f"cluster.deploy.{KINDS[kind]}")
    return module.render(kind, source, settings)


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
