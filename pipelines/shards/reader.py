"""Reading rows of shards: row groups by range reads, and a cache of the last ones in each process."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perceiver.config import UserError
from pipelines.order.plan import RowGroups
from pipelines.shards.io import Folder, ReadError, ReadPolicy, first_line, open_folder
from pipelines.shards.manifest import Split
from pipelines.shards.row_groups import read_row_group

READ_THREADS, LOCAL_READ_THREADS = 8, 2
"""Row groups read at a time. What a local disk's cache holds takes two threads a fifth less CPU time than eight."""
KEY = "key"

Key = tuple[str, str, tuple[str, ...], int]
"""Folder, file, columns, row group: all that decides what is read, since one process serves every split."""
Place = tuple[int, int, int]
"""Shard, row group, row."""


@dataclass
class RowGroup:
    """The rows of one row group: the values of each column by row, and what was decoded of them so far, if it is small.

    One that cannot be read has no rows and an `error`.
    """

    columns: dict[str, Callable[[int], Any]]
    rows: int
    nbytes: int
    decoded: dict[tuple[str, int], Any] = field(default_factory=dict)
    error: str = ""

    def value(self, name: str, row: int) -> Any:
        """One value as Python's own; bytes may be a view."""
        return self.columns[name](row)


@functools.lru_cache(maxsize=256)
def _opened(url: str, options: tuple[tuple[str, str], ...]) -> Folder:
    """The folder, opened once in a process: looking its file system up takes as long as reading a few samples."""
    return open_folder(url, dict(options))


def _plain_column(values: list[Any], kind: pa.DataType) -> Callable[[int], Any]:
    """The values by row of a column that was taken from its pages."""
    return (lambda row: str(values[row], "utf-8")) if pa.types.is_string(kind) else values.__getitem__


def _arrow_column(column: pa.Array) -> Callable[[int], Any]:
    """The values by row of a column that Arrow has read."""
    if pa.types.is_integer(column.type):
        return column.to_pylist().__getitem__
    return lambda row: column[row].as_py()


class RowGroupCache:
    """The row groups read last, up to a number of bytes (those of the last read always fit).

    A task leaves them to the next task in the same process, which often needs the same ones: dropping some of them
    would have all read again, since each task goes through them in the same order.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Key, RowGroup] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, key: Key) -> RowGroup | None:
        """The row group, if it is here; it counts as used now."""
        with self._lock:
            group = self._groups.get(key)
            if group is not None:
                self._groups.move_to_end(key)
        return group

    def put(self, key: Key, group: RowGroup, limit: int) -> None:
        """Add a row group and drop the ones unused for longest, down to `limit` bytes."""
        with self._lock:
            former = self._groups.pop(key, None)
            self._groups[key] = group
            self.nbytes += group.nbytes - (former.nbytes if former else 0)
            while self.nbytes > limit and len(self._groups) > 1:
                self.nbytes -= self._groups.popitem(last=False)[1].nbytes


_CACHE = RowGroupCache()


@dataclass(frozen=True)
class Files:
    """Shards of one folder, or indexed files.

    Attributes:
        url: the folder.
        names: of the files, relative to the folder, or absolute where they were indexed.
        sizes: their bytes.
        columns: column of each feature, `a.b` for a field of a struct; those left out bear the feature's name. Files
            with such a mapping have no column of keys.
    """

    url: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, split: Split) -> "Files":
        """The files of a split."""
        return cls(url, tuple(s.name for s in split.shards), tuple(s.bytes for s in split.shards), split.columns)


@dataclass(frozen=True)
class Reader:
    """Reads samples of a split by id.

    Attributes:
        files: the shards, folder by folder, in the order of the ids.
        groups: the row groups of all of them.
        schema: the columns wanted: `key` and the features.
        classes: class names, for indexed files whose labels are strings.
        storage_options: of the folders; `$NAME` is taken from the environment of the reading process.
        policy: patience with a remote file system.
        cache_bytes: size of the process's cache.
        decoded_bytes: what a decoded sample will add to the cache; 0 if decoded samples are not kept.
    """

    files: tuple[Files, ...]
    groups: RowGroups
    schema: pa.Schema
    classes: tuple[str, ...]
    storage_options: Mapping[str, str]
    policy: ReadPolicy
    cache_bytes: int
    decoded_bytes: int

    def locate(self, ids: NDArray[np.int64]) -> list[Place]:
        """(shard, row group, row) of each sample."""
        return list(zip(*(part.tolist() for part in self.groups.locate(ids)), strict=True))

    def row_groups(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], RowGroup]:
        """Read row groups (shard, group), those not in the cache at the same time.

        One that is damaged or gone has an `error` and no rows; it is not kept.

        Raises:
            UserError: the store does not answer or does not let us in, which says nothing about the data.
        """
        found = {place: _CACHE.get(self._key(*place)) for place in wanted}
        missing = sorted(place for place, group in found.items() if group is None)
        if missing:
            with ThreadPoolExecutor(min(self._threads, len(missing))) as pool:
                read = dict(zip(missing, pool.map(lambda place: self._read(*place), missing), strict=True))
            found |= read
            limit = max(self.cache_bytes, sum(group.nbytes for group in found.values() if group))
            for place, group in read.items():
                if not group.error:
                    _CACHE.put(self._key(*place), group, limit)
        return {place: group for place, group in found.items() if group is not None}

    @functools.cached_property
    def _threads(self) -> int:
        folders = {split_url(files.url, name)[0] for files in self.files for name in files.names[:1]}
        local = all(_opened(folder, self._options).local for folder in folders)
        return LOCAL_READ_THREADS if local else READ_THREADS

    @property
    def _options(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(self.storage_options.items()))

    def name(self, shard: int) -> str:
        """The file's name, as the manifest gives it."""
        files, number = self._files(shard)
        return files.names[number]

    def folder(self, shard: int) -> str:
        """URL of the prepared folder that a shard belongs to."""
        return self._files(shard)[0].url

    def _files(self, shard: int) -> tuple[Files, int]:
        for files in self.files:
            if shard < len(files.names):
                return files, shard
            shard -= len(files.names)
        raise IndexError(shard)

    def _key(self, shard: int, group: int) -> Key:
        files, number = self._files(shard)
        return files.url, files.names[number], tuple(self.schema.names), group

    def _read(self, shard: int, group: int) -> RowGroup:
        files, number = self._files(shard)
        url, name = split_url(files.url, files.names[number])
        folder = _opened(url, self._options)
        try:
            return self._group(folder, name, files, files.sizes[number], group)
        except PermissionError as error:
            raise UserError(f"may not read {folder.url}/{name}: {first_line(error)}; check the credentials") from error
        except FileNotFoundError:
            return RowGroup({}, 0, 0, error=f"{name}: missing")
        except (OSError, pa.ArrowException, KeyError) as error:
            if self._changed(folder, name, files.sizes[number]):
                return RowGroup({}, 0, 0, error=f"{name}: has another size than the manifest says")
            if isinstance(error, ReadError):
                raise UserError(f"{error}; check the network and {folder.url}, then go on with --resume") from error
            return RowGroup({}, 0, 0, error=f"{name}: {first_line(error)[:120]}")

    @staticmethod
    def _changed(folder: Folder, name: str, size: int) -> bool:
        """Whether the store still answers, with another size; asked only after a read has failed for good."""
        try:
            folder.fs.invalidate_cache()
            return folder.fs.size(folder.file(name)) != size
        except Exception:  # noqa: BLE001  each driver raises errors of its own when the store does not answer
            return False

    def _group(self, folder: Folder, name: str, files: Files, size: int, group: int) -> RowGroup:
        """A row group's columns under the features' names and with their types."""
        paths = {
            field.name: files.columns.get(field.name, field.name)
            for field in self.schema
            if field.name != KEY or not files.columns
        }
        types: dict[str, pa.DataType] = {}
        for column, path in paths.items():
            kind = self.schema.field(column).type
            types[path] = kind if types.get(path, kind) == kind else pa.null()  # wanted in two ways: Arrow's work
        found = read_row_group(folder, name, size, group, types, self.policy)
        plain = {
            column: _plain_column(found.plain[path], types[path])
            for column, path in paths.items()
            if path in found.plain
        }
        others = pa.schema([field for field in self.schema if field.name not in plain])
        columns = stored_columns(found.table, files.columns, others, self.classes, f"{name}#{group}", found.rows)
        read = {column: _arrow_column(array) for column, array in columns.items()}
        return RowGroup({**read, **plain}, found.rows, found.nbytes + found.rows * self.decoded_bytes)


def stored_columns(
    table: pa.Table, columns: Mapping[str, str], schema: pa.Schema, classes: tuple[str, ...], place: str, rows: int
) -> dict[str, pa.Array]:
    """A row group's columns under the names and with the types of `schema`.

    Args:
        table: what the file holds.
        columns: where indexed files keep the features, see `Files`; empty for prepared shards.
        schema: `key` and the features.
        classes: class names, for indexed files whose labels are strings.
        place: name of the row group, for the keys of indexed files.
        rows: of the row group.

    Raises:
        KeyError, pyarrow.ArrowTypeError: a column is not there, or is of another type.
    """
    found = {}
    for wanted in schema:
        if wanted.name == KEY and columns:
            found[KEY] = pa.array(indexed_keys(place, rows), pa.string())
            continue
        path = columns.get(wanted.name, wanted.name)
        found[wanted.name] = fit(column_at(table, path), wanted, classes if columns else ())
    return found


def indexed_keys(place: str, rows: int) -> list[str]:
    """The keys of the rows of an indexed file's row group, which stores none."""
    return [f"{place}.{row}" for row in range(rows)]


def split_url(url: str, name: str) -> tuple[str, str]:
    """Folder and file name of a shard: its name is relative to `url`, or itself a URL or an absolute path."""
    if "://" not in name and not name.startswith("/"):
        return url, name
    folder, _, file = name.rpartition("/")
    return folder, file


def column_at(table: pa.Table, path: str) -> pa.Array:
    """A column as one array; `a.b` is the field b of the struct a.

    Raises:
        KeyError: there is none.
    """
    first, *rest = path.split(".")
    if first not in table.column_names:
        raise KeyError(f"no column {first}")
    chunks = table.column(first)
    array = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()  # which copies a single one, too
    for name in rest:
        if not pa.types.is_struct(array.type) or array.type.get_field_index(name) < 0:
            raise KeyError(f"no column {path}")
        array = array.flatten()[array.type.get_field_index(name)]
    return array


def fit(array: pa.Array, wanted: pa.Field, classes: tuple[str, ...]) -> pa.Array:
    """A column with the type that its feature wants, if nothing is lost by it.

    Raises:
        pyarrow.ArrowTypeError: another type, as in a shard whose schema has drifted.
    """
    kind = array.type
    if kind.equals(wanted.type):
        return array
    if pa.types.is_dictionary(kind):
        return fit(array.dictionary_decode(), wanted, classes)
    if pa.types.is_integer(kind) and pa.types.is_int64(wanted.type):
        return array.cast(wanted.type)
    if kind in (pa.large_binary(), pa.large_string(), pa.binary_view(), pa.string_view()) and (
        pa.types.is_binary(wanted.type) or pa.types.is_string(wanted.type)
    ):
        return array.cast(wanted.type)
    if pa.types.is_list(wanted.type) and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return array.cast(wanted.type)
    if pa.types.is_int64(wanted.type) and (pa.types.is_string(kind) or pa.types.is_large_string(kind)) and classes:
        numbers = {name: number for number, name in enumerate(classes)}
        return pa.array([numbers.get(label, -1) for label in array.to_pylist()], wanted.type)
    raise pa.ArrowTypeError(f"column {wanted.name} is {kind}, wanted {wanted.type}")
