"""The split of each row of Parquet tables, by a column of splits or by groups of rows that stay together."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.storage import Folder, raise_unanswered
from pipelines.sources._layout import by_split, counted, held_out_share, split_words

COLUMNS = ("split", "group")
"""What divides rows, and is no feature."""


class Division(NamedTuple):
    """How rows are divided.

    Attributes:
        splits: the split of each value of the column `split`.
        share: of the groups of the column `group` that are held out as `test`, by a hash of each group.
        seed: of that hash.
        first: the split that a row group which cannot be read counts for.
    """

    splits: Mapping[str, str] = {}
    share: float = 0.0
    seed: int = 0
    first: str = "train"

    @property
    def active(self) -> bool:
        """Return whether rows of one row group belong to several splits."""
        return bool(self.splits or self.share)

    def rows(self, table: pa.Table, split: str, prefix: str) -> list[int]:
        """Return the rows of a row group in a split; `prefix` tells its rows without a group from others'."""
        if self.splits:
            values = table.column("split").to_pylist()
            return [row for row, value in enumerate(values) if self.splits.get(str(value)) == split]
        groups = [
            f"row {prefix}.{row}" if value is None else f"group {value}"
            for row, value in enumerate(table.column("group").to_pylist())
        ]
        held_out = {name: self._held_out(name) for name in set(groups)}
        return [row for row, name in enumerate(groups) if held_out[name] == (split == "test")]

    def _held_out(self, name: str) -> bool:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


def divide(
    folder: Folder,
    splits: Mapping[str, Sequence[str]],
    columns: Mapping[str, str],
    options: Mapping[str, str],
    seed: int,
) -> tuple[Division, Mapping[str, float], tuple[str, ...]]:
    """Return how columns divide the rows, the share of each split, and a line about it; not active without them."""
    files = [name for names in splits.values() for name in names]
    stated, counts = stated_splits(folder, files, columns["split"]) if "split" in columns else ({}, {})
    if stated:
        if "group" in columns:
            check_groups(folder, {"": files}, columns["group"], columns["split"], stated)
        total = sum(counts.values())
        shares = {split: rows / total for split, rows in counts.items()}
        return Division(stated, first=next(iter(shares))), shares, (division_note(counts, columns["split"]),)
    if "group" not in columns:
        return Division(), {}, ()
    share = held_out_share(splits, folder, options, "0.2")
    if not share:
        check_groups(folder, splits, columns["group"], "", {})
        return Division(), {}, ()
    note = f"splits: none named; about {share:g} held out as test, whole groups of the column {columns['group']}"
    return Division(share=share, seed=seed), {"train": 1 - share, "test": share}, (note,)


def stated_splits(folder: Folder, names: Sequence[str], column: str) -> tuple[dict[str, str], Counter[str]]:
    """Return the split of each value of a column, and the rows of each split.

    Raises:
        UserError: a value is the name of no split, or two spellings mean one.
    """
    rows: Counter[str] = Counter()
    for name, part in column_parts(folder, names, [column]):
        for value, count in Counter(map(str, part.column(0).to_pylist())).items():
            if value not in rows and len(split_words(value)) != 1:
                raise UserError(
                    f"{folder.url}/{name}: the column {column} has {value[:40]!r}, wanted train, val or test; leave it"
                    " out with --option split="
                )
            rows[value] += count
    if not rows:
        raise UserError(f"{folder.url}: the column {column} cannot be read in any file")
    found = by_split(folder, {value: split_words(value)[0] for value in sorted(rows)})
    splits = {value: split for split, values in found.items() for value in values}
    counts: Counter[str] = Counter()
    for value, split in splits.items():
        counts[split] += rows[value]
    return splits, counts


def check_groups(
    folder: Folder, splits: Mapping[str, Sequence[str]], group: str, split: str, of: Mapping[str, str]
) -> None:
    """Refuse a group that lies in two splits.

    Args:
        folder: the source folder.
        splits: the files of each split, if their names state them.
        group: the column of groups.
        split: the column of splits; empty without.
        of: the split of each of its values.
    """
    places: dict[Any, str] = {}
    for named, names in splits.items():
        for name, part in column_parts(folder, names, [group, *[split] * bool(split)]):
            values = part.column(0).to_pylist()
            stated = map(str, part.column(1).to_pylist()) if split else [named] * len(values)
            for value, place in dict.fromkeys(zip(values, stated, strict=True)):
                here = of.get(place, place)
                if value is not None and places.setdefault(value, here) != here:
                    raise UserError(
                        f"group {value} is in {places[value]} and in {here} ({folder.url}/{name}): correct the column"
                        f" {group}, or leave it out with --option group="
                    )


def column_parts(folder: Folder, names: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """Yield columns of each row group that has them and can be read, with the file's name."""
    for name in names:
        with folder.fs.open(folder.file(name), "rb") as stream, pq.ParquetFile(stream) as file:
            if not set(columns) <= set(file.schema_arrow.names):
                continue
            for number in range(file.num_row_groups):
                try:
                    yield name, file.read_row_group(number, columns=[*columns], use_threads=False).select([*columns])
                except (OSError, ValueError, pa.ArrowException) as error:
                    raise_unanswered(error)


def division_note(counts: Mapping[str, int], column: str) -> str:
    """Return a line about the splits that a column names."""
    found = ", ".join(f"{split} {counted(rows, 'row')}" for split, rows in counts.items())
    return f"splits: {found}, by column {column}"
