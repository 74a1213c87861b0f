"""Read samples by id: row groups of shards or indexed files, and a cache of them in each process."""

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
from perceiver.storage import Folder, ReadError, ReadPolicy, absolute, first_line, open_folder
from pipelines.order.mixture import folders_of
from pipelines.order.plan import RowGroups
from pipelines.shards.arrow import read_batch
from pipelines.shards.manifest import KEY, BatchInfo, Manifest, Split, arrow_schema, split_url
from pipelines.shards.parquet import read_row_group, row_key

READ_THREADS, LOCAL_READ_THREADS = 8, 2
"""Row groups read at a time. From a local disk's cache, two threads read with a fifth less CPU time than eight."""

CacheKey = tuple[str, str, int, str, str, int, tuple[int, ...]]
"""Folder, file, its size and version, columns and their types, row group and its place and checksum.

One process serves every split, and data may be prepared again at the same place while it runs.
"""
RowAddress = tuple[int, int, int]
"""Shard, row group within the shard, row within the group."""


@dataclass
class RowGroup:
    """The values of each column of a row group by row, and the samples decoded so far if they are kept.

    A row group that cannot be read has no rows and an `error`.
    """

    columns: dict[str, Callable[[int], Any]]
    rows: int
    nbytes: int
    decoded: dict[tuple[str, int], Any] = field(default_factory=dict)
    error: str = ""

    def value(self, name: str, row: int) -> Any:
        """Return one value as a Python object (bytes may be a view); `UnicodeDecodeError` if a text is not UTF-8."""
        return self.columns[name](row)


def _values(column: pa.Array) -> Callable[[int], Any]:
    """Return the function from a row to its value; bytes are views, since copying takes as long as decoding."""
    if pa.types.is_integer(column.type):
        return column.to_pylist().__getitem__
    if pa.types.is_binary(column.type) and not column.null_count and len(column):
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets, np.int32, len(column) + 1, 4 * column.offset).tolist()
        view = memoryview(data or b"").cast("B")
        return lambda row: view[ends[row] : ends[row + 1]]
    return lambda row: column[row].as_py()


@functools.lru_cache(maxsize=256)
def _opened(url: str, options: tuple[tuple[str, str], ...]) -> Folder:
    """Open a folder once per process: finding its file system takes as long as reading a few samples."""
    return open_folder(url, dict(options))


class RowGroupCache:
    """The row groups read last, up to a number of bytes (those of the last read always fit).

    They stay for the next task in the same process, which often needs the same ones. If some were dropped, all would be
    read again, since each task reads them in the same order.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[CacheKey, RowGroup] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, key: CacheKey) -> RowGroup | None:
        """Return the row group if it is cached; it counts as used now."""
        with self._lock:
            group = self._groups.get(key)
            if group is not None:
                self._groups.move_to_end(key)
        return group

    def put(self, key: CacheKey, group: RowGroup, limit: int) -> None:
        """Add a row group and drop the least recently used ones, down to `limit` bytes."""
        with self._lock:
            former = self._groups.pop(key, None)
            self._groups[key] = group
            self.nbytes += group.nbytes - (former.nbytes if former else 0)
            while self.nbytes > limit and len(self._groups) > 1:
                self.nbytes -= self._groups.popitem(last=False)[1].nbytes


CACHE = RowGroupCache()
"""The row groups of this process."""


@dataclass(frozen=True)
class ShardFiles:
    """Shards of one folder, or indexed files; arrays, since each data task gets a copy.

    Attributes:
        url: the folder.
        names: of the files, relative to the folder; absolute for indexed files.
        sizes: their bytes.
        tags: versions of indexed files; else empty.
        columns: see `Split`.
        first: index of each file's first row group, and the number of all.
        index: `BatchInfo` of all row groups; the length is 0 in Parquet files.
    """

    url: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    tags: tuple[str, ...]
    columns: Mapping[str, str]
    first: NDArray[np.int64]
    index: NDArray[np.int64]

    @classmethod
    def of(cls, url: str, split: Split) -> "ShardFiles":
        """Return the files of a split of the folder at `url`, which data tasks with other working folders read, too."""
        index = [shard.batches or [(0, 0, rows, 0) for rows in shard.group_sizes()] for shard in split.shards]
        return cls(
            absolute(url),
            tuple(shard.name for shard in split.shards),
            tuple(shard.bytes for shard in split.shards),
            tuple(shard.tag for shard in split.shards),
            split.columns,
            np.cumsum([0, *map(len, index)]),
            np.array([batch for batches in index for batch in batches], np.int64).reshape(-1, 4),
        )


@dataclass(frozen=True)
class Reader:
    """Reads samples of a split by id.

    Attributes:
        files: the shards, folder by folder, in the order of the ids.
        groups: the row groups of all shards.
        schema: the columns: `key` and the features.
        classes: class names, for indexed files whose labels are strings.
        storage_options: of the folders; `$NAME` is taken from the environment of the reading process.
        policy: time-out and retries of remote reads.
        cache_bytes: size of the process's cache.
        decoded_bytes: cached bytes of a decoded sample; 0 if decoded samples are not kept.
    """

    files: tuple[ShardFiles, ...]
    groups: RowGroups
    schema: pa.Schema
    classes: tuple[str, ...]
    storage_options: Mapping[str, str]
    policy: ReadPolicy = ReadPolicy()
    cache_bytes: int = 0
    decoded_bytes: int = 0

    @classmethod
    def of(
        cls, url: str, manifest: Manifest, split: Split, options: Mapping[str, str] | None = None, **settings: Any
    ) -> "Reader":
        """Return a reader of one split of the folder at `url`, or of a mixture's folders.

        Args:
            settings: `policy`, `cache_bytes` and `decoded_bytes`; by default only the last read is kept.
        """
        files = tuple(ShardFiles.of(folder.url, folder.split) for folder in folders_of(url, split))
        schema = arrow_schema(manifest.features)
        return cls(files, RowGroups.of(split), schema, manifest.classes, options or {}, **settings)

    def locate(self, ids: NDArray[np.int64]) -> list[RowAddress]:
        """Return the address of each sample."""
        return list(zip(*(part.tolist() for part in self.groups.locate(ids)), strict=True))

    def row_groups(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], RowGroup]:
        """Return row groups (shard, group); those that are not in the cache are read concurrently.

        One that is damaged or missing has an `error` and no rows, and is not cached.

        Raises:
            UserError: the store does not answer or denies access.
        """
        found = {place: CACHE.get(self._key(*place)) for place in wanted}
        missing = sorted(place for place, group in found.items() if group is None)
        if missing:
            with ThreadPoolExecutor(min(self._threads, len(missing))) as pool:
                read = dict(zip(missing, pool.map(lambda place: self._read(*place), missing), strict=True))
            found |= read
            limit = max(self.cache_bytes, sum(group.nbytes for group in found.values() if group))
            for place, group in read.items():
                if not group.error:
                    CACHE.put(self._key(*place), group, limit)
        return {place: group for place, group in found.items() if group is not None}

    def keys(self, ids: NDArray[np.int64]) -> list[str]:
        """Return the keys of samples, which name their origin; row groups are read one after the other."""
        return [self._row_key(*address) for address in self.locate(ids)]

    def _row_key(self, shard: int, group: int, row: int) -> str:
        if not self._files(shard)[0].columns:
            found = self.row_groups({(shard, group)})[shard, group]
            if not found.error:
                return found.value(KEY, row)
        return self.row_key(shard, group, row)

    def row_key(self, shard: int, group: int, row: int) -> str:
        """Return the key of a row of an indexed file or of a row group that cannot be read."""
        return row_key(split_url("", self.name(shard))[1], group, row)

    @functools.cached_property
    def _threads(self) -> int:
        folders = {split_url(files.url, name)[0] for files in self.files for name in files.names[:1]}
        local = all(_opened(folder, self._options).local for folder in folders)
        return LOCAL_READ_THREADS if local else READ_THREADS

    @property
    def _options(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(self.storage_options.items()))

    def name(self, shard: int) -> str:
        """Return the file's name, as in the manifest."""
        files, number = self._files(shard)
        return files.names[number]

    def folder(self, shard: int) -> str:
        """Return the URL of the prepared folder that a shard belongs to."""
        return self._files(shard)[0].url

    def _files(self, shard: int) -> tuple[ShardFiles, int]:
        for files in self.files:
            if shard < len(files.names):
                return files, shard
            shard -= len(files.names)
        raise IndexError(shard)

    def _key(self, shard: int, group: int) -> CacheKey:
        files, number = self._files(shard)
        batch = tuple(files.index[files.first[number] + group].tolist())
        return files.url, files.names[number], files.sizes[number], files.tags[number], self._types, group, batch

    @functools.cached_property
    def _types(self) -> str:
        return str(self.schema)

    def _read(self, shard: int, group: int) -> RowGroup:
        files, number = self._files(shard)
        url, name = split_url(files.url, files.names[number])
        folder, size = _opened(url, self._options), files.sizes[number]
        batch = BatchInfo(*files.index[files.first[number] + group].tolist())
        try:
            if not files.columns:
                folder.existing(name)
            if batch.length:
                rows = read_batch(folder, name, batch, self.schema, self.policy)
            else:
                first, last = files.first[number : number + 2]
                groups = files.index[first:last, 2]
                layout = group, groups, self.schema, files.columns, self.classes
                rows = read_row_group(folder, name, size, *layout, self.policy, files.tags[number])
        except PermissionError as error:
            raise UserError(f"may not read {folder.url}/{name}: {first_line(error)}; check the credentials") from error
        except FileNotFoundError:
            return RowGroup({}, 0, 0, error=f"{name}: missing")
        except Exception as error:  # noqa: BLE001  Arrow raises many types for a damaged file
            if self._changed(folder, name, size):
                return RowGroup({}, 0, 0, error=f"{name}: its size differs from the manifest")
            if isinstance(error, ReadError):
                raise UserError(f"{error}; check the network and {folder.url}, then continue with --resume") from error
            return RowGroup({}, 0, 0, error=f"{name}: {first_line(error)[:120]}")
        columns = {field.name: _values(column) for field, column in zip(self.schema, rows.columns, strict=True)}
        return RowGroup(columns, rows.num_rows, rows.nbytes + rows.num_rows * self.decoded_bytes)

    @staticmethod
    def _changed(folder: Folder, name: str, size: int) -> bool:
        """Return whether the file has another size now; called only after a read has finally failed."""
        try:
            folder.fs.invalidate_cache()
            return folder.fs.size(folder.file(name)) != size
        except Exception:  # noqa: BLE001  each driver has its own errors when the store does not answer
            return False
