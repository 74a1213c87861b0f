"""Reading rows of shards: row groups by range reads, and a cache of the last ones in each process."""

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from perceiver.config import UserError
from pipelines.plan import RowGroups
from pipelines.remote import ReadPolicy, read_row_group
from pipelines.storage import Folder, open_folder

READ_THREADS = 8

Key = tuple[str, str, tuple[str, ...], int]
"""Folder, file, columns, row group: all that decides what is read, since one process serves every split."""


@dataclass
class RowGroup:
    """The rows of one row group: columns as stored, and what was decoded of them so far, if it is small."""

    columns: dict[str, pa.Array]
    rows: int
    nbytes: int
    decoded: dict[tuple[str, int], Any] = field(default_factory=dict)

    def sample(self, row: int) -> dict[str, Any]:
        """One row as Python values."""
        return {name: column[row].as_py() for name, column in self.columns.items()}


class RowGroupCache:
    """The row groups read last, up to a number of bytes (those of the current read always fit).

    A task leaves them to the next task in the same process, which often needs the same ones.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Key, RowGroup] = OrderedDict()
        self.nbytes = 0

    def get(self, key: Key) -> RowGroup | None:
        """The row group, if it is here; it counts as used now."""
        group = self._groups.get(key)
        if group is not None:
            self._groups.move_to_end(key)
        return group

    def put(self, key: Key, group: RowGroup, limit: int) -> None:
        """Add a row group and drop the ones unused for longest, down to `limit` bytes."""
        self._groups[key] = group
        self.nbytes += group.nbytes
        while self.nbytes > limit and len(self._groups) > 1:
            self.nbytes -= self._groups.popitem(last=False)[1].nbytes


_CACHE = RowGroupCache()


@dataclass(frozen=True)
class Reader:
    """Reads samples of a split by id.

    Attributes:
        url: the prepared folder.
        shards: file names, in the order of the ids.
        sizes: their bytes.
        groups: the row groups of these files.
        columns: the columns to read.
        storage_options: of the folder; `$NAME` is taken from the environment of the reading process.
        policy: patience with a remote file system.
        cache_bytes: size of the process's cache.
        decoded_bytes: what a decoded sample will add to the cache; 0 if decoded samples are not kept.
    """

    url: str
    shards: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: RowGroups
    columns: tuple[str, ...]
    storage_options: Mapping[str, str]
    policy: ReadPolicy
    cache_bytes: int
    decoded_bytes: int

    def locate(self, ids: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """(shard, row group, row) of each sample."""
        return list(zip(*(part.tolist() for part in self.groups.locate(ids)), strict=True))

    def row_groups(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], RowGroup]:
        """Read row groups (shard, group), those not in the cache at the same time."""
        found = {place: _CACHE.get(self._key(*place)) for place in wanted}
        missing = sorted(place for place, group in found.items() if group is None)
        if missing:
            folder = open_folder(self.url, self.storage_options)
            with ThreadPoolExecutor(min(READ_THREADS, len(missing))) as pool:
                for place, group in zip(missing, pool.map(lambda place: self._read(folder, *place), missing),
                                        strict=True):
                    _CACHE.put(self._key(*place), group, self.cache_bytes)
                    found[place] = group
        return {place: group for place, group in found.items() if group is not None}

    def _key(self, shard: int, group: int) -> Key:
        return self.url, self.shards[shard], self.columns, group

    def _read(self, folder: Folder, shard: int, group: int) -> RowGroup:
        name, columns = self.shards[shard], list(self.columns)
        try:
            if folder.local:
                with pq.ParquetFile(folder.file(name), page_checksum_verification=True) as file:
                    table = file.read_row_group(group, columns=columns, use_threads=False)
            else:
                table = read_row_group(folder, name, self.sizes[shard], group, columns, self.policy)
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot read row group {group} of {folder.url}/{name}: {reason}; check the data with"
                            f" `perceiver inspect {folder.url} --verify`") from error
        columns = {name: table.column(name).combine_chunks() for name in self.columns}
        return RowGroup(columns, table.num_rows, table.nbytes + table.num_rows * self.decoded_bytes)
