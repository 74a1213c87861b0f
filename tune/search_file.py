"""The files of a search as plain trees, read before anything slow is imported."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.recipe.file import apply_override, packaged, read_tree
from perceiver.config import UserError
from tune.space.space import with_values

RECIPE_KEYS = ("output", "data", "model", "task", "optim", "train", "deepspeed", "cluster", "tracking", "hooks")
"""Top-level keys that only a recipe has: their overrides change the base recipe."""


def read_search(path: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the tree of a search file, that of its base recipe with all overrides, and the recipe's file.

    An override such as ``trials=4`` changes the search, ``train.epochs=3`` the recipe.

    Raises:
        UserError: a file is missing or not YAML, or an override is not of the form key=value.
    """
    theirs = [override for override in overrides if head_key(override) in RECIPE_KEYS]
    tree = read_tree(path, [override for override in overrides if override not in theirs])
    recipe, changes = tree.get("recipe"), tree.get("overrides") or {}
    if not isinstance(recipe, str):
        raise UserError(f"{path}: the key recipe is missing: set it to the base recipe's file")
    if not isinstance(changes, Mapping):
        raise UserError(f"{path}: overrides = {changes!r}: wanted keys of the recipe with their values")
    where = recipe_path(recipe, path)
    base = with_values(read_tree(where), flat(changes))
    for override in theirs:
        apply_override(base, override)
    return tree, base, where


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of overrides by dotted key; a mapping that names ``kind`` or ``preset`` replaces a section."""
    found: dict[str, Any] = {}
    for key, node in tree.items():
        if isinstance(node, Mapping) and node and not {"kind", "preset"} & set(node):
            found |= flat(node, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = node
    return found


def recipe_path(recipe: str, search_file: str) -> str:
    """Return the base recipe's path: relative to the current folder, else to the search file's folder."""
    sibling = packaged(search_file).parent / recipe
    return str(sibling) if sibling.is_file() and not packaged(recipe).is_file() else recipe


def head_key(override: str) -> str:
    """Return the first part of the key that an override sets."""
    return override.partition("=")[0].split(".")[0]
