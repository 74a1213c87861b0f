"""YAML files of the user: a recipe and its dotted overrides as a plain tree, before anything heavy is imported."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from perceiver.config import Config, UserError

Kind = TypeVar("Kind", bound=Config)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file and apply dotted overrides such as ``optim.lr=2e-3``; keys are not checked here.

    Raises:
        UserError: no such file, broken YAML, or an override that is not of the form key=value.
    """
    tree = _read_recipe(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return tree


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("recipes").rglob("*.yaml")], 1)
        hint = f"; did you mean {near[0]}?" if near else "; see recipes/train/"
        raise UserError(f"no recipe file {path}{hint}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, wanted a mapping of sections such as data: and model:")
    return tree


def read_yaml(path: str | Path, hint: str = "see recipes/") -> Any:
    """Read a YAML file.

    Raises:
        UserError: it cannot be read (the line ends with the hint), or is no YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml_config(path: str | Path, kind: type[Kind], hint: str = "see recipes/") -> Kind:
    """Read a YAML file as a configuration; an empty file has every key at its default.

    Raises:
        UserError: it cannot be read, is no YAML, or a key or value does not fit.
    """
    try:
        return kind.model_validate(read_yaml(path, hint) or {})
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, kind)}") from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first mistake of a validation as one line, an unknown key with the nearest one of the model."""
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # Behind the key of a section that is one of several comes its kind, which is no key of the file.
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    context = first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, list(model.model_fields), 1, cutoff=0.5)
            return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "") + more
        case "missing":
            return f"the key {key} is missing{more}"
        case "union_tag_not_found":
            return f"the key {key}.kind is missing{more}"
        case "union_tag_invalid":
            kinds = context["expected_tags"].replace("'", "")
            return f"{key}.kind = {context['tag']!r}: wanted one of {kinds}{more}"
        case "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            return (f"{key}: " if key else "") + reason + more
        case _:
            got = f"{key} = {first['input']!r}: " if key else ""
            return f"{got}{first['msg'][0].lower()}{first['msg'][1:]}{more}"


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
