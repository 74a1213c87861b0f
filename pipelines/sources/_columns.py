"""Columns of Parquet tables: which of them are features, and of which Arrow types."""

import re
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from perceiver.config import UserError
from pipelines.sources._division import COLUMNS
from pipelines.sources._labels import is_label, is_labels, is_list, is_text, unsuitable
from pipelines.sources._targets import label_columns, target_columns, text_columns

INPUTS = ("image", "audio", "video", "points", "text")
TARGET = "target:"
"""Begins the key of a target's column among the columns of features."""
MORE_TEXT = "text:"
"""Begins the key of a text's column after the first one."""

Suitable = Callable[[pa.DataType], bool]
"""Returns whether values of a type can be a feature."""


def is_media(kind: pa.DataType) -> bool:
    """Return whether values of a type can be files: bytes, or as hubs store them a struct of bytes and path."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_points(kind: pa.DataType) -> bool:
    """Return whether values of a type can be points: lists of lists."""
    return is_list(kind) and is_list(kind.value_type)


def is_number(kind: pa.DataType) -> bool:
    """Return whether values of a type are numbers."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _is_target(kind: pa.DataType) -> bool:
    return is_number(kind) or pa.types.is_boolean(kind)


_MEDIA = ("image", "audio", "video")
_CLASS = "a whole number, boolean, string or dictionary"
KINDS: dict[str, tuple[Suitable, str]] = {
    **dict.fromkeys(_MEDIA, (is_media, "binary or a struct with the field bytes")),
    "points": (is_points, "a list of lists of numbers"),
    "text": (is_text, "string"),
    "label": (is_label, _CLASS),
    "labels": (is_labels, "a list of whole numbers, booleans, strings or dictionaries"),
    **dict.fromkeys(COLUMNS, (is_label, _CLASS)),
    "target": (_is_target, "a number"),
}
"""What the types of each feature's columns must be, and the words for it."""


def fits(feature: str, schema: pa.Schema, column: str) -> bool:
    """Return whether a file has the column of a feature, of a suitable type."""
    suitable, _ = KINDS[re.split("[:_]", feature)[0]]  # target:NAME, label_NAME
    return column in schema.names and suitable(schema.field(column).type)


def find_columns(schema: pa.Schema, options: Mapping[str, str]) -> dict[str, str]:
    """Return the table's column for each feature, and of `split` and `group`.

    Several labels have the keys `label_NAME`, targets `target:COLUMN`, texts after the first one `text:COLUMN`.

    Raises:
        UserError: a column does not exist, exists twice, or has a type that cannot be the feature; or `label` and
            `labels`.
    """
    columns: dict[str, str] = {}
    for feature in KINDS:
        if feature == "target":
            continue
        name = options.get(feature, feature)
        check_once(schema, name)
        if feature == "labels" and feature not in options and name in schema.names:
            name = name if is_labels(schema.field(name).type) and "label" not in columns else ""
        if name in schema.names:
            columns[feature] = _checked(schema, feature, name)
        elif feature == "label" and "," in name:
            several = label_columns(options, schema.names, "the table")
            columns |= {key: _checked(schema, "label", column) for key, column in several.items()}
        elif feature == "text" and "," in name:
            first, *others = text_columns(options, schema.names, "the table")
            columns["text"] = _checked(schema, "text", first)
            columns |= {f"{MORE_TEXT}{column}": _checked(schema, "text", column) for column in others}
        elif name and feature in options:
            raise UserError(
                f"option {feature}={name}: no such column; the table has "
                + ", ".join(f"{field.name} ({field.type})" for field in schema)
            )
    if {"label", "labels"} <= columns.keys():
        raise UserError("the table has label and labels: leave one out, for example --option labels=")
    targets = target_columns(options, schema.names, "the table")
    return columns | {f"{TARGET}{name}": _checked(schema, "target", name) for name in targets}


def _checked(schema: pa.Schema, feature: str, name: str) -> str:
    """Return the name of a column that can be a feature; refuse others."""
    check_once(schema, name)
    suitable, wanted = KINDS[feature]
    if not suitable(kind := schema.field(name).type):
        others = [field.name for field in schema if suitable(field.type)]
        raise unsuitable(feature, name, kind, wanted, others)
    return name


def check_once(schema: pa.Schema, name: str) -> None:
    """Refuse a column that exists several times."""
    if schema.names.count(name) > 1:
        raise UserError(f"column {name} exists {schema.names.count(name)} times: rename the others")


def check_input(schema: pa.Schema, features: Sequence[str]) -> None:
    """Refuse tables without a column for an input."""
    if not {*INPUTS, "series"} & set(features):
        raise UserError(
            f"no input in the columns {', '.join(schema.names)}: set --option image=COLUMN (or audio, video, points,"
            " text, series), or --option series=all for all columns of numbers"
        )
