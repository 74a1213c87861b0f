"""Parquet tables with one row per sample, in the layout of data hubs: `SRC/**/train-*.parquet`, `test-*.parquet`, ...

Options name the columns; the defaults are `image`, `audio` and `video` (binary, or a struct with `bytes` and `path`),
`points` (lists of coordinates), `series` (numbers, or lists of them), `text` (string), `label` (whole number, boolean,
string, or a dictionary of these) and `labels` (lists of these); `target` names columns of numbers to predict, `split`
and `group` divide the rows. Class names come from the option `classes` (with commas), from the metadata that the
Hugging Face libraries write, or from the labels.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, raise_unanswered
from pipelines.features import (
    AudioFeature,
    Feature,
    LabelFeature,
    LabelsFeature,
    PointsFeature,
    TextFeature,
    VideoFeature,
)
from pipelines.shards.parquet import row_key
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._columns import INPUTS, MORE_TEXT, TARGET, check_input, check_once, find_columns, fits, is_number
from pipelines.sources._common import base_name, number, source_folder
from pipelines.sources._division import COLUMNS, Division, divide
from pipelines.sources._files import look, others_version, read_below, unreadable
from pipelines.sources._labels import (
    LabelValue,
    classes_of,
    is_label,
    is_labels,
    is_text,
    label_number,
    same_names,
    stored_names,
)
from pipelines.sources._layout import class_notes, held_out_share, split_notes, splits_of_files
from pipelines.sources._probe import image_feature
from pipelines.sources._row_groups import (
    Group,
    Table,
    divided_units,
    first_rows,
    groups_of,
    metadata,
    read_facts,
    rows_of,
    units_of,
)
from pipelines.sources._series import ReadFile, SeriesColumns, counted_columns, series_columns, series_names
from pipelines.sources._targets import LABEL, target_feature, target_values, texts_of
from pipelines.transforms import BadSample
from pipelines.transforms.points import points_of_rows

OPTIONS = (
    *(*INPUTS, "series", "label", "labels", "target", *COLUMNS),
    *("classes", "channels", "features", "length", "held_out", "splits"),
)


class TableSource:
    """The source: Parquet files. Row groups are shuffled over the shards; rows keep their order within them.

    Options: `image`, `audio`, `video`, `points`, `text`, `label`, `labels` (columns, `labels` of lists; `label` of
    several columns: labels with classes of their own; `text` of several: read one after the other, with SEP between
    them; empty: without), `series` (columns of numbers with commas, or
    `all`, see `_series`), `length` (its steps, or `any`), `target` (columns of numbers, with commas), `split` (the
    column of each row's split), `group` (rows with the same value stay in one split), `classes` (names with commas),
    `features` (columns of a point after x, y, z), `channels` (1 or 3; default: as found), `held_out` (share of the
    rows, 0.2 if no file is named after a split), `splits` (`names` or `none`, see `_layout.splits_of_files`).
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
        schema = metadata(folder, files[0]).schema.to_arrow_schema()
        columns = find_columns(schema, options)
        series = find_series(folder, schema, files[0], columns, options)
        check_input(schema, [*columns, *["series"] * (series is not None)])
        label = columns.get("label") or columns.get("labels", "")
        tables = {
            split or "train": [read_facts(folder, name, label) for name in names] for split, names in splits.items()
        }
        classes = class_names(folder, schema, columns, [table for found in tables.values() for table in found], options)
        own = {
            feature: _names_in_files(folder, files, column)
            or classes_of(_label_values(folder, column, files), schema.field(column).type, f"column {column}")
            for feature, column in columns.items()
            if feature.startswith(LABEL)
        }
        groups = {split: groups_of(found) for split, found in tables.items()}
        division, shares, notes = divide(folder, splits, columns, options, seed)
        held_out = 0.0 if division.active else held_out_share(splits, folder, options, "0.2")
        content = {"src": src, "columns": columns, "classes": classes, "own": own, "series": series}
        named = others_version(folder) if _names_files(schema, columns, series) else ""
        content |= {"named": named, "division": division, "features": number(options, "features", 0, least=0)}
        return Listing(
            name=base_name(folder.url),
            features=_features(folder, columns, groups, options)
            | {feature: LabelFeature(classes=tuple(names)) for feature, names in own.items()}
            | ({"series": series.feature()} if series else {}),
            classes=tuple(classes),
            licence="not stated: see the source",
            origin=str(src),
            units=divided_units(groups, shares, seed, shard_rows, content | {"held_out": None})
            if division.active
            else units_of(groups, held_out, seed, shard_rows, content),
            notes=(
                *_column_notes(columns, series, schema, classes),
                *(notes or split_notes(splits, held_out)),
                *found.notes(),
            ),
            rejected=tuple(found.rejected),
            versions=found.versions | ({named: named} if named else {}),
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's row groups, one at a time."""
        reader = RowReader(unit.content)
        folder, division = open_folder(unit.content["src"]), Division(*unit.content["division"])
        for place in unit.content["places"]:
            group = Group(*place)
            rows = rows_of(group, unit)
            try:
                table, numbers = _read(folder, group.name, group.number, reader.columns, reader.series)
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
                    sample = reader(table, numbers, row, read)
                except UnicodeDecodeError as error:
                    yield Rejected(key, f"invalid UTF-8: {error.reason}")
                except (BadSample, ValueError) as error:
                    yield Rejected(key, str(error))
                except OSError as error:
                    yield unreadable(key, error)
                else:
                    yield {"key": key, **sample}


class RowReader:
    """Reads the features of rows.

    Args:
        content: of the unit.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.columns: Mapping[str, str] = content["columns"]
        self.series = SeriesColumns(*content["series"]) if content["series"] else None
        self.point_features: int = content["features"]
        self.numbered = _numbering(content["classes"])
        self.own = {feature: _numbering(names) for feature, names in content["own"].items()}
        self.targets = [column for feature, column in self.columns.items() if feature.startswith(TARGET)]
        self.texts = [feature for feature in self.columns if feature.startswith(MORE_TEXT)]
        others = {*COLUMNS, *self.texts}
        self.features = [
            feature for feature in self.columns if feature not in others and not feature.startswith(TARGET)
        ]

    def __call__(self, table: pa.Table, numbers: pa.Table, row: int, read: ReadFile) -> dict[str, Any]:
        """Return what is stored; raise `ValueError`, `BadSample` or `OSError` if the row cannot be used.

        Args:
            table, numbers: see `_read`.
            row: its number in the row group.
            read: reads a file that a cell names.
        """
        sample = {feature: _value(table.column(feature)[row].as_py(), read) for feature in self.features}
        if missing := [name for name, value in sample.items() if value is None and name not in self.own]:
            raise ValueError(f"no {missing[0]}")
        if self.own and all(sample[name] is None for name in self.own):
            raise ValueError("no label")
        if self.texts:
            sample["text"] = texts_of(table.column(name)[row].as_py() for name in ("text", *self.texts))
        for name, numbered in self.own.items():
            if sample[name] is not None:
                sample[name] = numbered(sample[name])
        if "labels" in sample:
            sample["label"] = [self.numbered(one) for one in dict.fromkeys(sample.pop("labels"))]
        elif "label" in sample:
            sample["label"] = self.numbered(sample["label"])
        if "points" in sample:
            sample["points"] = points_of_rows(sample["points"], self.point_features).tobytes()
        if self.targets:
            cells = {name: table.column(f"{TARGET}{name}")[row].as_py() for name in self.targets}
            sample["target"] = target_values(cells, self.targets)
        if self.series:
            cells = {name: numbers.column(name)[row].as_py() for name in self.series.columns}
            sample["series"] = self.series.read(cells, ";", read)
        return sample


def _numbering(names: Sequence[str]) -> Callable[[LabelValue], int]:
    """Return what numbers the labels of some classes, of which several may have one name; see `label_number`."""
    return partial(label_number, index={name: place for place, name in enumerate(names)}, classes=len(names))


def _read(
    folder: Folder, name: str, group: int, columns: Mapping[str, str], series: SeriesColumns | None
) -> tuple[pa.Table, pa.Table]:
    """Read the columns of a row group, named after the features, and those of a series under their own names."""
    numbers = list(series.columns) if series else []
    with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
        for feature, column in columns.items():
            if not fits(feature, file.schema_arrow, column):
                raise pa.ArrowTypeError(f"no column {column} for {feature}")
        for column in numbers:
            if column not in file.schema_arrow.names:
                raise pa.ArrowTypeError(f"no column {column} for series")
        wanted = list(dict.fromkeys([*columns.values(), *numbers]))
        table = file.read_row_group(group, columns=wanted, use_threads=False)
    return table.select(list(columns.values())).rename_columns(list(columns)), table.select(numbers)


def find_series(
    folder: Folder, schema: pa.Schema, first: str, columns: Mapping[str, str], options: Mapping[str, str]
) -> SeriesColumns | None:
    """Return the columns of the feature `series`, None without; the first file's rows show channels and length."""

    def numeric(name: str) -> bool:
        return schema.names.count(name) == 1 and is_number(schema.field(name).type)

    names = series_names(schema.names, columns.values(), numeric, options)
    for name in names:
        check_once(schema, name)
    if not names:
        return None
    read = partial(read_below, folder, f"{first.rpartition('/')[0]}/".removeprefix("/"))
    some = [(cells, read) for cells in first_rows(folder, Group(first, 0, 0, 0), names)]
    return series_columns(names, some, options, folder.url)


def _names_files(schema: pa.Schema, columns: Mapping[str, str], series: SeriesColumns | None) -> bool:
    """Return whether cells may name files: those of structs with paths, and texts of a series."""
    structs = any(pa.types.is_struct(schema.field(name).type) for name in columns.values())
    return structs or any(is_text(schema.field(name).type) for name in (series.columns if series else ()))


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


def _names_in_files(folder: Folder, files: Sequence[str], column: str) -> list[str]:
    """Return the class names of a column that all files store; refuse files that differ, see `same_names`."""
    stored = {name: stored_names(metadata(folder, name).schema.to_arrow_schema().metadata, column) for name in files}
    return same_names(stored, f"{folder.url}: column {column}")


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
) -> dict[str, Feature]:
    """Return the features; those of images by looking at a few."""
    features: dict[str, Feature] = {"text": TextFeature(), "audio": AudioFeature(), "video": VideoFeature()}
    features["points"] = PointsFeature(features=number(options, "features", 0, least=0))
    features["label"] = LabelsFeature() if "labels" in columns else LabelFeature()
    if "image" in columns:
        features["image"] = image_feature(
            options, [partial(io.BytesIO, image) for image in _images(folder, columns, groups)]
        )
    named = ["label" if name == "labels" else name for name in columns]
    found = {name: features[name] for name in named if name in features}
    targets = [column for feature, column in columns.items() if feature.startswith(TARGET)]
    return found | ({"target": target_feature(targets)} if targets else {})


def _images(folder: Folder, columns: Mapping[str, str], groups: Mapping[str, Sequence[Group]]) -> list[bytes]:
    """Return the first images; none if they cannot be read."""
    group = next((group for found in groups.values() for group in found if group.rows), None)
    if group is None:
        return []
    return [_value(cells[columns["image"]], None) or b"" for cells in first_rows(folder, group, [columns["image"]])]


def _column_notes(
    columns: Mapping[str, str], series: SeriesColumns | None, schema: pa.Schema, classes: Sequence[str]
) -> tuple[str, ...]:
    kinds = {name: str(schema.field(name).type).partition("<")[0] for name in columns.values()}
    taken = ", ".join(f"{feature} from {name} ({kinds[name]})" for feature, name in columns.items())
    used = [*columns.values(), *(series.columns if series else ())]
    others = [name for name in schema.names if name not in used]
    taken += f"{', ' * bool(taken)}series from {counted_columns(series.columns)}" if series else ""
    notes = [f"columns: {taken}" + (f"; not used: {', '.join(others)}" if others else "")]
    return (*notes, *class_notes(classes)) if {"label", "labels"} & columns.keys() else tuple(notes)


def _value(value: Any, read: ReadFile | None) -> Any:
    """Return a cell; of a struct its bytes, or those of the file that its path names relative to the table."""
    if not isinstance(value, dict):
        return value
    if value["bytes"] is None and value.get("path") and read:
        return read(value["path"])
    return value["bytes"]


source = TableSource()
