"""Labels in columns of tables: which Arrow types can be classes, and the classes that a column names."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from perceiver.config import UserError
from pipelines.sources._common import numbered_classes

BOOLEANS = ["false", "true"]

LabelValue = int | str | None
"""A label as stored: the number or the name of its class."""


def is_label(kind: pa.DataType) -> bool:
    """Return whether values of a type can be classes: whole numbers, booleans, texts, and dictionaries of these."""
    if pa.types.is_dictionary(kind):
        return is_label(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text(kind)


def is_labels(kind: pa.DataType) -> bool:
    """Return whether values of a type can be several classes: lists of labels."""
    return is_list(kind) and is_label(kind.value_type)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def label_number(value: LabelValue, index: Mapping[str, int], classes: int) -> int:
    """Return the class of a label.

    Args:
        value: as stored.
        index: class numbers by name.
        classes: number of classes.

    Raises:
        ValueError: it is missing or unknown; the message is a reason for the quarantine.
    """
    number = index.get(value) if isinstance(value, str) else value
    if number is None:
        raise ValueError("no label" if value is None else "an unknown label")
    if not 0 <= number < classes:
        raise ValueError(f"label {number} is not one of {classes} classes")
    return int(number)


def one_label(value: Any) -> str | None:
    """Return a cell as the name of a class; None if it is empty. Raise `ValueError` if it cannot be one."""
    if value is None or value == "":
        return None
    if isinstance(value, float | list | dict):
        raise ValueError(f"a label that is a {type(value).__name__}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def several(value: Any, options: Mapping[str, str]) -> list[str]:
    """Return a cell as names of classes: a list, also as JSON in a text, or a text with separators; none if empty.

    Raises:
        ValueError: one of them cannot be a class.
    """
    if isinstance(value, str):
        parts = _json_list(value)
        parts = value.split(options.get("separator") or ";") if parts is None else parts
    else:
        parts = value if isinstance(value, list) else [value]
    names = [one_label(part.strip() if isinstance(part, str) else part) for part in parts]
    return list(dict.fromkeys(name for name in names if name is not None))


def _json_list(text: str) -> list[Any] | None:
    """Return the list that a text is in JSON; None if it is another text."""
    try:
        return json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of classes in order: numbers by their value, then texts."""
    return sorted(names, key=lambda name: (not name.isdecimal(), len(name) * name.isdecimal(), name))


def stored_names(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str]:
    """Return the class names that the Hugging Face libraries store in a file's metadata; empty if there are none."""
    try:
        facts = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        feature = facts["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # of a list
        names = feature["names"]
        return [str(name) for name in names]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return []


def same_names(stored: Mapping[str, list[str]], where: str) -> list[str]:
    """Return the class names that all files store.

    Args:
        stored: the names of each file; a file without names is left out.
        where: the folder, for the error.

    Raises:
        UserError: two files differ in the names or in their order, so that their numbers mean other classes.
    """
    found = {name: names for name, names in stored.items() if names}
    first = next(iter(found), "")
    for name, names in found.items():
        if names != found[first]:
            place = next((i for i, pair in enumerate(zip(names, found[first], strict=False)) if pair[0] != pair[1]), -1)
            what = f"class {place} is {names[place]!r}" if place >= 0 else f"{len(names)} classes"
            other = f"{found[first][place]!r}" if place >= 0 else f"{len(found[first])}"
            raise UserError(
                f"{where}: in {name} {what}, in {first} {other}: prepare them apart, or store labels as texts"
            )
    return found.get(first, [])


def classes_of(values: Iterable[Collection[Any]], kind: pa.DataType, where: str) -> list[str]:
    """Return the classes of a column without stored names: texts in order, or numbers up to the largest.

    Args:
        values: the values of the column, in parts.
        kind: type of the column in the first file.
        where: the column, for the error.

    Raises:
        UserError: there are none, numbers and texts are mixed, or a number is negative or very large.
    """
    found = {value for part in values for value in part} - {None}
    if not found:
        raise UserError(
            f"{where} has no labels: name another column by --option label=COLUMN, or leave it out by --option label="
        )
    if pa.types.is_boolean(kind) or all(isinstance(value, bool) for value in found):
        return BOOLEANS
    if len({isinstance(value, str) for value in found}) > 1:
        numbers = next(value for value in found if not isinstance(value, str))
        raise UserError(f"{where} has texts and numbers ({numbers}): convert the column to one type in all files")
    if all(isinstance(value, str) for value in found):
        return sorted(found)
    if min(found) < 0:
        raise UserError(f"{where} has the label {min(found)}: wanted 0, 1, 2, ... or texts")
    return numbered_classes(max(found), where)


def unsuitable(feature: str, column: str, kind: pa.DataType, wanted: str, others: Sequence[str]) -> UserError:
    """Return the error for a column whose type cannot be a feature."""
    return UserError(
        f"column {column} is {kind}, wanted {wanted} for the feature {feature}: convert it, or name another column by"
        f" --option {feature}=COLUMN ({', '.join(others) or 'there is none'}), or leave it out by --option {feature}="
    )
