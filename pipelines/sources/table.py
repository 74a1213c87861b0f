"""Parquet tables with one row per sample, in the layout of data hubs: `SRC/**/train-*.parquet`, `test-*.parquet`, ...

Options name the columns; the defaults are `image` (binary, or a struct with `bytes`), `text` (string) and `label`
(whole number, boolean, string, or a dictionary of these). Class names come from the option `classes` (with commas),
from the metadata that the Hugging Face libraries write, or from the labels.
"""

import io
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, raise_unanswered
from pipelines.features import LabelFeature, LabelsFeature, TextFeature
from pipelines.order.permutation import keys, permute
from pipelines.shards.parquet import MAX_BYTES, row_key
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, source_folder
from pipelines.sources._files import look
from pipelines.sources._labels import (
    classes_of,
    is_label,
    is_labels,
    is_text,
    label_number,
    same_names,
    stored_names,
    unsuitable,
)
from pipelines.sources._layout import class_notes, held_out_share, split_notes, splits_of_files
from pipelines.sources._probe import PROBE, image_feature
from pipelines.sources._targets import LABEL, label_columns, target_columns, target_feature, target_values

OPTIONS = ("image", "text", "label", "labels", "target", "classes", "channels", "held_out", "splits")

MAX_ROWS = 10_000_000
"""Limit of a row group, which is read as a whole; that of its bytes is `MAX_BYTES`."""


class Group(NamedTuple):
    """A row group: the file relative to the source folder, its number, its rows, and the rows of all groups before."""

    name: str
    number: int
    rows: int
    first: int


class Table(NamedTuple):
    """What a listing needs of a file's footer: the rows of its row groups, and the class names that it stores."""

    name: str
    rows: list[int]
    classes: list[str]


class TableSource:
    """The source: Parquet files. Row groups are shuffled over the shards; rows keep their order within them.

    Options: `image`, `text`, `label`, `labels` (columns, `labels` of lists; `label` of several columns: labels with
    classes of their own; empty: without), `target` (columns of numbers, with commas), `classes` (names with
    commas), `channels` (1 or 3; default: as found), `held_out` (share of the rows, 0.2 if no file is named after a
    split), `splits` (`names` or `none`, see `_layout.splits_of_files`).
    """

    title = "Parquet tables with a row per sample (images as bytes, or texts; SRC/train-*.parquet, SRC/test-*.parquet)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the row groups below `src`."""
        refuse_options(options, OPTIONS)
        folder = source_folder("table", src, "train-*.parquet, test-*.parquet, ...")
        found = look(folder, (".parquet",))
        if not found.names:
            raise UserError(f"no .parquet files below {folder.url}: wanted train-*.parquet, test-*.parquet, ...")
        splits = splits_of_files(folder, found.names, options)
        files = [name for names in splits.values() for name in names]
        schema = _metadata(folder, files[0]).schema.to_arrow_schema()
        columns = find_columns(schema, options)
        label = columns.get("label") or columns.get("labels", "")
        tables = {
            split or "train": [read_facts(folder, name, label) for name in names] for split, names in splits.items()
        }
        classes = class_names(folder, schema, columns, [table for found in tables.values() for table in found], options)
        own = {
            feature: stored_names(schema.metadata, column)
            or classes_of(_label_values(folder, column, files), schema.field(column).type, f"column {column}")
            for feature, column in columns.items()
            if feature.startswith(LABEL)
        }
        groups = {split: _groups(found) for split, found in tables.items()}
        held_out = held_out_share(splits, folder, options, "0.2")
        return Listing(
            name=base_name(folder.url),
            features=_features(folder, columns, groups, options)
            | {feature: LabelFeature(classes=tuple(names)) for feature, names in own.items()},
            classes=tuple(classes),
            licence="not stated: see the source",
            origin=str(src),
            units=_units(
                groups, held_out, seed, shard_rows, {"src": src, "columns": columns, "classes": classes, "own": own}
            ),
            notes=(*_column_notes(columns, schema, classes), *split_notes(splits, held_out), *found.notes()),
            rejected=tuple(found.rejected),
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's row groups, one at a time."""
        content = unit.content
        folder, columns = open_folder(content["src"]), content["columns"]
        index = {name: number for number, name in enumerate(content["classes"])}
        own = {feature: (names, {name: n for n, name in enumerate(names)}) for feature, names in content["own"].items()}
        for place in content["places"]:
            group = Group(*place)
            rows = _rows_of(group, unit)
            try:
                table = _read(folder, group.name, group.number, columns)
            except (OSError, pa.ArrowException) as error:
                raise_unanswered(error)
                reason = f"unreadable row group: {first_line(error, 120)}"
                yield from (Rejected(row_key(group.name, group.number, row), reason) for row in rows)
                continue
            for row in rows:
                key = row_key(group.name, group.number, row)
                try:
                    sample = {feature: _value(table.column(feature)[row].as_py()) for feature in columns}
                    if targets := [feature for feature in columns if feature.startswith(TARGET)]:
                        cells = {columns[feature]: sample.pop(feature) for feature in targets}
                        sample["target"] = target_values(cells, [columns[feature] for feature in targets])
                    if missing := [name for name, value in sample.items() if value is None and name not in own]:
                        raise ValueError(f"no {missing[0]}")
                    if own and all(sample[name] is None for name in own):
                        raise ValueError("no label")
                    for name, (names, numbers) in own.items():
                        if sample[name] is not None:
                            sample[name] = label_number(sample[name], numbers, len(names))
                    if "labels" in sample:
                        several = dict.fromkeys(sample.pop("labels"))
                        sample["label"] = [label_number(one, index, len(content["classes"])) for one in several]
                    elif "label" in sample:
                        sample["label"] = label_number(sample["label"], index, len(content["classes"]))
                except UnicodeDecodeError as error:
                    yield Rejected(key, f"invalid UTF-8: {error.reason}")
                except ValueError as error:
                    yield Rejected(key, str(error))
                else:
                    yield {"key": key, **sample}


def _rows_of(group: Group, unit: Unit) -> list[int]:
    """Return the rows of a row group that belong to the unit's split."""
    if not unit.content["held_out"]:
        return list(range(group.rows))
    cut, total, seed = unit.content["held_out"]
    places = permute(np.arange(group.first, group.first + group.rows), total, keys(seed))
    return np.flatnonzero((places < cut) == (unit.split == "test")).tolist()


def _read(folder: Folder, name: str, group: int, columns: Mapping[str, str]) -> pa.Table:
    """Read the columns of a row group; name them after the features."""
    with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
        for feature, column in columns.items():
            suitable = KINDS[re.split("[:_]", feature)[0]]
            if column not in file.schema_arrow.names or not suitable(file.schema_arrow.field(column).type):
                raise pa.ArrowTypeError(f"no column {column} for {feature}")
        table = file.read_row_group(group, columns=list(columns.values()), use_threads=False)
    return table.select(list(columns.values())).rename_columns(list(columns))


def _metadata(folder: Folder, name: str) -> pq.FileMetaData:
    """Read the footer of a file."""
    try:
        with folder.fs.open(folder.file(name), "rb") as stream:
            return pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as error:
        raise_unanswered(error)
        where, reason = f"{folder.url}/{name}", first_line(error, 120)
        raise UserError(
            f"{where} is truncated, not readable, or not a Parquet file ({reason}): download it again, or move it away"
        ) from error


def find_columns(schema: pa.Schema, options: Mapping[str, str]) -> dict[str, str]:
    """Return the table's column for each feature.

    Raises:
        UserError: a column does not exist, exists twice, or has a type that cannot be the feature; or there are neither
            images nor texts.
    """
    columns = {}
    for feature in ("image", "text", "label", "labels"):
        suitable = KINDS[feature]
        name = options.get(feature, feature)
        if schema.names.count(name) > 1:
            raise UserError(f"column {name} exists {schema.names.count(name)} times: rename the others")
        if feature == "labels" and feature not in options and name in schema.names:
            name = name if is_labels(schema.field(name).type) and "label" not in columns else ""
        if feature == "label" and name not in schema.names and "," in name:
            several = label_columns(options, schema.names, "the table")
            for column in several.values():
                if not is_label(kind := schema.field(column).type):
                    raise unsuitable("label", column, kind, WANTED["label"], _suitable(schema, is_label))
            columns |= several
            continue
        if name in schema.names:
            kind = schema.field(name).type
            if not suitable(kind):
                raise unsuitable(feature, name, kind, WANTED[feature], _suitable(schema, suitable))
            columns[feature] = name
        elif name and feature in options:
            raise UserError(
                f"option {feature}={name}: no such column; the table has "
                + ", ".join(f"{field.name} ({field.type})" for field in schema)
            )
    if {"label", "labels"} <= columns.keys():
        raise UserError("the table has label and labels: leave one out, for example --option labels=")
    for name in target_columns(options, schema.names, "the table"):
        kind = schema.field(name).type
        if not is_number(kind):
            raise unsuitable("target", name, kind, WANTED["target"], _suitable(schema, is_number))
        columns[f"{TARGET}{name}"] = name
    if not columns.keys() & {"image", "text"}:
        raise UserError(
            f"no images or texts in the columns {', '.join(schema.names)}: set --option image=COLUMN or"
            " --option text=COLUMN"
        )
    return columns


def _suitable(schema: pa.Schema, suitable: Callable[[pa.DataType], bool]) -> list[str]:
    return [field.name for field in schema if suitable(field.type)]


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_number(kind: pa.DataType) -> bool:
    """Return whether values of a type are numbers."""
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    )


TARGET = "target:"
"""Begins the key of a target's column among the columns of features."""
KINDS = {"image": _is_image, "text": is_text, "label": is_label, "labels": is_labels, "target": is_number}
WANTED = {
    "image": "binary or a struct with the field bytes",
    "text": "string",
    "label": "a whole number, boolean, string or dictionary",
    "labels": "a list of whole numbers, booleans, strings or dictionaries",
    "target": "a number",
}


def class_names(
    folder: Folder, schema: pa.Schema, columns: Mapping[str, str], tables: Sequence[Table], options: Mapping[str, str]
) -> list[str]:
    """Return the names of the classes, by label.

    Raises:
        UserError: the files disagree, or the labels cannot be numbered, see `_labels`.
    """
    column = columns.get("label") or columns.get("labels")
    if column is None:
        return []
    if "classes" in options:
        return options["classes"].split(",")
    where, kind = f"{folder.url}: column {column}", schema.field(column).type
    kind = kind.value_type if is_labels(kind) else kind
    return same_names({table.name: table.classes for table in tables}, where) or classes_of(
        _label_values(folder, column, [table.name for table in tables]), kind, where
    )


def _label_values(folder: Folder, column: str, files: list[str]) -> Iterator[set[Any]]:
    """Yield the different labels of each file; a row group that cannot be read is rejected when it is prepared."""
    for name in files:
        with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
            kind = file.schema_arrow.field(column).type if column in file.schema_arrow.names else pa.null()
            if not is_label(kind) and not is_labels(kind):
                continue
            for group in range(file.num_row_groups):
                try:
                    values = file.read_row_group(group, columns=[column], use_threads=False).column(0)
                    yield {value for chunk in values.chunks for value in _flat(chunk, kind).unique().to_pylist()}
                except (OSError, ValueError, pa.ArrowException) as error:
                    raise_unanswered(error)


def _flat(chunk: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return the labels of a chunk, of lists those in them."""
    return chunk.flatten() if is_labels(kind) else chunk


def _features(
    folder: Folder, columns: Mapping[str, str], groups: Mapping[str, Sequence[Group]], options: Mapping[str, str]
) -> dict[str, Any]:
    """Return the features; those of images by looking at a few."""
    features: dict[str, Any] = {"text": TextFeature(), "label": LabelFeature()}
    if "labels" in columns:
        features["label"] = LabelsFeature()
    if "image" in columns:
        features["image"] = image_feature(
            options, [partial(io.BytesIO, image) for image in _images(folder, columns, groups)]
        )
    named = ["label" if name == "labels" else name for name in columns]
    found = {name: features[name] for name in named if name in features}
    if targets := [name for feature, name in columns.items() if feature.startswith(TARGET)]:
        found["target"] = target_feature(targets)
    return found


def _images(folder: Folder, columns: Mapping[str, str], groups: Mapping[str, Sequence[Group]]) -> list[bytes]:
    """Return the first images; none if they cannot be read."""
    group = next((group for found in groups.values() for group in found if group.rows), None)
    if group is None:
        return []
    try:
        with folder.fs.open(folder.file(group.name), "rb") as stream, pq.ParquetFile(stream) as file:
            batch = next(file.iter_batches(PROBE, row_groups=[group.number], columns=[columns["image"]]))
        return [_value(image) or b"" for image in batch.column(0).to_pylist()]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise_unanswered(error)
        return []


def _column_notes(columns: Mapping[str, str], schema: pa.Schema, classes: Sequence[str]) -> tuple[str, ...]:
    kinds = {name: str(schema.field(name).type).partition("<")[0] for name in columns.values()}
    taken = ", ".join(f"{feature} from {name} ({kinds[name]})" for feature, name in columns.items())
    others = [name for name in schema.names if name not in columns.values()]
    notes = [f"columns: {taken}" + (f"; not used: {', '.join(others)}" if others else "")]
    return (*notes, *class_notes(classes)) if {"label", "labels"} & columns.keys() else tuple(notes)


def read_facts(folder: Folder, name: str, label: str) -> Table:
    """Read the footer of a file; `label` is the column of the labels, empty without.

    Raises:
        UserError: it is not Parquet, or a row group is too large.
    """
    footer = _metadata(folder, name)
    rows = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        if not 0 <= group.num_rows <= MAX_ROWS or group.total_byte_size > MAX_BYTES:
            raise UserError(
                f"{folder.url}/{name}: row group {number} has {group.num_rows:,} rows and "
                f"{group.total_byte_size:,} bytes, wanted up to {MAX_ROWS:,} and {MAX_BYTES:,}"
            )
        rows.append(group.num_rows)
    return Table(name, rows, stored_names(footer.schema.to_arrow_schema().metadata, label))


def _groups(tables: Sequence[Table]) -> list[Group]:
    """Return the row groups of some files, in order."""
    groups: list[Group] = []
    first = 0
    for table in tables:
        for number, rows in enumerate(table.rows):
            groups.append(Group(table.name, number, rows, first))
            first += rows
    return groups


def _units(
    splits: Mapping[str, list[Group]], held_out: float, seed: int, shard_rows: int, content: Mapping[str, Any]
) -> list[Unit]:
    """Return units of row groups in random order, gathered up to `shard_rows` rows; a larger group is one unit."""
    parts = {split: (groups, 1.0) for split, groups in splits.items()}
    exact = None
    if held_out:
        groups = splits["train"]
        total = sum(group.rows for group in groups)
        exact = [min(max(1, round(held_out * total)), total - 1), total, seed] if total > 1 else None
    if exact:
        parts = {"train": (splits["train"], 1 - held_out), "test": (splits["train"], held_out)}
    units: list[Unit] = []
    for split, (groups, taken) in parts.items():
        shuffled = list(groups)
        random.Random(seed).shuffle(shuffled)
        units += [
            Unit(split, {**content, "held_out": exact, "places": places})
            for places in _gathered(shuffled, int(shard_rows / taken))
        ]
    return units


def _gathered(groups: Sequence[Group], rows: int) -> Iterator[list[Group]]:
    """Yield groups together, up to a number of rows."""
    unit: list[Group] = []
    size = 0
    for group in groups:
        if unit and size + group.rows > rows:
            yield unit
            unit, size = [], 0
        unit.append(group)
        size += group.rows
    if unit:
        yield unit


def _value(value: Any) -> Any:
    return value["bytes"] if isinstance(value, dict) else value


source = TableSource()
