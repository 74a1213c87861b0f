"""The file of a recipe and its dotted overrides, as a plain tree: cheap to read, before anything heavy is imported."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from perceiver.config import UserError


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file and apply dotted overrides such as ``optim.lr=2e-3``; keys are not checked here.

    Raises:
        UserError: no such file, broken YAML, or an override that is not of the form key=value.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return tree


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("recipes").rglob("*.yaml")], 1)
        hint = f"; did you mean {near[0]}?" if near else "; see recipes/train/"
        raise UserError(f"no recipe file {path}{hint}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, wanted a mapping of sections such as data: and model:")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key in the tree."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value, for example optim.lr=2e-3")
    node: Any = tree
    *parents, leaf = key.split(".")
    for depth, name in enumerate(parents):
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value; quote it for the shell") from None
