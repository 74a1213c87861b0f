"""Tables of files, texts and labels: CSV, TSV or JSON lines with a row per sample; options map columns to features.

SRC is such a table, or a folder with tables. Columns `image`, `audio`, `video` and `points` have paths of files below
the table's folder, `text` has texts. Files are stored as by the sources of folders.
"""

import contextlib
import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder, refusing
from pipelines.features import (
    AudioFeature,
    Feature,
    LabelFeature,
    LabelsFeature,
    PointsFeature,
    SegmentationFeature,
    TextFeature,
    VideoFeature,
)
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, item_seed, number, path_below, shuffled_units
from pipelines.sources._files import Found, look, read_below, unreadable, versions_of
from pipelines.sources._labels import in_order, label_number, one_label, several
from pipelines.sources._layout import by_split, class_notes, held_out_share, split_notes, split_words, splits_of_files
from pipelines.sources._masks import mask_classes
from pipelines.sources._metadata import table_rows
from pipelines.sources._probe import PROBE, image_feature
from pipelines.sources._series import (
    ALL,
    LOOKED_AT,
    SeriesColumns,
    are_numbers,
    counted_columns,
    series_columns,
    series_names,
)
from pipelines.sources._targets import (
    LABEL,
    label_columns,
    target_columns,
    target_feature,
    target_values,
    text_columns,
    texts_of,
)
from pipelines.transforms import BadSample
from pipelines.transforms.cloud import read_points
from pipelines.transforms.mask import pack

FEATURES: Mapping[str, Callable[[], Feature]] = {
    "audio": AudioFeature,
    "video": VideoFeature,
    "text": TextFeature,
    "label": LabelFeature,
    "labels": LabelsFeature,
}
SUFFIXES = (".csv", ".tsv", ".jsonl")
FILES = ("image", "audio", "video", "points")
COLUMNS = (*FILES, "mask", "text", "label", "labels", "split", "group")
OPTIONS = (*COLUMNS, "target", "series", "length", "separator", "classes", "channels", "features", "held_out", "splits")


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        key: the table and the row's number.
        above: the table's folder, with a slash, relative to the source folder.
        cells: by column.
    """

    key: str
    above: str
    cells: Mapping[str, Any]


class CsvSource:
    """The source.

    Options: the columns of the features `image`, `audio`, `video`, `points` (paths), `text`, `label` (the class),
    `mask` (a PNG with a class for each pixel, whose names `classes` gives), `labels` (several classes of one kind:
    a list in JSON, else separated by `separator`, `;`), `split` (a split's name), `group` (rows with the same value
    stay in one split); each is taken by its name where the table has it, and left out with an empty value. `label`
    may name several columns with commas, which are labels with classes of their own, and `text` several, which the
    model reads one after the other, with SEP between them. `target` names columns of
    numbers, with commas. `series` (columns of numbers with commas, or `all`, see `_series`), `length` (its steps, or
    `any`), `classes` (names with commas), `channels`, `features` (columns of a point after x, y, z),
    `held_out` (share of the rows, 0.2), `splits` (`names`: by names of the tables; `none`).
    """

    title = "tables of files, texts and labels (SRC/*.csv, tsv, jsonl, or one of them; options map the columns)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """Read the tables of `src`, and list their rows."""
        refuse_options(options, OPTIONS)
        folder, found = _tables(src)
        splits = splits_of_files(folder, found.names, options)
        rows = {split: [row for name in names for row in _rows(folder, name)] for split, names in splits.items()}
        if not any(rows.values()):
            raise UserError(f"{folder.url}: the tables have no rows")
        columns = find_columns(folder, _column_names(rows), options)
        series = find_series(folder, rows, columns, options)
        check_input(folder, _column_names(rows), [*columns, *["series"] * bool(series)])
        if "split" in columns:
            rows = _by_column(folder, [row for part in rows.values() for row in part], columns)
        classes = class_names(folder, rows, columns, options)
        own = {
            feature: _names(folder, column, (row.cells.get(column) for part in rows.values() for row in part))
            for feature, column in columns.items()
            if feature.startswith(LABEL)
        }
        _check_groups(rows, columns.get("group"))
        held_out = held_out_share(rows, folder, options, "0.2")
        parts = _held_out(rows[next(iter(rows))], held_out, columns.get("group"), seed) if held_out else rows
        held_out = held_out if "test" in parts else 0.0
        content = {"src": folder.url, "columns": columns, "classes": classes, "own": own, "seed": seed}
        content |= {"series": series, "options": dict(options)}
        there = _column_names(rows)
        used = [*_used(columns, there), *(series.columns if series else ())]
        others = [name for name in there if name not in used]
        taken = ", ".join(f"{feature} from {column}" for feature, column in columns.items())
        taken += f"{', ' * bool(taken)}series from {counted_columns(series.columns)}" if series else ""
        return Listing(
            name=base_name(str(src)).removesuffix(".csv").removesuffix(".tsv").removesuffix(".jsonl"),
            features=_features(folder, parts, columns, options)
            | {feature: LabelFeature(classes=tuple(names)) for feature, names in own.items()}
            | ({"series": series.feature()} if series else {}),
            classes=tuple(classes),
            licence="not stated: the user's own data",
            origin=str(src),
            units=shuffled_units(
                {split or "train": part for split, part in parts.items()}, random.Random(seed), shard_rows, **content
            ),
            notes=(
                f"columns: {taken}; not used: {', '.join(others) or 'none'}",
                *(class_notes(classes) if {"label", "labels", "mask"} & set(columns) else ()),
                *split_notes({split: [row.key for row in part] for split, part in rows.items()}, held_out, "row"),
                *found.notes(),
            ),
            rejected=tuple(found.rejected),
            versions=_versions(folder, found, rows, columns, series),
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the files of the unit's rows."""
        content = unit.content
        read = RowReader(open_folder(content["src"]), content)
        for item in content["items"]:
            row = Row(*item)
            try:
                yield {"key": row.key, **{feature: read(feature, row) for feature in read.features}}
            except (BadSample, ValueError) as error:
                yield Rejected(row.key, str(error))
            except OSError as error:
                yield unreadable(row.key, error)


class RowReader:
    """Reads the features of rows; what is called with a feature's name and a row.

    Args:
        folder: the source folder.
        content: of the unit.
    """

    def __init__(self, folder: Folder, content: Mapping[str, Any]) -> None:
        self.folder, self.content = folder, content
        self.index = {name: number for number, name in enumerate(content["classes"])}
        self.own = {
            feature: {name: number for number, name in enumerate(names)}
            for feature, names in content.get("own", {}).items()
        }
        self.features = [
            "label" if name == "labels" else name
            for name in content["columns"]
            if name not in ("split", "group", "mask")
        ]
        self.series = SeriesColumns(*content["series"]) if content.get("series") else None
        self.features += ["series"] * (self.series is not None)

    def __call__(self, feature: str, row: Row) -> Any:
        """Return what is stored; raise `ValueError`, `BadSample` or `OSError` if the row cannot be used."""
        columns, options = self.content["columns"], self.content["options"]
        if feature == "series" and self.series:
            separator = options.get("separator") or ";"
            return self.series.read(row.cells, separator, partial(read_below, self.folder, row.above))
        if feature == "label" and "labels" in columns:
            names = several(row.cells.get(columns["labels"]), options)
            return [label_number(name, self.index, len(self.content["classes"])) for name in names]
        if feature == "text" and columns[feature] not in row.cells:
            return texts_of(row.cells.get(column) for column in columns[feature].split(","))
        value = row.cells.get(columns[feature])
        if feature in self.own:
            name = one_label(value)
            if name is None and not any(one_label(row.cells.get(columns[other])) for other in self.own):
                raise ValueError("no label")
            return None if name is None else label_number(name, self.own[feature], len(self.own[feature]))
        if feature == "label":
            return label_number(one_label(value), self.index, len(self.content["classes"]))
        if feature == "target":
            return target_values(row.cells, columns["target"].split(","))
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"no {feature}")
        if feature == "text":
            return value.strip()
        encoded = read_below(self.folder, row.above, value)
        if feature == "image" and "mask" in columns:
            mask = row.cells.get(columns["mask"])
            if not isinstance(mask, str) or not mask.strip():
                raise ValueError("no mask")
            other = read_below(self.folder, row.above, mask)
            return pack(encoded, other, len(self.content["classes"]))
        if feature != "points":
            return encoded
        seed = item_seed(self.content["seed"], row.key)
        return read_points(value, encoded, 2048, seed, number(options, "features", 0, least=0)).tobytes()


def _tables(src: str | None) -> tuple[Folder, Found]:
    """Return the folder and its tables; of a table, its folder and itself."""
    wanted = "*.csv, *.tsv or *.jsonl"
    if src is None:
        raise UserError(f"source csv needs a table or a folder with {wanted}: perceiver prepare csv SRC DST")
    if src.lower().endswith(SUFFIXES):
        above, _, name = src.rpartition("/")
        folder = open_folder(above or ("/" if src.startswith("/") else "."))
        with refusing(f"table {src}", "check the place and the access to it"):
            if not folder.fs.isfile(folder.file(name)):
                raise UserError(f"table {src} does not exist or is no file")
        return folder, Found([name])
    folder = open_folder(src)
    found = look(folder, SUFFIXES)
    if not found.names:
        raise UserError(f"no tables below {folder.url}: wanted {wanted}")
    found.ignored.clear()  # the files that the tables name
    return folder, found


def _versions(
    folder: Folder,
    found: Found,
    rows: Mapping[str, Sequence[Row]],
    columns: Mapping[str, str],
    series: SeriesColumns | None,
) -> dict[str, str]:
    """Return the versions of the tables by name, and of the files that a row names by the row's key."""
    named = [columns[name] for name in (*FILES, "mask") if name in columns]
    arrays = series.columns if series else ()
    files: dict[str, list[str]] = {}
    for row in (row for part in rows.values() for row in part):
        cells = [str(row.cells.get(name) or "") for name in named]
        cells += [cell for name in arrays if (cell := str(row.cells.get(name)).strip()).lower().endswith(".npy")]
        if cells:
            files[row.key] = [_place(row, cell) for cell in cells]
    known = versions_of(folder, {name for names in files.values() for name in names if name})
    versions = versions_of(folder, found.names)
    for key, names in files.items():
        own = [known.get(name, "missing") for name in names]
        versions[key] = "; ".join(own) if all(own) else ""
    return versions


def _place(row: Row, cell: str) -> str:
    """Return the path of a file that a cell names, relative to the source folder; empty if it cannot be one."""
    try:
        return row.above + path_below(cell)
    except ValueError:
        return ""


def _used(columns: Mapping[str, str], there: Sequence[str]) -> list[str]:
    """Return the table's columns of the features; `target` and `text` may have several."""
    return [one for name in columns.values() for one in ([name] if name in there else name.split(","))]


def _rows(folder: Folder, name: str) -> Iterator[Row]:
    above = name.rpartition("/")[0]
    for line, cells in enumerate(table_rows(folder, name), 1):
        yield Row(f"{name}#{line}", above and above + "/", cells)


def _column_names(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return the columns of all rows, in order: a line of JSON may lack some, and tables may differ."""
    return list(dict.fromkeys(name for part in rows.values() for row in part for name in row.cells))


def find_columns(folder: Folder, there: Sequence[str], options: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each feature, those of `target` and several of `text` with commas, `split` and `group`.

    Raises:
        UserError: a column does not exist, or both `label` and `labels`.
    """
    columns = {}
    for feature in COLUMNS:
        name = options.get(feature, feature)
        if name in there:
            columns[feature] = name
        elif feature == "label" and "," in name:
            columns |= label_columns(options, there, folder.url)
        elif feature == "text" and "," in name:
            columns["text"] = ",".join(text_columns(options, there, folder.url))
        elif name and feature in options:
            raise UserError(f"option {feature}={name}: {folder.url} has no such column; it has {', '.join(there)}")
    if targets := target_columns(options, there, folder.url):
        columns["target"] = ",".join(targets)
    if "mask" in columns and (kinds := {"label", "labels"} & columns.keys() or {"image"} - columns.keys()):
        raise UserError(
            f"{folder.url} has the column {columns['mask']} of masks"
            + (" without images" if kinds == {"image"} else f" and {min(kinds)}, whose classes would be the same")
            + f": leave it out with --option mask=, or correct {min(kinds)}"
        )
    if {"label", "labels"} <= columns.keys():
        raise UserError(f"{folder.url} has label and labels: leave one out, for example --option labels=")
    return columns


def check_input(folder: Folder, there: Sequence[str], features: Sequence[str]) -> None:
    """Refuse a table without a column for an input."""
    if not {*FILES, "text", "series"} & set(features):
        raise UserError(
            f"{folder.url}: none of the columns {', '.join(there)} is an input: set --option image=COLUMN (or"
            f" audio, video, points, text, series), or --option series={ALL} for all columns of numbers"
        )


def find_series(
    folder: Folder, rows: Mapping[str, Sequence[Row]], columns: Mapping[str, str], options: Mapping[str, str]
) -> SeriesColumns | None:
    """Return the columns of the feature `series`, None without."""
    found = [row for part in rows.values() for row in part]

    def numeric(name: str) -> bool:
        return are_numbers(row.cells.get(name) for row in found[:LOOKED_AT])

    there = _column_names(rows)
    names = series_names(there, _used(columns, there), numeric, options)
    if not names:
        return None
    some = [(row.cells, partial(read_below, folder, row.above)) for row in found[:PROBE]]
    return series_columns(names, some, options, folder.url)


def _by_column(folder: Folder, rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, list[Row]]:
    """Return the rows by the split that a column names."""
    column = columns["split"]
    stated = {}
    for row in rows:
        words = split_words(str(row.cells.get(column)))
        if len(words) != 1:
            raise UserError(
                f"{row.key}: the column {column} has {str(row.cells.get(column))[:40]!r}, wanted train, val or test"
            )
        stated[row.key] = words[0]
    by_key = {row.key: row for row in rows}
    return {split: [by_key[key] for key in keys] for split, keys in by_split(folder, stated).items()}


def _group_of(row: Row, group: str | None) -> str:
    """Return the group of a row; a row without one is its own."""
    value = row.cells.get(group) if group else None
    return f"row {row.key}" if value is None or value == "" else f"group {value}"


def _check_groups(rows: Mapping[str, Sequence[Row]], group: str | None) -> None:
    """Refuse a group that lies in two splits."""
    places: dict[str, tuple[str, str]] = {}
    for split, row in ((split, row) for split, part in rows.items() for row in part):
        name = _group_of(row, group)
        other, key = places.setdefault(name, (split, row.key))
        if other != split:
            raise UserError(
                f"{name} is in {other} ({key}) and in {split} ({row.key}): correct the column {group}, or leave it out"
                " with --option group="
            )


def class_names(
    folder: Folder, rows: Mapping[str, Sequence[Row]], columns: Mapping[str, str], options: Mapping[str, str]
) -> list[str]:
    """Return the names of the classes, numbers before texts; of the option `classes`, or all that are found."""
    if "mask" in columns:
        return list(mask_classes(options))
    if not {"label", "labels"} & columns.keys():
        return []
    if "classes" in options:
        return options["classes"].split(",")
    every = [row for part in rows.values() for row in part]
    if "label" in columns:
        return _names(folder, columns["label"], (row.cells.get(columns["label"]) for row in every))
    names: set[str] = set()
    for row in every:
        with contextlib.suppress(ValueError):  # `samples` rejects the row
            names.update(several(row.cells.get(columns["labels"]), options))
    if not names:
        raise UserError(f"{folder.url}: no row has a label in the column {columns['labels']}")
    return in_order(names)


def _names(folder: Folder, column: str, values: Iterable[Any]) -> list[str]:
    """Return the names of the classes in a column, numbers before texts."""
    found = {one_label(value) for value in values if not isinstance(value, float | list | dict)}
    if not found - {None}:
        raise UserError(f"{folder.url}: no row has a label in the column {column}")
    return in_order(name for name in found if name is not None)


def _held_out(rows: Sequence[Row], part: float, group: str | None, seed: int) -> dict[str, list[Row]]:
    """Return the rows with a share of them as `test`; rows of one group stay together.

    The share is exact where the groups allow it, and not larger unless the smallest group is.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_group_of(row, group), []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    wanted = min(max(1, round(part * len(rows))), len(rows) - 1)
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for name in order:
        split = "test" if len(splits["test"]) + len(groups[name]) <= wanted else "train"
        splits[split] += groups[name]
    if not splits["test"] and len(order) > 1:
        smallest = min(order, key=lambda name: len(groups[name]))
        splits = {
            "train": [row for name in order if name != smallest for row in groups[name]],
            "test": groups[smallest],
        }
    return {split: members for split, members in splits.items() if members}


def _features(
    folder: Folder,
    rows: Mapping[str, Sequence[Row]],
    columns: Mapping[str, str],
    options: Mapping[str, str],
) -> dict[str, Feature]:
    """Return the features by name; those of images by looking at a few."""
    found = {"label" if name == "labels" else name: FEATURES[name]() for name in columns if name in FEATURES}
    if "target" in columns:
        found["target"] = target_feature(columns["target"].split(","))
    if "points" in columns:
        found["points"] = PointsFeature(features=number(options, "features", 0, least=0))
    if "image" in columns:
        some = [row for part in rows.values() for row in part][:PROBE]
        plain = {name: column for name, column in columns.items() if name != "mask"}
        read = RowReader(folder, {"columns": plain, "classes": [], "options": options, "seed": 0})
        image = image_feature(options, [partial(_opened, read, row) for row in some])
        masked = SegmentationFeature(channels=image.channels, size=image.size)
        found["image"] = masked if "mask" in columns else image
    return found


def _opened(read: RowReader, row: Row) -> Any:
    try:
        return io.BytesIO(read("image", row))
    except ValueError as error:
        raise BadSample(str(error)) from error


source = CsvSource()
