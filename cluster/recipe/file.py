"""Read the user's YAML files: recipes with their bases and dotted overrides as plain trees, typed configurations."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from perceiver import config
from perceiver.config import Config, UserError, shown
from perceiver.yaml_reader import DEEPEST, LARGEST_BYTES, parse_yaml

Kind = TypeVar("Kind", bound=Config)

BASE = "base"
"""Key of a recipe: the file whose settings it changes."""
MOST_BASES = 8
RECIPES = Path(config.__file__).with_name("recipes")
"""The recipes that come with the package."""


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file, merge it into its base, and apply overrides such as ``optim.lr=2e-3``; keys are not checked.

    Raises:
        UserError: no such file, broken YAML, a wrong base, or an override that is not of the form key=value.
    """
    tree: dict[str, Any] = {}
    for _, changes in reversed(_with_bases(path)):
        tree = merged(tree, changes)
    for override in overrides:
        apply_override(tree, override)
    return tree


def base_files(path: str | Path) -> list[str]:
    """Return the files that a recipe's key `base` names, the nearest first.

    Raises:
        UserError: as `read_tree`.
    """
    return [str(file) for file, _ in _with_bases(path)[1:]]


def _with_bases(path: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return a recipe and its bases with their trees, without the key `base`.

    Raises:
        UserError: a base is missing, outside the recipe's folder, or repeated.
    """
    file = packaged(path)
    home, found = file.resolve().parent, [(Path(path), _read_recipe(Path(path)))]
    while (base := found[-1][1].pop(BASE, None)) is not None:
        named, place = f"{found[-1][0]}: base = {shown(str(base))}", packaged(found[-1][0]).parent / str(base)
        if not isinstance(base, str) or "://" in base or place.suffix.lower() not in (".yaml", ".yml"):
            raise UserError(f"{named}: wanted the path of a .yaml file, from the folder of this one")
        try:
            inside, there = place.resolve().is_relative_to(home), place.is_file()
        except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
            raise UserError(f"{named} cannot be found ({shown(str(error))}): wanted one in {place.parent}") from None
        if Path(base).is_absolute() or not inside:
            raise UserError(f"{named} is outside {home}, the recipe's folder: copy the file into it")
        if not there:
            raise UserError(f"{named}: no such file; wanted one in {place.parent}")
        if any(place.samefile(packaged(before)) for before, _ in found) or len(found) > MOST_BASES:
            chain = " -> ".join(str(before) for before, _ in found)
            raise UserError(f"{named}: {chain} -> {place} is a cycle, or longer than {MOST_BASES} bases: remove one")
        found.append((place, _read_recipe(place)))
    return found


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree with changes; a section that is empty or names `kind` or `preset` replaces the one before."""
    tree = dict(base)
    for key, value in changes.items():
        before = tree.get(key)
        merges = isinstance(value, Mapping) and value and not {"kind", "preset"} & set(value)
        tree[key] = merged(before, value) if merges and isinstance(before, Mapping) else value
    return tree


def packaged(path: str | Path) -> Path:
    """Return a path; for ``recipes/...`` that does not exist here, that of the file that comes with the package."""
    path = Path(path)
    ours = RECIPES.joinpath(*path.parts[1:])
    if path.parts[:1] == (RECIPES.name,) and ".." not in path.parts and not path.exists() and ours.exists():
        return ours
    return path


def packaged_file(name: str) -> Path:
    """Return a file that comes with the package, by its path from the folder of recipes."""
    return RECIPES / name


def packaged_recipes() -> list[str]:
    """Return the paths of the recipes that come with the package, as commands take them (``recipes/train/...``)."""
    return sorted(str(Path(RECIPES.name, path.relative_to(RECIPES))) for path in RECIPES.rglob("*.yaml"))


def _read_recipe(path: Path) -> dict[str, Any]:
    path = packaged(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), packaged_recipes(), 1)
        hint = f"; did you mean {near[0]}?" if near else "; see recipes/train/"
        raise UserError(f"{path} is not a regular file{hint}" if path.exists() else f"no recipe file {path}{hint}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        got = "empty" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"{path} is {got}, wanted a mapping of sections such as data: and model:")
    return tree


def read_yaml(path: str | Path, hint: str = "see recipes/") -> Any:
    """Read a YAML file, see `perceiver.yaml_reader.parse_yaml`.

    Raises:
        UserError: it cannot be read (the message ends with the hint), or is not valid YAML.
    """
    path = packaged(path)
    try:
        if not path.is_file():
            raise UserError(f"cannot read {path} (no such file, or not a regular file); {hint}")
        with path.open("rb") as file:
            return parse_yaml(file.read(LARGEST_BYTES + 1), str(path))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {hint}") from None


def read_yaml_config(path: str | Path, kind: type[Kind], hint: str = "see recipes/") -> Kind:
    """Read a YAML file as a configuration; an empty file has every key at its default.

    Raises:
        UserError: it cannot be read, is not valid YAML, or has a wrong key or value.
    """
    try:
        tree = read_yaml(path, hint)
        return kind.model_validate({} if tree is None else tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, kind)}") from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first mistake of a validation as one line; for an unknown key, with the nearest known one.

    Args:
        error: the error of pydantic.
        model: the configuration that was validated.
    """
    # The default of a key that depends on others is not computed if one of them is wrong, which is no second mistake.
    errors = [e for e in error.errors(include_url=False) if e["type"] != "default_factory_not_called"]
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    keys = [shown(".".join(str(part) for part in _key_path(model, e["loc"]))) for e in errors]
    key = keys[errors.index(first)]
    others = len({name for name in keys if name != key})
    more = f" (and {others} more)" if others else ""
    context = first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden":
            return _unknown_key(model, key) + more
        case "missing":
            return f"the key {key} is missing{more}"
        case "union_tag_not_found":
            return f"the key {key}.kind is missing{more}"
        case "union_tag_invalid":
            kinds = context["expected_tags"].replace("'", "")
            return f"{key}.kind = {shown(context['tag'])!r}: wanted one of {kinds}{more}"
        case "value_error":
            reason = shown(first["msg"].removeprefix("Value error, "), 300)
            return (f"{key}: " if key else "") + reason + more
        case _:
            got = f"{key} = {shown(repr(first['input']))}: " if key else ""
            # Of a union each member has an error.
            reasons = dict.fromkeys(
                e["msg"][0].lower() + e["msg"][1:] for e, name in zip(errors, keys, strict=True) if name == key
            )
            return f"{got}{', or '.join(reasons)}{more}"


def _unknown_key(model: type[BaseModel], key: str) -> str:
    known = list(known_keys(model))
    if key in known:
        return f"the key {key} does not apply to the chosen kind or preset: remove it"
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1] for k in known], 1)
        near = [k for k in known if near and k.rsplit(".", 1)[-1] == near[0]][:1]
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")


def _key_path(node: Any, location: Sequence[int | str]) -> Iterator[int | str]:
    """Yield an error's location without the names of a union's members, which are not keys of the file."""
    for part in location:
        variants = _variants(node)
        tagged = [variant for variant in variants if part in (_tag(variant), variant.__name__)]
        if tagged and (len(variants) > 1 or part == variants[0].__name__):
            node = tagged[0]
            continue
        fields = {name: f.annotation for v in variants for name, f in v.model_fields.items()}
        if isinstance(part, str) and not variants and node is not None and not _containers(node, dict):
            continue  # such as bool of bool | Literal["auto"]
        yield part
        if isinstance(part, int):
            node = next(iter(_containers(node, list, tuple)), None)
        else:
            node = fields.get(part) or next(iter(_containers(node, dict)), None)


def _containers(node: Any, *kinds: type) -> list[Any]:
    """Return the types of the values of an annotation's members that are such containers."""
    origin, parts = typing.get_origin(node), typing.get_args(node)
    if origin in kinds:
        return [parts[-1] if parts[-1] is not ... else parts[0]]
    if node in kinds:
        return [Any]
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return [found for part in parts for found in _containers(part, *kinds)]
    return []


def known_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield each dotted key of a section type."""
    for variant in _variants(node):
        for name, field in variant.model_fields.items():
            yield prefix + name
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def _variants(node: Any) -> list[type[BaseModel]]:
    """Return the configuration classes of an annotation, the members of unions included."""
    if isinstance(node, type) and issubclass(node, BaseModel):
        return [node]
    if typing.get_origin(node) in (typing.Union, types.UnionType, typing.Annotated):
        return [variant for part in typing.get_args(node) for variant in _variants(part)]
    return []


def _tag(variant: type[BaseModel]) -> Any:
    kind = variant.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind and typing.get_args(kind.annotation) else variant.__name__


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key in the tree, from ``key=value``; the value is YAML.

    Raises:
        UserError: the override has another form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {shown(override)!r} is not of the form key=value, for example optim.lr=2e-3")
    node: Any = tree
    *parents, leaf = key.split(".", DEEPEST)
    for depth, name in enumerate(parents):
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"override {shown(override)!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        node[leaf] = parse_yaml(text, key)
    except UserError as error:
        raise UserError(f"override of {key}: {error}; quote the value for the shell") from None
