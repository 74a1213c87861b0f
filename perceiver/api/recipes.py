"""Recipes and overrides as Python values: how they become what a command is given."""

import copy
import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from perceiver.config import UserError, shown

if TYPE_CHECKING:
    from cluster.recipe.config import Recipe

    Place = str | os.PathLike[str]
    RecipeLike = Place | Mapping[str, Any] | Recipe
    """A recipe file, a tree of settings, or a recipe."""
    SearchLike = Place | Mapping[str, Any]
    """A search file, or its keys, of which `recipe` is a `RecipeLike`."""


_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|(?<![.\d])(\d+)e')
"""In JSON, a text, or the start of a number with an exponent and no decimal point."""


def set_up() -> None:
    """Prepare the environment as the command line does: versions, telemetry off, proxies."""
    from cluster.runtime.local import set_quiet_environment
    from perceiver.environment import bypass_proxies, check_versions

    # What Ray and tqdm say in a notebook without widgets.
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="IProgress not found")
    check_versions()
    set_quiet_environment()
    bypass_proxies()


def words(overrides: Mapping[str, Any], data: "Place | None" = None) -> list[str]:
    """Return overrides as `KEY=VALUE`, the form of the commands.

    Args:
        overrides: values by dotted key; a path becomes its text.
        data: value of `data.url`; None to leave it.

    Raises:
        UserError: a value is not made of texts, numbers, lists and mappings.
    """
    given = {**({} if data is None else {"data.url": os.fspath(data)}), **overrides}
    return [f"{key}={_text(key, value)}" for key, value in given.items()]


def _text(key: str, value: Any) -> str:
    try:
        text = json.dumps(value, default=os.fspath, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"override of {key}: got {shown(repr(value))} ({error}), wanted a text, a number, true or false, None, or a"
            " list or dict of these"
        ) from None
    text = text.replace("\x85", "\\u0085")  # to YAML a line break, which it would turn into a space
    # To YAML 1e-05 is a text, 1.0e-05 a number.
    return _NUMBER.sub(lambda found: f"{found[1]}.0e" if found[1] else found[0], text)


def read_recipe(recipe: "RecipeLike", overrides: list[str]) -> "Recipe":
    """Return a recipe with overrides.

    Raises:
        UserError: no such file, or a wrong key or value.
    """
    from cluster.recipe.config import build_recipe, load_recipe
    from cluster.recipe.file import apply_override

    if isinstance(recipe, str | os.PathLike):
        return load_recipe(os.fspath(recipe), overrides)
    tree = recipe_tree(recipe)
    for override in overrides:
        apply_override(tree, override)
    return build_recipe(tree)


def recipe_tree(recipe: "Mapping[str, Any] | Recipe") -> dict[str, Any]:
    """Return a copy of a recipe's sections.

    Raises:
        UserError: it is no recipe.
    """
    from cluster.recipe.config import Recipe

    if not isinstance(recipe, Recipe | Mapping):
        raise UserError(f"recipe: got {shown(repr(recipe))}, wanted the path of a file, a dict or a Recipe")
    return recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else copy.deepcopy(dict(recipe))


def search_tree(search: "SearchLike") -> str | dict[str, Any]:
    """Return the path of a search file, or the keys of a search, with its recipe as a path or as sections.

    Raises:
        UserError: it is no search.
    """
    if isinstance(search, str | os.PathLike):
        return os.fspath(search)
    if not isinstance(search, Mapping):
        raise UserError(f"search: got {shown(repr(search))}, wanted the path of a file, or a dict with its keys")
    tree = dict(search)
    if "recipe" in tree:
        given = tree["recipe"]
        tree["recipe"] = os.fspath(given) if isinstance(given, str | os.PathLike) else recipe_tree(given)
    return tree
