"""Row groups of Parquet tables: what their footers state, and how they become units of work."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, raise_unanswered
from pipelines.order.permutation import keys, permute
from pipelines.shards.parquet import MAX_BYTES
from pipelines.sources import Unit
from pipelines.sources._labels import stored_names
from pipelines.sources._probe import PROBE

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


def metadata(folder: Folder, name: str) -> pq.FileMetaData:
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


def read_facts(folder: Folder, name: str, label: str) -> Table:
    """Read the footer of a file; `label` is the column of the labels, empty without.

    Raises:
        UserError: it is not Parquet, or a row group is too large.
    """
    footer = metadata(folder, name)
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


def first_rows(folder: Folder, group: Group, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return columns of the first rows of a row group; none if they cannot be read."""
    try:
        with folder.fs.open(folder.file(group.name), "rb") as stream, pq.ParquetFile(stream) as file:
            return next(file.iter_batches(PROBE, row_groups=[group.number], columns=[*columns])).to_pylist()
    except (OSError, KeyError, StopIteration, pa.ArrowException) as error:
        raise_unanswered(error)
        return []


def groups_of(tables: Sequence[Table]) -> list[Group]:
    """Return the row groups of some files, in order."""
    groups: list[Group] = []
    first = 0
    for table in tables:
        for place, rows in enumerate(table.rows):
            groups.append(Group(table.name, place, rows, first))
            first += rows
    return groups


def units_of(
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


def divided_units(
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


def rows_of(group: Group, unit: Unit) -> list[int]:
    """Return the rows of a row group that belong to the unit's split."""
    if not unit.content["held_out"]:
        return list(range(group.rows))
    cut, total, seed = unit.content["held_out"]
    places = permute(np.arange(group.first, group.first + group.rows), total, keys(seed))
    return np.flatnonzero((places < cut) == (unit.split == "test")).tolist()
