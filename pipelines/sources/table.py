"""Parquet tables with one row per sample, in the layout of data hubs: `SRC/**/train-*.parquet`, `test-*.parquet`, ...

Options name the columns; the defaults are `image`, `audio` and `video` (binary, or a struct with `bytes` and `path`),
`points` (lists of coordinates), `series` (numbers, or lists of them), `text` (string) and `label` (whole number,
boolean, string, or a dictionary of these); `split` and `group` divide the rows. Class names come from the option
`classes` (with commas), from the metadata that the Hugging Face libraries write, or from the labels.
"""

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, raise_unanswered
from pipelines.features import AudioFeature, Feature, LabelFeature, PointsFeature, TextFeature, VideoFeature
from pipelines.order.permutation import keys, permute
from pipelines.shards.parquet import MAX_BYTES, row_key
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, number, source_folder
from pipelines.sources._division import COLUMNS, Division, divide
from pipelines.sources._files import look, read_below, unreadable
from pipelines.sources._labels import classes_of, is_label, is_text, label_number, same_names, stored_names, unsuitable
from pipelines.sources._layout import class_notes, held_out_share, split_notes, splits_of_files
from pipelines.sources._probe import PROBE, image_feature
from pipelines.sources._series import ReadFile, SeriesColumns, counted_columns, series_columns, series_names
from pipelines.transforms import BadSample
from pipelines.transforms.points import points_of_rows

INPUTS = ("image", "audio", "video", "points", "text")
OPTIONS = (*INPUTS, "label", "classes", "channels", "features", "held_out", "splits", *COLUMNS, "series", "length")

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

    Options: `image`, `audio`, `video`, `points`, `text`, `label` (columns; empty: without), `series` (columns of
    numbers with commas, or `all`, see `_series`), `length` (its steps, or `any`), `split` (the column of each row's
    split), `group` (rows with the same value stay in one split), `classes` (names with commas), `features` (columns of
    a point after x, y, z), `channels` (1 or 3; default: as found), `held_out` (share of the rows, 0.2 if no file is
    named after a split), `splits` (`names` or `none`, see `_layout.splits_of_files`).
    """

    title = "Parquet tables with a row per sample (media as bytes, texts, numbers; SRC/train-*.parquet, ...)"

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
        series = find_series(folder, schema, files[0], columns, options)
        check_input(schema, [*columns, *["series"] * (series is not None)])
        label = columns.get("label", "")
        tables = {
            split or "train": [read_facts(folder, name, label) for name in names] for split, names in splits.items()
        }
        classes = class_names(folder, schema, columns, [table for found in tables.values() for table in found], options)
        groups = {split: _groups(found) for split, found in tables.items()}
        division, shares, notes = divide(folder, splits, columns, options, seed)
        held_out = 0.0 if division.active else held_out_share(splits, folder, options, "0.2")
        content = {"src": src, "columns": columns, "classes": classes, "division": division, "series": series}
        content |= {"features": number(options, "features", 0, least=0)}
        return Listing(
            name=base_name(folder.url),
            features=_features(folder, columns, groups, options) | ({"series": series.feature()} if series else {}),
            classes=tuple(classes),
            licence="not stated: see the source",
            origin=str(src),
            units=_divided(groups, shares, seed, shard_rows, content | {"held_out": None})
            if division.active
            else _units(groups, held_out, seed, shard_rows, content),
            notes=(
                *_column_notes(columns, series, schema, classes),
                *(notes or split_notes(splits, held_out)),
                *found.notes(),
            ),
            rejected=tuple(found.rejected),
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's row groups, one at a time."""
        content = unit.content
        folder, columns = open_folder(content["src"]), content["columns"]
        index = {name: number for number, name in enumerate(content["classes"])}
        division = Division(*content["division"])
        series = SeriesColumns(*content["series"]) if content["series"] else None
        features = [feature for feature in columns if feature not in COLUMNS]
        for place in content["places"]:
            group = Group(*place)
            rows = _rows_of(group, unit)
            try:
                table, numbers = _read(folder, group.name, group.number, columns, series)
            except (OSError, pa.ArrowException) as error:
                raise_unanswered(error)
                if division.active and unit.split != division.first:
                    continue
                reason = f"unreadable row group: {first_line(error, 120)}"
                yield from (Rejected(row_key(group.name, group.number, row), reason) for row in rows)
                continue
            if division.active:
                rows = division.rows(table, unit.split, f"{group.name}#{group.number}")
            read = partial(read_below, folder, f"{group.name.rpartition('/')[0]}/".removeprefix("/"))
            for row in rows:
                key = row_key(group.name, group.number, row)
                try:
                    sample = {feature: _value(table.column(feature)[row].as_py(), read) for feature in features}
                    if missing := [name for name, value in sample.items() if value is None]:
                        raise ValueError(f"no {missing[0]}")
                    if "label" in sample:
                        sample["label"] = label_number(sample["label"], index, len(content["classes"]))
                    if "points" in sample:
                        sample["points"] = points_of_rows(sample["points"], content["features"]).tobytes()
                    if series:
                        cells = {name: numbers.column(name)[row].as_py() for name in series.columns}
                        sample["series"] = series.read(cells, ";", read)
                except UnicodeDecodeError as error:
                    yield Rejected(key, f"invalid UTF-8: {error.reason}")
                except (BadSample, ValueError) as error:
                    yield Rejected(key, str(error))
                except OSError as error:
                    yield unreadable(key, error)
                else:
                    yield {"key": key, **sample}


def _rows_of(group: Group, unit: Unit) -> list[int]:
    """Return the rows of a row group that belong to the unit's split."""
    if not unit.content["held_out"]:
        return list(range(group.rows))
    cut, total, seed = unit.content["held_out"]
    places = permute(np.arange(group.first, group.first + group.rows), total, keys(seed))
    return np.flatnonzero((places < cut) == (unit.split == "test")).tolist()


def _read(
    folder: Folder, name: str, group: int, columns: Mapping[str, str], series: SeriesColumns | None
) -> tuple[pa.Table, pa.Table]:
    """Read the columns of a row group, named after the features, and those of a series under their own names."""
    numbers = list(series.columns) if series else []
    with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
        for feature, column in columns.items():
            if column not in file.schema_arrow.names or not KINDS[feature](file.schema_arrow.field(column).type):
                raise pa.ArrowTypeError(f"no column {column} for {feature}")
        for column in numbers:
            if column not in file.schema_arrow.names:
                raise pa.ArrowTypeError(f"no column {column} for series")
        wanted = list(dict.fromkeys([*columns.values(), *numbers]))
        table = file.read_row_group(group, columns=wanted, use_threads=False)
    return table.select(list(columns.values())).rename_columns(list(columns)), table.select(numbers)


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
        UserError: a column does not exist, exists twice, or has a type that cannot be the feature.
    """
    columns = {}
    for feature, suitable in KINDS.items():
        name = options.get(feature, feature)
        if schema.names.count(name) > 1:
            raise UserError(f"column {name} exists {schema.names.count(name)} times: rename the others")
        if name in schema.names:
            kind = schema.field(name).type
            if not suitable(kind):
                others = [field.name for field in schema if suitable(field.type)]
                raise unsuitable(feature, name, kind, WANTED[feature], others)
            columns[feature] = name
        elif name and feature in options:
            raise UserError(
                f"option {feature}={name}: no such column; the table has "
                + ", ".join(f"{field.name} ({field.type})" for field in schema)
            )
    return columns


def check_input(schema: pa.Schema, features: Sequence[str]) -> None:
    """Refuse tables without a column for an input."""
    if not {*INPUTS, "series"} & set(features):
        raise UserError(
            f"no input in the columns {', '.join(schema.names)}: set --option image=COLUMN (or audio, video, points,"
            " text, series), or --option series=all for all columns of numbers"
        )


def find_series(
    folder: Folder, schema: pa.Schema, first: str, columns: Mapping[str, str], options: Mapping[str, str]
) -> SeriesColumns | None:
    """Return the columns of the feature `series`, None without; the first file's rows show channels and length."""

    def numeric(name: str) -> bool:
        if schema.names.count(name) > 1:
            return False
        kind = schema.field(name).type
        return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)

    names = series_names(schema.names, columns.values(), numeric, options)
    for name in names:
        if schema.names.count(name) > 1:
            raise UserError(f"column {name} exists {schema.names.count(name)} times: rename the others")
    if not names:
        return None
    read = partial(read_below, folder, f"{first.rpartition('/')[0]}/".removeprefix("/"))
    some = [(cells, read) for cells in _first_rows(folder, Group(first, 0, 0, 0), names)]
    return series_columns(names, some, options, folder.url)


def is_media(kind: pa.DataType) -> bool:
    """Return whether values of a type can be files: bytes, or as hubs store them a struct of bytes and path."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_points(kind: pa.DataType) -> bool:
    """Return whether values of a type can be points: lists of lists."""
    return _is_list(kind) and _is_list(kind.value_type)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


KINDS = {
    **dict.fromkeys(("image", "audio", "video"), is_media),
    "points": is_points,
    "text": is_text,
    "label": is_label,
    **dict.fromkeys(COLUMNS, is_label),
}
WANTED = {
    **dict.fromkeys(("image", "audio", "video"), "binary or a struct with the field bytes"),
    "points": "a list of lists of numbers",
    **dict.fromkeys(COLUMNS, "a whole number, boolean, string or dictionary"),
    "text": "string",
    "label": "a whole number, boolean, string or dictionary",
}


def class_names(
    folder: Folder, schema: pa.Schema, columns: Mapping[str, str], tables: Sequence[Table], options: Mapping[str, str]
) -> list[str]:
    """Return the names of the classes, by label.

    Raises:
        UserError: the files disagree, or the labels cannot be numbered, see `_labels`.
    """
    if "label" not in columns:
        return []
    if "classes" in options:
        return options["classes"].split(",")
    column = columns["label"]
    where = f"{folder.url}: column {column}"
    return same_names({table.name: table.classes for table in tables}, where) or classes_of(
        _label_values(folder, column, [table.name for table in tables]), schema.field(column).type, where
    )


def _label_values(folder: Folder, column: str, files: list[str]) -> Iterator[set[Any]]:
    """Yield the different labels of each file; a row group that cannot be read is rejected when it is prepared."""
    for name in files:
        with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
            if column not in file.schema_arrow.names or not is_label(file.schema_arrow.field(column).type):
                continue
            for group in range(file.num_row_groups):
                try:
                    values = file.read_row_group(group, columns=[column], use_threads=False).column(0)
                    yield set(values.unique().to_pylist())
                except (OSError, ValueError, pa.ArrowException) as error:
                    raise_unanswered(error)


def _features(
    folder: Folder, columns: Mapping[str, str], groups: Mapping[str, Sequence[Group]], options: Mapping[str, str]
) -> dict[str, Feature]:
    """Return the features; those of images by looking at a few."""
    features: dict[str, Feature] = {"text": TextFeature(), "label": LabelFeature()}
    features |= {"audio": AudioFeature(), "video": VideoFeature()}
    features["points"] = PointsFeature(features=number(options, "features", 0, least=0))
    if "image" in columns:
        features["image"] = image_feature(
            options, [partial(io.BytesIO, image) for image in _images(folder, columns, groups)]
        )
    return {name: features[name] for name in columns if name not in COLUMNS}


def _images(folder: Folder, columns: Mapping[str, str], groups: Mapping[str, Sequence[Group]]) -> list[bytes]:
    """Return the first images; none if they cannot be read."""
    group = next((group for found in groups.values() for group in found if group.rows), None)
    if group is None:
        return []
    return [_value(cells[columns["image"]], None) or b"" for cells in _first_rows(folder, group, [columns["image"]])]


def _first_rows(folder: Folder, group: Group, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return columns of the first rows of a row group; none if they cannot be read."""
    try:
        with folder.fs.open(folder.file(group.name), "rb") as stream, pq.ParquetFile(stream) as file:
            return next(file.iter_batches(PROBE, row_groups=[group.number], columns=[*columns])).to_pylist()
    except (OSError, KeyError, StopIteration, pa.ArrowException) as error:
        raise_unanswered(error)
        return []


def _column_notes(
    columns: Mapping[str, str], series: SeriesColumns | None, schema: pa.Schema, classes: Sequence[str]
) -> tuple[str, ...]:
    kinds = {name: str(schema.field(name).type).partition("<")[0] for name in columns.values()}
    taken = ", ".join(f"{feature} from {name} ({kinds[name]})" for feature, name in columns.items())
    used = [*columns.values(), *(series.columns if series else ())]
    others = [name for name in schema.names if name not in used]
    taken += f"{', ' * bool(taken)}series from {counted_columns(series.columns)}" if series else ""
    notes = [f"columns: {taken}" + (f"; not used: {', '.join(others)}" if others else "")]
    return (*notes, *class_notes(classes)) if "label" in columns else tuple(notes)


def read_facts(folder: Folder, name: str, label: str) -> Table:
    """Read the footer of a file; `label` is the column of the labels, empty without.

    Raises:
        UserError: it is not Parquet, or a row group is too large.
    """
    footer = _metadata(folder, name)
    rows = []
    for place in range(footer.num_row_groups):
        group = footer.row_group(place)
        if not 0 <= group.num_rows <= MAX_ROWS or group.total_byte_size > MAX_BYTES:
            raise UserError(
                f"{folder.url}/{name}: row group {place} has {group.num_rows:,} rows and "
                f"{group.total_byte_size:,} bytes, wanted up to {MAX_ROWS:,} and {MAX_BYTES:,}"
            )
        rows.append(group.num_rows)
    return Table(name, rows, stored_names(footer.schema.to_arrow_schema().metadata, label))


def _groups(tables: Sequence[Table]) -> list[Group]:
    """Return the row groups of some files, in order."""
    groups: list[Group] = []
    first = 0
    for table in tables:
        for place, rows in enumerate(table.rows):
            groups.append(Group(table.name, place, rows, first))
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


def _divided(
    splits: Mapping[str, list[Group]],
    shares: Mapping[str, float],
    seed: int,
    shard_rows: int,
    content: Mapping[str, Any],
) -> list[Unit]:
    """Return units whose row groups a column divides: each split reads all of them."""
    groups = [group for found in splits.values() for group in found]
    units: list[Unit] = []
    for split, taken in shares.items():
        shuffled = list(groups)
        random.Random(seed).shuffle(shuffled)
        units += [Unit(split, {**content, "places": places}) for places in _gathered(shuffled, int(shard_rows / taken))]
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


def _value(value: Any, read: ReadFile | None) -> Any:
    """Return a cell; of a struct its bytes, or those of the file that its path names relative to the table."""
    if not isinstance(value, dict):
        return value
    if value["bytes"] is None and value.get("path") and read:
        return read(value["path"])
    return value["bytes"]


source = TableSource()
