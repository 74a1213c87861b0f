"""Parquet tables with one row per sample, in the layout of data hubs: `SRC/**/train-*.parquet`, `test-*.parquet`, ...

Options name the columns; the defaults are `image` (binary, or a struct with `bytes`), `text` (string) and `label`
(integer or string). Class names come from the option `classes` (with commas), from the metadata that the Hugging Face
libraries write, or, for string labels, from the labels.
"""

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, raise_unanswered
from pipelines.features import ImageFeature, LabelFeature, TextFeature
from pipelines.shards.parquet import MAX_BYTES, row_key
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, channels, find_files, numbered_classes, source_folder, split_of

OPTIONS = ("image", "text", "label", "classes", "channels")

MAX_ROWS = 10_000_000
"""Limit of a row group, which is read as a whole; that of its bytes is `MAX_BYTES`."""

GroupLocation = tuple[str, int, int]
"""A file relative to the source folder, a row group, and its rows."""


class TableSource:
    """The source: Parquet files. Row groups are shuffled over the shards; rows keep their order within them."""

    title = "Parquet tables with a row per sample (images as bytes, or texts; SRC/train-*.parquet, SRC/test-*.parquet)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the row groups below `src`."""
        refuse_options(options, OPTIONS)
        folder = source_folder("table", src, "train-*.parquet, test-*.parquet, ...")
        files = find_tables(folder)
        schema = _metadata(folder, files[0][1]).schema.to_arrow_schema()
        columns = find_columns(schema, options)
        classes = class_names(folder, schema, columns, [name for _, name in files], options)
        units = [
            Unit(split, {"src": src, "columns": columns, "classes": classes, "places": places})
            for split in dict.fromkeys(split for split, _ in files)
            for places in _units(folder, [name for found, name in files if found == split], seed, shard_rows)
        ]
        known = {"image": ImageFeature(channels=channels(options)), "text": TextFeature(), "label": LabelFeature()}
        features = {name: feature for name, feature in known.items() if name in columns}
        return Listing(base_name(folder.url), features, tuple(classes), "not stated: see the source", str(src), units)

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's row groups, one at a time."""
        content = unit.content
        folder, columns = open_folder(content["src"]), content["columns"]
        index = {name: number for number, name in enumerate(content["classes"])}
        for name, group, rows in content["places"]:
            try:
                table = _read(folder, name, group, columns)
            except (OSError, pa.ArrowException) as error:
                raise_unanswered(error)
                reason = first_line(error, 120)
                yield from (
                    Rejected(row_key(name, group, row), f"unreadable row group: {reason}") for row in range(rows)
                )
                continue
            for row in range(table.num_rows):
                key = row_key(name, group, row)
                try:
                    sample = {feature: _value(table.column(feature)[row].as_py()) for feature in columns}
                except UnicodeDecodeError as error:
                    yield Rejected(key, f"invalid UTF-8: {error.reason}")
                    continue
                if isinstance(sample.get("label"), str):
                    sample["label"] = index.get(sample["label"], -1)
                yield {"key": key, **sample}


def _read(folder: Folder, name: str, group: int, columns: Mapping[str, str]) -> pa.Table:
    """Read the columns of a row group; name them after the features."""
    with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
        for feature, column in columns.items():
            if column not in file.schema_arrow.names or not KINDS[feature](file.schema_arrow.field(column).type):
                raise pa.ArrowTypeError(f"no column {column} for {feature}")
        table = file.read_row_group(group, columns=list(columns.values()), use_threads=False)
    return table.select(list(columns.values())).rename_columns(list(columns))


def find_tables(folder: Folder) -> list[tuple[str, str]]:
    """Return (split, file) of all Parquet files, train first; a file whose name gives no split belongs to train."""
    names = find_files(folder, (".parquet",))
    if not names:
        raise UserError(f"no .parquet files below {folder.url}: wanted train-*.parquet, test-*.parquet, ...")
    splits = [(split_of(name), name) for name in names]
    return sorted(splits, key=lambda item: (item[0] != "train", item))


def _metadata(folder: Folder, name: str) -> pq.FileMetaData:
    """Read the footer of a file."""
    try:
        with folder.fs.open(folder.file(name), "rb") as stream:
            return pq.read_metadata(stream)
    except pa.ArrowException as error:
        where, reason = f"{folder.url}/{name}", first_line(error, 120)
        raise UserError(
            f"{where} is truncated or not a Parquet file ({reason}): download it again, or move it away"
        ) from error


def find_columns(schema: pa.Schema, options: Mapping[str, str]) -> dict[str, str]:
    """Return the table's column for each feature."""
    columns = {}
    for feature, kinds in KINDS.items():
        name = options.get(feature, feature)
        if name in schema.names and kinds(schema.field(name).type):
            columns[feature] = name
        elif feature in options:
            raise UserError(
                f"option {feature}={name}: no such column of a suitable type; the table has "
                + ", ".join(f"{field.name} ({field.type})" for field in schema)
            )
    if not columns.keys() & {"image", "text"}:
        raise UserError(
            f"no images or texts in the columns {', '.join(schema.names)}: set --option image=COLUMN or"
            " --option text=COLUMN"
        )
    return columns


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_label(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or _is_text(kind)


KINDS = {"image": _is_image, "text": _is_text, "label": _is_label}


def class_names(
    folder: Folder, schema: pa.Schema, columns: Mapping[str, str], files: list[str], options: Mapping[str, str]
) -> list[str]:
    """Return the names of the classes, by label."""
    if "label" not in columns:
        return []
    if "classes" in options:
        return options["classes"].split(",")
    facts = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = facts.get("info", {}).get("features", {}).get(columns["label"], {}).get("names")
    if names:
        return list(names)
    found: set[Any] = set()
    for name in files:
        with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
            if columns["label"] in file.schema_arrow.names:
                for batch in file.iter_batches(columns=[columns["label"]]):
                    found |= set(batch.column(0).unique().to_pylist())
    found.discard(None)
    if not all(isinstance(label, str) for label in found):
        if min(found) < 0:
            raise UserError(f"label {min(found)} in column {columns['label']}: wanted 0, 1, 2, ... or strings")
        return numbered_classes(max(found), f"{folder.url}: column {columns['label']}")
    return sorted(found)


def _units(folder: Folder, files: list[str], seed: int, shard_rows: int) -> Iterator[list[GroupLocation]]:
    """Yield row groups in random order, gathered up to `shard_rows` rows; a larger group is one unit."""
    places: list[GroupLocation] = []
    for name in files:
        facts = _metadata(folder, name)
        for number in range(facts.num_row_groups):
            group = facts.row_group(number)
            if not 0 <= group.num_rows <= MAX_ROWS or group.total_byte_size > MAX_BYTES:
                raise UserError(
                    f"{folder.url}/{name}: row group {number} has {group.num_rows:,} rows and "
                    f"{group.total_byte_size:,} bytes, wanted up to {MAX_ROWS:,} and {MAX_BYTES:,}"
                )
            places.append((name, number, group.num_rows))
    random.Random(seed).shuffle(places)
    unit: list[GroupLocation] = []
    rows = 0
    for place in places:
        if unit and rows + place[2] > shard_rows:
            yield unit
            unit, rows = [], 0
        unit.append(place)
        rows += place[2]
    if unit:
        yield unit


def _value(value: Any) -> Any:
    return value["bytes"] if isinstance(value, dict) else value


source = TableSource()
