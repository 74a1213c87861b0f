"""`perceiver new`: a small package with a plug-in of one's own."""

import re
from pathlib import Path
from string import Template

import click

from perceiver.config import UserError
from perceiver.registry import KINDS, group
from perceiver.tracking.printable import say

TEMPLATES = Path(__file__).with_name("templates")
USES = {
    "source": "Use: `perceiver prepare {name} SRC DST`.",
    "feature": "Use: a source names it for a column of its samples.",
    "modality": "Use: `model: {{inputs: {{kind: {name}}}}}` in a recipe.",
    "task": "Use: `task: {{kind: {name}}}` in a recipe.",
    "model": "Use: `model: {{kind: {name}}}` in a recipe.",
    "hook": "Use: `hooks: [{{kind: {name}}}]` in a recipe.",
}


@click.command(
    epilog="""\b
Examples:
  perceiver new task brier
  perceiver new source my_texts --to work"""
)
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name")
@click.option("--to", "folder", default=".", metavar="FOLDER", help="Folder in which the package's folder is made.")
def command(kind: str, name: str, folder: str) -> int:
    """Write a small package that offers a thing of KIND under NAME.

    It has an example to change, the entry point by which recipes and commands find it, and a test of the contract of
    its kind. Install it with pip next to perceiver-train. docs/plugins.md describes what each kind must do.
    """
    place = write_package(kind, name, Path(folder))
    say(f"{place}: pip install --no-deps --editable {place} && python -m pytest {place}")
    say(USES[kind].format(name=name))
    return 0


def write_package(kind: str, name: str, folder: Path) -> Path:
    """Write the package of a plug-in; return its folder.

    Raises:
        UserError: the name is not an identifier in lower case, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name):
        raise UserError(f"new: the name {name!r}: wanted lower-case letters, digits and _, such as my_{kind}")
    project = f"perceiver-{name.replace('_', '-')}"
    place, package = folder / project, f"perceiver_{name}"
    if place.exists():
        raise UserError(f"new: {place} exists: give another name, or --to another folder")
    cls = "".join(part.capitalize() for part in name.split("_"))
    objects = {"source": "source", "feature": cls}
    values = {
        "kind": kind,
        "name": name,
        "project": project,
        "package": package,
        "group": group(kind),
        "module": kind,
        "cls": cls,
        "config": f"{cls}Config",
        "object": objects.get(kind, f"{cls}Config"),
        "use": USES[kind].format(name=name),
    }
    files = {
        "pyproject.toml": "pyproject",
        "README.md": "readme",
        f"{package}/{kind}.py": kind,
        f"tests/test_{kind}.py": f"test_{kind}",
    }
    for file, template in files.items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        text = Template((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")).substitute(values)
        (place / file).write_text(text, encoding="utf-8")
    (place / package / "__init__.py").write_text(f'"""The {kind} `{name}` for perceiver-train."""\n', encoding="utf-8")
    return place
