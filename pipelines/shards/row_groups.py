"""Reading row groups of Parquet files, mostly one range each."""

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.io import Bytes, Folder, ReadPolicy, read_range
from pipelines.shards.plain import plain_type, plain_values

FOOTER_BYTES = 64 << 10
"""Read first from a file's end; a longer footer costs one more request."""
FOOTERS_KEPT = 256
GAP_BYTES = 256 << 10
"""Columns with up to so much between them are fetched together."""


class _Parts(io.RawIOBase):
    """A read-only file of which only some ranges are at hand."""

    def __init__(self, size: int, parts: list[tuple[int, Bytes]]) -> None:
        self.size, self.parts, self.place = size, parts, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def read(self, size: int = -1, /) -> bytes:
        stop = self.size if size < 0 else min(self.size, self.place + size)
        found = bytes(self.view(self.place, stop))
        self.place = stop
        return found

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes [start, stop), not copied."""
        for first, data in self.parts:
            if first <= start and stop <= first + len(data):
                return memoryview(data)[start - first : stop - first]
        raise OSError(f"bytes {start} to {stop} were not fetched")


class _Footers:
    """The footers read last in this process; threads that want the same one wait for one request."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: Folder, name: str, size: int, policy: ReadPolicy) -> pq.FileMetaData:
        """The footer of a file of `size` bytes."""
        key = (folder.url, name)
        with self._lock:
            mine = key not in self._kept
            future = self._kept.setdefault(key, Future())
            while len(self._kept) > FOOTERS_KEPT:
                self._kept.popitem(last=False)
        if mine:
            try:
                future.set_result(read_footer(folder, name, size, policy))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
                raise
        return future.result()


_FOOTERS = _Footers()


def read_footer(folder: Folder, name: str, size: int, policy: ReadPolicy) -> pq.FileMetaData:
    """The footer of a Parquet file of `size` bytes, mostly by one range request.

    Raises:
        ReadError: a request failed for good.
        pyarrow.ArrowException: the bytes are no Parquet file.
    """
    start = max(0, size - FOOTER_BYTES)
    tail = read_range(folder, name, start, size, policy)
    wanted = int.from_bytes(tail[-8:-4], "little") + 8
    if wanted > len(tail):
        start = max(0, size - wanted)
        tail = read_range(folder, name, start, size, policy)
    with pq.ParquetFile(_Parts(size, [(start, tail)])) as file:
        return file.metadata


class Stored(NamedTuple):
    """Columns of one row group as they are stored.

    Attributes:
        table: of those that Arrow has read.
        plain: the values of those that were taken from their pages as they are, by path; texts as views of their bytes.
        rows: of the row group.
        nbytes: size of all.
    """

    table: pa.Table
    plain: dict[str, list[Any]]
    rows: int
    nbytes: int


def read_row_group(
    folder: Folder, name: str, size: int, group: int, columns: Mapping[str, pa.DataType], policy: ReadPolicy
) -> Stored:
    """Read one row group.

    Args:
        folder: where the file lies.
        name: the file.
        size: its bytes, as the manifest says; saves asking for it.
        group: which row group.
        columns: paths of the columns wanted and the types that they are to have, which Arrow does not look at.
        policy: of the requests.

    Raises:
        OSError: a local file cannot be read.
        ReadError: a request failed for good.
        pyarrow.ArrowException: the bytes are no Parquet file.
    """
    footer = _FOOTERS.get(folder, name, size, policy)
    info = footer.row_group(group)
    chunks = [info.column(i) for i in range(footer.num_columns)]
    parts = _Parts(
        size, [(start, read_range(folder, name, start, stop, policy)) for start, stop in _ranges(chunks, columns)]
    )
    plain, nbytes = {}, 0
    for number, chunk in enumerate(chunks):
        column, path = footer.schema.column(number), chunk.path_in_schema
        if path in columns and plain_type(chunk, column) == columns[path]:
            values = plain_values(parts.view(*_range(chunk)), chunk, column)
            if values is not None:
                plain[path] = values
                nbytes += chunk.total_uncompressed_size
    table = pa.table({})
    if others := [path for path in columns if path not in plain]:
        with pq.ParquetFile(parts, metadata=footer, page_checksum_verification=True) as file:
            table = file.read_row_group(group, columns=others, use_threads=False)
    return Stored(table, plain, info.num_rows, table.nbytes + nbytes)


def _range(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """The byte range of a column in a row group."""
    start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    return start, start + chunk.total_compressed_size


def _ranges(chunks: list[Any], columns: Iterable[str]) -> list[tuple[int, int]]:
    """The byte ranges of these columns; those with little between them become one, since a request costs more."""
    wanted = [
        chunk
        for chunk in chunks
        if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns)
    ]
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted(map(_range, wanted)):
        if ranges and start - ranges[-1][1] <= GAP_BYTES:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], stop)
        else:
            ranges.append((start, stop))
    return ranges
