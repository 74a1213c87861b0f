"""Tables of labels next to files, as data hubs have them: `metadata.csv` or `.jsonl` with the column `file_name`."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perceiver.config import UserError
from perceiver.storage import Folder, first_line
from pipelines.sources import Rejected
from pipelines.sources._common import path_below, read_list
from pipelines.sources._files import Found
from pipelines.sources._labels import in_order, several
from pipelines.sources._layout import SHOWN, ClassFiles, Labelled, class_notes, counted, splits_of_files

METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
FILE_COLUMN = "file_name"
LABEL_COLUMN, LABELS_COLUMN = "label", "labels"


def labelled_files(folder: Folder, found: Found, tables: Sequence[str], options: Mapping[str, str]) -> ClassFiles:
    """Return classes and splits of files that tables label.

    The column `file_name` has paths relative to the table's folder; the column `label`, or the one that the option
    `label` names, has the class, or `labels` several classes (a list in JSON, or texts with `;` between them).
    Splits are those of `_layout.splits_of_files`. Files that no table names, and rows without a file or a label,
    are rejected.

    Args:
        folder: the source folder.
        found: its files; receives the rejected ones.
        tables: the tables among them.
        options: of the source.

    Raises:
        UserError: a table cannot be read or lacks a column, names a file outside the folder or a file twice.
    """
    read = {table: list(table_rows(folder, table)) for table in tables}
    multiple, column = _label_column(options, [row for rows in read.values() for row in rows])
    there = set(found.names)
    classes_of: dict[str, list[str]] = {}
    for table, rows in read.items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if rows and column not in columns:
            raise UserError(
                f"{folder.file(table)}: no column {column}; it has {', '.join(columns)}: set --option label=COLUMN"
                " (or labels, for several classes)"
            )
        for number, row in enumerate(rows, 1):
            name = _file_of(folder, table, row, number)
            if name in classes_of:
                raise UserError(f"{folder.file(table)}: row {number} names {name} a second time: remove one")
            value = row.get(column)  # lines of JSON may lack it
            if name not in there:
                found.rejected.append(Rejected(name, "in the table of labels, but without a file"))
            elif multiple:
                try:
                    classes_of[name] = several(value, options)
                except ValueError as error:
                    found.rejected.append(Rejected(name, str(error)))
            elif value is None or value == "" or isinstance(value, float | list | dict):
                found.rejected.append(Rejected(name, "no label" if value in (None, "") else "a label that is no class"))
            else:
                classes_of[name] = [str(value)]
    known = {*classes_of, *(rejected.key for rejected in found.rejected)}
    found.rejected += [Rejected(name, "in no table of labels") for name in found.names if name not in known]
    if not any(classes_of.values()):
        raise UserError(f"{folder.url}: none of the files has a label in {', '.join(tables[:SHOWN])}")
    classes = in_order({label for labels in classes_of.values() for label in labels})
    index = {name: number for number, name in enumerate(classes)}
    numbers = {name: tuple(index[label] for label in labels) for name, labels in classes_of.items()}
    splits: dict[str, list[Labelled]] = {
        split: [(name, numbers[name] if multiple else numbers[name][0]) for name in names]
        for split, names in splits_of_files(folder, sorted(classes_of), options).items()
    }
    notes = [*class_notes(classes), f"labels: column {column} of {', '.join(tables[:SHOWN])}"]
    notes.append(
        "splits: "
        + (", ".join(f"{s} {counted(len(names), 'file')}" for s, names in splits.items() if s) or "none named")
    )
    return ClassFiles(classes, splits, tuple(notes))


def _label_column(options: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """Return whether files may have several classes, and the column of the class or classes."""
    if "label" in options and "labels" in options:
        raise UserError(f"options label={options['label']} and labels={options['labels']}: give one of them")
    if "labels" in options:
        return True, options["labels"]
    there = {name for row in rows for name in row}
    if "label" not in options and LABEL_COLUMN not in there and LABELS_COLUMN in there:
        return True, LABELS_COLUMN
    return False, options.get("label", LABEL_COLUMN)


def _file_of(folder: Folder, table: str, row: Mapping[str, Any], number: int) -> str:
    """Return the file of a row, relative to the source folder."""
    value = row.get(FILE_COLUMN)
    where = f"{folder.file(table)}: row {number}"
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: wanted a file in the column {FILE_COLUMN}; it has {', '.join(row)}")
    try:
        name = path_below(value)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    above = table.rpartition("/")[0]
    return f"{above}/{name}" if above else name


def table_rows(folder: Folder, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV, a TSV or JSON lines.

    Raises:
        UserError: it is not UTF-8, a line is not a JSON object or has another number of cells, or a column exists
            twice.
    """
    text, where = read_list(folder, name), folder.file(name)
    if name.lower().endswith(".jsonl"):
        yield from _json_rows(text, where)
        return
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if name.lower().endswith(".tsv") else ",")
    try:
        header = next(lines, [])
        if not header or len(set(header)) < len(header):
            raise UserError(f"{where}: wanted different names of columns in the first line, got {', '.join(header)}")
        for number, line in enumerate(lines, 2):
            if line and len(line) != len(header):
                raise UserError(f"{where}: line {number} has {len(line)} cells, wanted {len(header)}")
            if line:
                yield dict(zip(header, line, strict=True))
    except csv.Error as error:
        raise UserError(f"{where} is not a table ({first_line(error)}): restore it") from None


def _json_rows(text: str, where: str) -> Iterator[dict[str, Any]]:
    lines = re.finditer(r"[^\n]*\n?", text)  # strings of JSON may have other line separators
    for number, line in enumerate((found[0] for found in lines), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: line {number} is not JSON ({first_line(error)})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number} is not a JSON object")
        yield row
