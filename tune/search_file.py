"""The files of a search as plain trees, read before anything slow is imported."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.recipe.file import apply_override, packaged, read_tree
from perceiver.config import UserError
from tune.space.space import with_values

RECIPE_KEYS = ("output", "data", "model", "task", "optim", "train", "deepspeed", "cluster", "tracking", "hooks")
"""Top-level keys that only a recipe has: their overrides change the base recipe."""


SEARCH = "search"
"""What messages name a search that is no file."""
INLINE = "(in this file)"
"""The key `recipe` of a search that contains its base recipe."""


def read_search(
    search: str | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read a search; return its tree, that of its base recipe with all overrides, and the recipe's file.

    An override such as ``trials=4`` changes the search, ``train.epochs=3`` the recipe.

    Args:
        search: its file, or its keys. The key `recipe` is the base recipe's file, or its sections; then it becomes
            `INLINE`.
        overrides: ``key=value``.

    Raises:
        UserError: a file is missing or not YAML, or an override is not of the form key=value.
    """
    path = search if isinstance(search, str) else SEARCH
    theirs = [override for override in overrides if head_key(override) in RECIPE_KEYS]
    tree = read_tree(search) if isinstance(search, str) else copy.deepcopy(dict(search))
    for override in overrides:
        if override not in theirs:
            apply_override(tree, override)
    recipe, changes = tree.get("recipe"), tree.get("overrides") or {}
    if not isinstance(recipe, str | Mapping):
        raise UserError(f"{path}: the key recipe is missing: set it to the base recipe's file, or to its sections")
    if not isinstance(changes, Mapping):
        raise UserError(f"{path}: overrides = {changes!r}: wanted keys of the recipe with their values")
    if isinstance(recipe, str):
        where = recipe_path(recipe, path)
        base = with_values(read_tree(where), flat(changes))
    else:
        tree["recipe"], where = INLINE, f"{path}: recipe"
        base = with_values(recipe, flat(changes))
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
