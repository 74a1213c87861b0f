"""Parquet tables with one row a sample, as data hubs lay them out: `SRC/**/train-*.parquet`, `test-*.parquet`, ...

Options name the columns; left out, they are found: `image` (binary, or a struct with `bytes`), `text` (string),
`label` (integer, or string). Class names come from the option `classes` (with commas), from the metadata that the
Hugging Face libraries write, or, for string labels, from the labels themselves.
"""

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from pipelines.features import Feature, ImageFeature, LabelFeature, TextFeature
from pipelines.sources import Listing, Sample, Unit, refuse_options
from pipelines.storage import Folder, open_folder

OPTIONS = ("image", "text", "label", "classes", "channels")
SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "val", "valid": "val", "val": "val",
          "dev": "val"}

Place = tuple[str, int]
"""A file relative to the source folder, and a row group."""


class Table:
    """The source: Parquet files. Row groups are shuffled over the shards; rows keep their order within them."""

    title = "Parquet tables with a row a sample (images as bytes, or texts; SRC/train-*.parquet, SRC/test-*.parquet)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the row groups below `src`.

        Raises:
            UserError: no Parquet files, columns that are missing or of another type, no class names.
        """
        refuse_options(options, OPTIONS)
        if src is None:
            raise UserError("source table needs a source folder: perceiver prepare table SRC DST")
        folder = open_folder(src)
        files = find_tables(folder)
        schema = _schema(folder, files[0][1])
        columns = find_columns(schema, options)
        classes = class_names(folder, schema, columns, [name for _, name in files], options)
        units = [Unit(split, {"src": src, "columns": columns, "classes": classes, "places": places})
                 for split in dict.fromkeys(split for split, _ in files)
                 for places in _units(folder, [name for found, name in files if found == split], seed, shard_rows)]
        features: dict[str, Feature] = {}
        if "image" in columns:
            features["image"] = ImageFeature(channels=_channels(options))
        if "text" in columns:
            features["text"] = TextFeature()
        if "label" in columns:
            features["label"] = LabelFeature()
        return Listing(src.rstrip("/").rsplit("/", 1)[-1], features, tuple(classes), "not stated: see the source", src,
                       units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Read the unit's row groups, one at a time."""
        content = unit.content
        folder, columns = open_folder(content["src"]), content["columns"]
        index = {name: number for number, name in enumerate(content["classes"])}
        for name, group in content["places"]:
            with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
                table = file.read_row_group(group, columns=list(columns.values()), use_threads=False)
            for row, values in enumerate(table.to_pylist()):
                sample = {feature: _value(values[column]) for feature, column in columns.items()}
                if isinstance(sample.get("label"), str):
                    sample["label"] = index.get(sample["label"], -1)
                yield {"key": f"{name}#{group}.{row}", **sample}


def find_tables(folder: Folder) -> list[tuple[str, str]]:
    """(split, file) of all Parquet files, train first; a file whose name tells no split belongs to train.

    Raises:
        UserError: there are none.
    """
    root = folder.path.rstrip("/") + "/"
    names = sorted(path[len(root):] for path in folder.fs.find(folder.path) if path.endswith(".parquet"))
    if not names:
        raise UserError(f"no .parquet files below {folder.url}: wanted train-*.parquet, test-*.parquet, ...")
    splits = [(_split_of(name), name) for name in names]
    return sorted(splits, key=lambda item: (item[0] != "train", item))


def _split_of(name: str) -> str:
    """By the beginning of the file's name, else by the name of a folder above it."""
    words = [name.rsplit("/", 1)[-1].split(".")[0].split("-")[0].split("_")[0], *reversed(name.split("/")[:-1])]
    return next((SPLITS[word] for word in words if word in SPLITS), "train")


def _schema(folder: Folder, name: str) -> pa.Schema:
    with folder.fs.open(folder.file(name), "rb") as stream:
        return pq.read_schema(stream)


def find_columns(schema: pa.Schema, options: Mapping[str, str]) -> dict[str, str]:
    """The table's column for each feature.

    Raises:
        UserError: a column named by an option is missing, or nothing is found to learn from.
    """
    columns = {}
    for feature, kinds in (("image", _is_image), ("text", _is_text), ("label", _is_label)):
        name = options.get(feature, feature)
        if name in schema.names and kinds(schema.field(name).type):
            columns[feature] = name
        elif feature in options:
            raise UserError(f"option {feature}={name}: no such column of a fitting type; the table has "
                            + ", ".join(f"{field.name} ({field.type})" for field in schema))
    if not columns.keys() & {"image", "text"}:
        raise UserError(f"neither images nor texts in columns {', '.join(schema.names)}: name one by --option"
                        " image=COLUMN or --option text=COLUMN")
    return columns


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_label(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or _is_text(kind)


def class_names(folder: Folder, schema: pa.Schema, columns: Mapping[str, str], files: list[str],
                options: Mapping[str, str]) -> list[str]:
    """Names of the classes, by label.

    Raises:
        UserError: labels are numbers and nothing names them.
    """
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
        with folder.fs.open(folder.file(name), "rb") as stream:
            found |= set(pq.read_table(stream, columns=[columns["label"]]).column(0).unique().to_pylist())
    found.discard(None)
    if not all(isinstance(label, str) for label in found):
        if min(found) < 0:
            raise UserError(f"labels go down to {min(found)}: wanted 0, 1, 2, ... or strings, in column"
                            f" {columns['label']}")
        return [str(number) for number in range(max(found) + 1)]
    return sorted(found)


def _channels(options: Mapping[str, str]) -> int:
    channels = options.get("channels", "3")
    if channels not in ("1", "3"):
        raise UserError(f"option channels={channels}: wanted 1 (grey) or 3 (RGB)")
    return int(channels)


def _units(folder: Folder, files: list[str], seed: int, shard_rows: int) -> Iterator[list[Place]]:
    """Row groups in a random order, gathered up to `shard_rows` rows (a larger group is a unit of its own)."""
    places: list[tuple[Place, int]] = []
    for name in files:
        with folder.fs.open(folder.file(name), "rb") as stream:
            facts = pq.read_metadata(stream)
        places += [((name, group), facts.row_group(group).num_rows) for group in range(facts.num_row_groups)]
    random.Random(seed).shuffle(places)
    unit: list[Place] = []
    rows = 0
    for place, count in places:
        if unit and rows + count > shard_rows:
            yield unit
            unit, rows = [], 0
        unit.append(place)
        rows += count
    if unit:
        yield unit


def _value(value: Any) -> Any:
    return value["bytes"] if isinstance(value, dict) else value


source = Table()
