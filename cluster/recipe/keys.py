"""All keys of a recipe with type, default and description, and the recipe's JSON schema."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.recipe.config import Recipe
from cluster.recipe.file import BASE
from perceiver.presets import PRESETS

Node = Mapping[str, Any]
"""A node of a JSON schema."""
NUMBERS = {"integer", "number"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: dotted; `*` stands for any name or number.
        type: what it takes, with its range.
        default: as JSON; empty if the key is required, or a section with keys of its own.
        description: its meaning.
        where: the kinds of the sections that have it, such as `model.kind=perceiver`; empty if all have it.
    """

    name: str
    type: str
    default: str
    description: str
    where: tuple[str, ...] = ()


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors; a model may be a preset with some keys changed."""
    schema = Recipe.model_json_schema()
    preset = {
        "type": "object",
        "required": ["preset"],
        "properties": {"preset": {"enum": sorted(PRESETS), "description": "the preset; other keys change it"}},
    }
    model = schema["properties"]["model"]
    schema["properties"]["model"] = {
        "description": model["description"],
        "if": {"required": ["preset"]},
        "then": preset,
        "else": {key: value for key, value in model.items() if key != "description"},
    }
    inputs = schema["$defs"]["PerceiverModel"]["properties"]["inputs"]
    several = schema["$defs"]["MultimodalConfig"]["properties"]["modalities"]
    base = {"type": "string", "description": "a recipe, by its path from this one's folder, that this one changes"}
    schema["properties"] = {BASE: base, **schema["properties"]}
    several["additionalProperties"] = {"anyOf": [inputs, {"type": "null"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def recipe_keys(section: str = "") -> list[Key]:
    """Return the keys of a recipe, or of a section such as `optim` or `model.inputs`, in the order of the sections."""
    schema = Recipe.model_json_schema()
    merged: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for key in _keys(schema, schema["$defs"], "", (), ()):
        merged.setdefault((key.name, key.type, key.default, key.description), []).append(key.where)
    every = _kinds([place for places in merged.values() for place in places])
    return [
        Key(*facts, where=_conditions(places, every))
        for facts, places in merged.items()
        if not section or facts[0] == section or facts[0].startswith(section + ".")
    ]


def _kinds(places: list[tuple[str, ...]]) -> dict[str, list[str]]:
    """Return the kinds of each section in conditions such as `model.kind=perceiver`."""
    kinds: dict[str, dict[str, None]] = {}
    for condition in (condition for place in places for condition in place):
        name, _, kind = condition.partition("=")
        kinds.setdefault(name, {})[kind] = None
    return {name: list(found) for name, found in kinds.items()}


def _conditions(places: list[tuple[str, ...]], every: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Return the conditions of a key that several kinds share (`model.kind=a|b`), without those that all kinds meet."""
    return tuple(f"{name}={'|'.join(found)}" for name, found in _kinds(places).items() if len(found) < len(every[name]))


def _keys(
    node: Node, known: Mapping[str, Node], name: str, where: tuple[str, ...], above: tuple[str, ...]
) -> Iterator[Key]:
    """Yield the keys below a section.

    Args:
        node: the section's schema.
        known: definitions by name.
        name: of the section.
        where: the kinds of this section and those above it.
        above: definitions that contain it, to end recursions.
    """
    required = set(node.get("required", ()))
    for key, value in node.get("properties", {}).items():
        full = f"{name}.{key}" if name else key
        if key == "kind" and "const" in value:
            continue  # listed once, with all kinds
        sections = list(_sections(value, known))
        inner = [found for found in sections if found[0] not in above]
        if not sections or value.get("anyOf"):
            default = "" if key in required else json.dumps(value.get("default", {}))
            yield Key(full, type_text(value, known), default, value.get("description", ""), where)
        kinds = [(place, kind) for _, place, kind in sections if kind]
        if kinds:
            kind = (value.get("default") or {}).get("kind")
            names, about = "one of " + ", ".join(kind for _, kind in kinds), value.get("description", "")
            yield Key(f"{full}{kinds[0][0]}.kind", names, json.dumps(kind) if kind else "", about, where)
        for definition, suffix, kind in inner:
            place = full + suffix
            condition = (*where, f"{place}.kind={kind}") if kind else where
            yield from _keys(known[definition], known, place, condition, (*above, definition))


def _sections(node: Node, known: Mapping[str, Node]) -> Iterator[tuple[str, str, str]]:
    """Yield (definition, suffix of the key, kind) of the sections that a key can be."""
    if "$ref" in node:
        definition = node["$ref"].rsplit("/", 1)[-1]
        if known[definition].get("properties"):
            yield definition, "", ""
    for kind, reference in node.get("discriminator", {}).get("mapping", {}).items():
        yield reference.rsplit("/", 1)[-1], "", kind
    for part in node.get("anyOf", ()):
        yield from _sections(part, known)
    for inner in (node.get("items"), node.get("additionalProperties")):
        if isinstance(inner, dict):
            for definition, suffix, kind in _sections(inner, known):
                yield definition, f".*{suffix}", kind


def type_text(node: Node, known: Mapping[str, Node]) -> str:
    """Return a type in words, with its range: `integer >= 1`, `one of max, min`, `number or null`."""
    if "const" in node:
        return f"always {node['const']}"
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(type_text(part, known) for part in node["anyOf"]))
    if "$ref" in node:
        definition = known[node["$ref"].rsplit("/", 1)[-1]]
        return type_text(definition, known) if "enum" in definition else "section"
    kind = node.get("type", "any")
    if kind in NUMBERS:
        return kind + _range(node)
    if kind == "array":
        parts = node.get("prefixItems")
        inner = type_text(parts[0] if parts else node.get("items", {}), known)
        return f"list of {len(parts)} x {inner}" if parts else f"list of {inner}"
    if kind == "object":
        inner = node.get("additionalProperties")
        return f"names to {type_text(inner, known)}" if isinstance(inner, dict) else "section"
    return "text" if kind == "string" else str(kind)


def _range(node: Node) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {_number(node[key])}" for key, sign in signs.items() if key in node)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e18 else f"{value:g}"


def markdown() -> str:
    """Return the documentation page of all keys."""
    lines = [
        "# Keys of a recipe",
        "",
        "Made by `perceiver keys --markdown`. A key without a default is required, or is taken from the preset. `*`",
        "stands for any name or number. A section with several kinds has the keys of its kind, by the last column.",
        "",
        "The key `base` of a recipe file names another one, by its path from the file's folder, which must contain it:",
        "the file then gives only what it changes. A section that is empty or names `kind` or `preset` replaces the",
        "base's, other sections are merged. A run records the merged recipe.",
    ]
    found = recipe_keys()
    for section in dict.fromkeys(key.name.split(".")[0] for key in found):
        lines += ["", f"## {section}", "", "| Key | Type | Default | Meaning | Where |", "|---|---|---|---|---|"]
        for key in found:
            if key.name.split(".")[0] == section:
                cells = (f"`{key.name}`", key.type, key.default and f"`{key.default}`", key.description)
                where = " ".join(f"`{condition}`" for condition in key.where)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, where)) + " |")
    return "\n".join(lines) + "\n"
