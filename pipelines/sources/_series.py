"""Columns of numbers of a table as series: which columns, and the numbers of a row."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from perceiver.config import UserError
from perceiver.storage import first_line
from perceiver.tracking.printable import printable
from pipelines.features import SeriesFeature
from pipelines.shards.manifest import utf8_name
from pipelines.sources._common import number
from pipelines.sources._layout import SHOWN
from pipelines.transforms import BadSample
from pipelines.transforms.cloud import read_npy
from pipelines.transforms.series import Steps

ALL, ANY = "all", "any"
LOOKED_AT = 1000
"""Rows by which a column of a CSV counts as numbers."""

ReadFile = Callable[[str], bytes]
"""Reads a file that a cell names."""


class SeriesColumns(NamedTuple):
    """The columns of a series, and what each sample must have.

    Attributes:
        columns: their names, in order.
        channels: numbers of a step.
        length: steps of each series; None if they differ.
    """

    columns: tuple[str, ...]
    channels: int
    length: int | None

    def feature(self) -> SeriesFeature:
        """Return the feature."""
        names = tuple(printable(utf8_name(name)) for name in self.columns)
        return SeriesFeature(
            channels=self.channels, length=self.length, names=names if len(names) == self.channels else ()
        )

    def read(self, cells: Mapping[str, Any], separator: str, read: ReadFile) -> bytes:
        """Return the stored numbers of a row; raise `ValueError` or `BadSample` if it cannot be used."""
        steps = row_steps([cells.get(name) for name in self.columns], self.columns, separator, read)
        if steps.shape[1] != self.channels:
            raise ValueError(f"{steps.shape[1]} channels, wanted {self.channels}")
        if self.length is not None and len(steps) != self.length:
            raise ValueError(f"{len(steps)} steps, wanted {self.length}: --option length={ANY} takes any")
        return steps.tobytes()


def series_names(
    there: Sequence[str], taken: Iterable[str], numeric: Callable[[str], bool], options: Mapping[str, str]
) -> list[str]:
    """Return the columns of the feature `series`: of the option, or the column of that name, or none.

    Args:
        there: all columns.
        taken: those of other features, which `all` leaves out.
        numeric: whether all cells of a column are numbers.
        options: of the source.

    Raises:
        UserError: a column does not exist, is named twice, or no column has numbers.
    """
    wanted = options.get("series")
    if wanted is None:
        return ["series"] if "series" in there else []
    if wanted == ALL and ALL not in there:
        others = set(taken)
        found = [name for name in there if name not in others and numeric(name)]
        if not found:
            raise UserError(f"option series={ALL}: none of the other columns has numbers alone: {', '.join(there)}")
        return found
    names = [wanted] if wanted in there else [name for name in wanted.split(",") if name]
    for name in names:
        if name not in there:
            raise UserError(f"option series={wanted}: no column {name}; the table has {', '.join(there)}")
    if len(set(names)) < len(names):
        raise UserError(f"option series={wanted}: a column is named twice")
    return names


def series_columns(
    names: Sequence[str], rows: Iterable[tuple[Mapping[str, Any], ReadFile]], options: Mapping[str, str], where: str
) -> SeriesColumns:
    """Return the columns with the channels and the length that most of some rows have.

    Args:
        names: the columns.
        rows: the first ones, each with what reads a file that a cell of it names.
        options: of the source; `length` is the number of steps, or `any`.
        where: the table, for the error.

    Raises:
        UserError: none of the rows has numbers; the message has the reason of the first one.
    """
    shapes: Counter[tuple[int, ...]] = Counter()
    reason = "no rows"
    for cells, read in rows:
        try:
            steps = row_steps([cells.get(name) for name in names], names, options.get("separator") or ";", read)
            shapes[steps.shape] += 1
        except (ValueError, BadSample, OSError) as error:
            reason = first_line(error, 120) if not shapes else reason
    if not shapes:
        raise UserError(
            f"{where}: no numbers for the feature series in {', '.join(names[:SHOWN])}: {reason}; name the columns by"
            " --option series=COLUMN,..., or leave them out by --option series="
        )
    channels = Counter(channels for _, channels in shapes.elements()).most_common(1)[0][0]
    lengths = {length for length, found in shapes if found == channels}
    length = lengths.pop() if len(lengths) == 1 else None
    if "length" in options:
        length = None if options["length"] == ANY else number(options, "length", length or 1)
    return SeriesColumns(tuple(names), channels, length)


def row_steps(cells: Sequence[Any], names: Sequence[str], separator: str, read: ReadFile) -> Steps:
    """Return float32 (length, channels) of the cells of a row: one step of numbers, or arrays of as many steps.

    A number is a cell of its own; an array is a list, in a CSV as JSON or with separators, or the path of a .npy file.

    Raises:
        ValueError: a cell is empty, not finite or not a number, or the arrays differ in length.
    """
    parts = [_steps(cell, name, separator, read) for cell, name in zip(cells, names, strict=True)]
    lengths = {len(part) for part in parts}
    if len(lengths) > 1:
        raise ValueError(f"{', '.join(map(str, sorted(lengths)))} steps in one row, wanted as many in each column")
    with np.errstate(over="ignore"):
        steps = np.concatenate(parts, axis=1).astype("<f4")
    if not steps.size:
        raise ValueError("no steps")
    if not np.isfinite(steps).all():
        raise ValueError("a number beyond float32")
    return steps


def _steps(cell: Any, name: str, separator: str, read: ReadFile) -> np.ndarray:
    """Return the numbers of a cell, float64 (length, channels)."""
    value = _parsed(cell, name, separator, read)
    try:
        array = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"no numbers in {name}") from None
    if array.ndim > 2:
        raise ValueError(f"an array of {array.ndim} dimensions in {name}, wanted steps, or steps and channels")
    array = array.reshape(1, 1) if array.ndim == 0 else array[:, None] if array.ndim == 1 else array
    with np.errstate(invalid="ignore"):
        if not np.isfinite(array).all():
            raise ValueError(f"NaN or infinite in {name}")
    return array


def _parsed(cell: Any, name: str, separator: str, read: ReadFile) -> Any:
    """Return the number, list or array of a cell."""
    if cell is None or cell == "":
        raise ValueError(f"no number in {name}")
    if not isinstance(cell, str):
        return cell
    text = cell.strip()
    if text.lower().endswith(".npy"):
        return read_npy(read(text), (1, 2))
    if text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"no list of numbers in {name}") from None
    words = text.split(separator)
    return [to_number(word, name) for word in words] if len(words) > 1 else to_number(text, name)


def to_number(text: str, name: str) -> float:
    """Return a number of a cell, `nan` and `inf` included; raise `ValueError` if it is none."""
    try:
        if "_" in text:
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"no number in {name}") from None


def counted_columns(names: Sequence[str]) -> str:
    """Return the names of a few columns, or the number of many, for a note."""
    return ", ".join(names) if len(names) <= SHOWN else f"{len(names)} columns of numbers"


def are_numbers(cells: Iterable[Any]) -> bool:
    """Return whether cells of a CSV or JSON lines are numbers; empty ones do not count, unless all are."""
    found = False
    for cell in cells:
        if cell is None or cell == "":
            continue
        if isinstance(cell, bool | list | dict):
            return False
        try:
            found = math.isfinite(to_number(str(cell), "")) or found
        except ValueError:
            return False
    return found
