"""Data that are not prepared, as a prediction takes them: files, folders, globs, tables and texts.

They are read as the sources read them, and written as one shard, so that they are decoded as in training. What cannot
be read is a `Problem`; what cannot be decoded becomes one in the prediction.
"""

import functools
import glob
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, open_url
from pipelines.features import Feature, LabelFeature
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import MANIFEST, Manifest, Split, arrow_schema, save_manifest, utf8_name
from pipelines.shards.quarantine import Problem, count_reasons
from pipelines.sources import Rejected, Sample, load_source
from pipelines.sources._common import MAX_FILE, decode_utf8, item_seed
from pipelines.sources._files import look, read_file, unreadable
from pipelines.sources._metadata import table_rows
from pipelines.sources.csv import FILES, Row, RowReader, find_columns
from pipelines.transforms import BadSample

SPLIT = "all"
SOURCES = {
    "image": ("image_folder",),
    "audio": ("audio_folder", "video_folder"),
    "video": ("video_folder",),
    "media": ("video_folder",),
    "points": ("points_folder",),
}
"""The sources that read the files of a feature, by its name."""
TABLES = (".csv", ".tsv", ".jsonl")
COLUMNAR = (".parquet",)
LINES = ".txt"
MOST_SAMPLES = 2_000_000
"""Most samples of all places together, whose keys are in memory; about 400 bytes each."""
BREAKS = re.compile(rb"\r\n|[\n\r\v\f\x1c-\x1e]|\xc2\x85|\xe2\x80[\xa8\xa9]")
"""Where `str.splitlines` ends a line, in UTF-8."""
GROUP_ROWS = {"video": 1, "media": 1, "audio": 8}
"""Rows of a row group, which is held in memory; 32 for other features."""


@dataclass(frozen=True)
class Inputs:
    """What a model takes.

    Attributes:
        name: of its feature: image, audio, video, media, points or text.
        feature: how it is stored and decoded.
        classes: names of the model's classes, by which labels are found.
        options: of the sources: columns of tables by feature (`image=path`), `points`, `features`.
    """

    name: str
    feature: Feature
    classes: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def column(self) -> str:
        """The column of a table by default."""
        return "video" if self.name == "media" else self.name

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files of a folder that are read."""
        sources: list[Any] = [load_source(name) for name in SOURCES.get(self.name, ())]
        return tuple(suffix for source in sources for suffix in source.suffixes) or (LINES,)


class Item(NamedTuple):
    """A sample that is not read yet: its key, its class if it is known, and what reads it.

    `read` raises `BadSample`, `ValueError` or `OSError` if the sample cannot be used.
    """

    key: str
    label: int | None
    read: Callable[[], Any]


def is_prepared(place: str) -> bool:
    """Return whether a place is a prepared folder."""
    return open_folder(place).exists(MANIFEST)


def write_unprepared(
    places: Sequence[str], texts: Sequence[str], inputs: Inputs, target: str
) -> tuple[Manifest, list[Problem]]:
    """Read unprepared data and write them to a folder as the split `all`; return its manifest and what was unreadable.

    Samples keep the order of the places. Their keys are the names of their files: as given, or relative to a folder;
    with `#` and the number of the row for tables and lines. They have labels if all labels are classes of the model:
    those of a table's column `label`, or the folders of files.

    Args:
        places: files, folders, globs (`photos/*.jpg`), tables (.csv, .tsv, .jsonl, .parquet), or .txt files with a text
            in each line; paths or fsspec URLs.
        texts: more samples.
        inputs: what the model takes.
        target: folder to write to.

    Raises:
        UserError: a place does not exist, has no such data or more than `MOST_SAMPLES`; a table is not a regular file
            or too large; or nothing could be read.
    """
    items = [Item(f"text#{number}", None, functools.partial(_text, text)) for number, text in enumerate(texts, 1)]
    rejected: list[Rejected] = []
    for place in places:
        for found in _items(place, inputs):
            _check_count(place, len(items) + len(rejected) + 1)
            (rejected if isinstance(found, Rejected) else items).append(found)  # pyright: ignore[reportArgumentType]
    labelled = bool(items) and all(item.label is not None for item in items)
    features = {inputs.name: inputs.feature, **({"label": LabelFeature()} if labelled else {})}
    folder = open_folder(target)
    with ShardWriter(folder, f"{SPLIT}-000000.arrow", arrow_schema(features), GROUP_ROWS.get(inputs.name, 32)) as out:
        out.write(_samples(items, inputs.name, labelled, rejected))
        shard = out.close()
    problems = [Problem(SPLIT, -1, utf8_name(found.key), found.reason) for found in rejected]
    if shard is None:
        raise UserError(
            f"{', '.join(places[:3])}: none of {len(problems):,} samples could be read: {count_reasons(problems)}"
        )
    manifest = Manifest(
        name="unprepared",
        features=features,
        classes=inputs.classes,
        splits={SPLIT: Split(shards=(shard,))},
        rejected=len(problems),
        licence="not stated: the user's own data",
        source=", ".join(places[:3]),
    )
    save_manifest(manifest, folder)
    return manifest, problems


def _check_count(place: str, count: int) -> None:
    if count > MOST_SAMPLES:
        raise UserError(
            f"{place}: got more than {MOST_SAMPLES:,} samples with the places before it; wanted fewer: prepare the data"
            " with perceiver prepare, or split them"
        )


def _check_file(fs: Any, path: str, place: str) -> None:
    """Raise a UserError if a table is not a regular file, or is read as a whole and too large."""
    facts = fs.info(path)
    if facts["type"] != "file":
        raise UserError(f"{place} is a FIFO, a socket or a device: wanted a regular file")
    size = facts.get("size") or 0
    if size > MAX_FILE and not place.lower().endswith(COLUMNAR):
        raise UserError(f"{place} has {size:,} bytes, more than {MAX_FILE:,}: split it")


def _samples(items: Iterable[Item], name: str, labelled: bool, rejected: list[Rejected]) -> Iterator[Sample]:
    for item in items:
        try:
            value = item.read()
            yield {"key": utf8_name(item.key), name: value, **({"label": item.label} if labelled else {})}
        except (BadSample, ValueError) as error:
            rejected.append(Rejected(item.key, str(error)))
        except OSError as error:
            rejected.append(unreadable(item.key, error))


def _items(place: str, inputs: Inputs) -> Iterator[Item | Rejected]:
    """Yield the samples of a place."""
    fs, path = open_url(place)
    if fs.isdir(path):
        yield from _in_folder(open_folder(place), inputs)
    elif not fs.exists(path) and glob.has_magic(place):
        names = sorted(name for name in fs.glob(path) if not fs.isdir(name))
        if not names:
            raise UserError(f"{place}: no file has such a name")
        start = place[: len(place) - len(path)] if place.endswith(path) else ""  # the protocol of a URL
        relative = "://" not in place and not place.startswith("/")
        base = path[: len(path) - len(place)] if relative and path.endswith(place) else ""
        for name in names:
            yield from _items(start + name.removeprefix(base), inputs)
    elif not fs.exists(path):
        raise UserError(
            f"{place} does not exist: wanted prepared data, a folder, a glob, a file or a table ({', '.join(TABLES)},"
            f" {COLUMNAR[0]})"
        )
    elif place.lower().endswith((*TABLES, *COLUMNAR)):
        _check_file(fs, path, place)
        read = _in_table if place.lower().endswith(TABLES) else _in_parquet
        yield from read(*_parent(place), inputs)
    elif inputs.name == "text":
        yield from _in_lines(*_parent(place), place)
    else:
        yield _file(*_parent(place), place, inputs)


def _parent(place: str) -> tuple[Folder, str]:
    """Return a file's folder and its name."""
    above, _, name = place.rpartition("/")
    return open_folder(above or ("/" if place.startswith("/") else ".")), name


def _in_folder(folder: Folder, inputs: Inputs) -> Iterator[Item | Rejected]:
    suffixes = inputs.suffixes
    found = look(folder, suffixes)
    if not found.names:
        raise UserError(f"{folder.url} has no files that end in {', '.join(suffixes)}")
    yield from found.rejected
    for name in found.names:
        if inputs.name == "text":
            yield from _in_lines(folder, name, name)
        else:
            yield _file(folder, name, name, inputs)


def _file(folder: Folder, name: str, key: str, inputs: Inputs) -> Item:
    """Return a file as a sample; its folder is its class if the model has a class of that name."""
    above = key.rstrip("/").split("/")[-2:-1]
    label = inputs.classes.index(above[0]) if above and above[0] in inputs.classes else None
    return Item(key, label, functools.partial(_read_file, folder, name, inputs))


def _read_file(folder: Folder, name: str, inputs: Inputs) -> Any:
    sources: list[Any] = [load_source(source) for source in SOURCES[inputs.name]]
    read = next((source.read for source in sources if source.read), None)
    encoded = read_file(folder, name)
    return read(name, encoded, inputs.options, item_seed(0, name)) if read else encoded


def _in_lines(folder: Folder, name: str, key: str) -> Iterator[Item | Rejected]:
    """Yield the lines of a text file that are not empty."""
    try:
        content = read_file(folder, name)
        _check_count(key, sum(1 for _ in itertools.islice(BREAKS.finditer(content), MOST_SAMPLES + 1)))
        lines = decode_utf8(content).splitlines()
    except ValueError as error:
        yield Rejected(key, str(error))
        return
    except OSError as error:
        yield unreadable(key, error)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Item(f"{key}#{number}", None, functools.partial(_text, line))


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("no text")
    return text.strip()


def _in_table(folder: Folder, name: str, inputs: Inputs) -> Iterator[Item]:
    """Yield the rows of a CSV, a TSV or JSON lines, read as the source csv does."""
    cells = itertools.islice(table_rows(folder, name), MOST_SAMPLES + 1)
    rows = [Row(f"{name}#{line}", "", row) for line, row in enumerate(cells, 1)]
    _check_count(folder.file(name), len(rows))
    there = list(dict.fromkeys(column for row in rows for column in row.cells))
    where = folder.file(name)
    if not rows:
        raise UserError(f"{where} has no rows")
    wanted = {column: "" for column in (*FILES, "mask", "text", "labels") if column != inputs.column}
    columns = find_columns(Folder(folder.fs, folder.path, where), there, {**wanted, **inputs.options})
    if inputs.column not in columns:
        raise _no_column(where, inputs.column, there, inputs)
    content = {
        "columns": {inputs.column: columns[inputs.column]},
        "classes": [],
        "own": {},
        "options": dict(inputs.options),
        "seed": 0,
    }
    read = RowReader(folder, content)
    label = columns.get("label")
    for row in rows:
        found = _label(row.cells.get(label), inputs.classes) if label else None
        yield Item(row.key, found, functools.partial(read, inputs.column, row))


def _in_parquet(folder: Folder, name: str, inputs: Inputs) -> Iterator[Item]:
    """Yield the rows of a Parquet file: texts, or bytes as such or as `{bytes, path}`, as data hubs have them."""
    where = folder.file(name)
    try:
        with folder.fs.open(where, "rb") as stream, pq.ParquetFile(stream) as file:
            _check_count(where, file.metadata.num_rows)
            there = file.schema_arrow.names
            column = inputs.options.get(inputs.column, inputs.column)
            if column not in there:
                raise _no_column(where, column, there, inputs)
            label = inputs.options.get("label", "label")
            labels = (
                file.read(columns=[label]).column(0).to_pylist() if label in there else [None] * file.metadata.num_rows
            )
            groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where} cannot be read as Parquet ({first_line(error)})") from None
    group_values = functools.lru_cache(maxsize=1)(functools.partial(_values, folder, name, column))
    first = 0
    for number, count in enumerate(groups):
        for row in range(count):
            key = f"{name}#{first + row + 1}"
            found = _label(labels[first + row], inputs.classes)
            yield Item(key, found, functools.partial(_cell, group_values, number, row, inputs.name))
        first += count


def _no_column(where: str, column: str, there: Sequence[str], inputs: Inputs) -> UserError:
    return UserError(f"{where} has no column {column}; it has {', '.join(there)}: set --option {inputs.column}=COLUMN")


def _values(folder: Folder, name: str, column: str, group: int) -> list[Any]:
    with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
        return file.read_row_group(group, columns=[column]).column(0).to_pylist()


def _cell(group_values: Callable[[int], list[Any]], group: int, row: int, name: str) -> Any:
    value = group_values(group)[row]
    value = value.get("bytes") if isinstance(value, dict) else value
    if not value or not isinstance(value, str if name == "text" else bytes):
        raise ValueError(f"no {name}" if not value else f"a {name} that is a {type(value).__name__}")
    return value


def _label(value: Any, classes: Sequence[str]) -> int | None:
    """Return the number of a class that a cell names, None if it names none."""
    if isinstance(value, int) and not isinstance(value, bool) and str(value) not in classes:
        return value if 0 <= value < len(classes) else None
    return classes.index(str(value)) if str(value) in classes else None
