"""Parquet files, read through pyarrow: files that were indexed, and shards of format version 1.

Their columns are matched to the features: other names, fields of structs, and types that lose nothing.
"""

import functools
import io
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.storage import Bytes, Folder, ReadPolicy, read_range
from pipelines.shards.manifest import KEY


class _RangeFile(io.RawIOBase):
    """A read-only file of which each read is a range request with the retries of a policy."""

    def __init__(self, folder: Folder, name: str, size: int, policy: ReadPolicy) -> None:
        self.folder, self.name, self.size, self.policy, self.position = folder, name, size, policy, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1, /) -> Bytes:  # type: ignore[override]  # Arrow takes any buffer.
        start = self.position
        self.position = self.size if size < 0 else min(self.size, start + size)
        return read_range(self.folder, self.name, start, self.position, self.policy)


@functools.lru_cache(maxsize=256)
def read_footer(folder: Folder, name: str, size: int, policy: ReadPolicy) -> pq.FileMetaData:
    """Return the footer of a Parquet file of `size` bytes, mostly by one range request.

    Raises:
        OSError: the file cannot be read, see `read_range`.
        pyarrow.ArrowException: it is not a Parquet file.
    """
    return pq.read_metadata(_RangeFile(folder, name, size, policy))


def read_row_group(
    folder: Folder,
    name: str,
    size: int,
    group: int,
    schema: pa.Schema,
    columns: Mapping[str, str],
    classes: tuple[str, ...],
    policy: ReadPolicy,
) -> pa.RecordBatch:
    """Read the features' columns of one row group.

    Args:
        folder, name: the file.
        size: its bytes, from the manifest.
        group: which row group.
        schema: names and types wanted: `key` and the features.
        columns: column of each feature in an indexed file, see `Split`; empty for a shard, which has the features' own
            names and a column of keys.
        classes: class names, for indexed files whose labels are strings.
        policy: time-out and retries of the requests.

    Raises:
        OSError: the file cannot be read, see `read_range`.
        KeyError, pyarrow.ArrowException: it is damaged, or a column is missing or of another type.
    """
    paths = {field.name: columns.get(field.name, field.name) for field in schema if field.name != KEY or not columns}
    footer = read_footer(folder, name, size, policy)
    stream = _RangeFile(folder, name, size, policy)
    with pq.ParquetFile(stream, metadata=footer, page_checksum_verification=True, pre_buffer=True) as file:
        table = file.read_row_group(group, columns=list(paths.values()), use_threads=False)
    found = []
    for wanted in schema:
        if wanted.name in paths:
            found.append(fit(column_at(table, paths[wanted.name]), wanted, classes if columns else ()))
        else:
            found.append(pa.array([row_key(name, group, row) for row in range(table.num_rows)], pa.string()))
    return pa.RecordBatch.from_arrays(found, schema=schema)


def row_key(name: str, group: int, row: int) -> str:
    """Return the key of a row that has none of its own."""
    return f"{name}#{group}.{row}"


def column_at(table: pa.Table, path: str) -> pa.Array:
    """Return a column as one array; `a.b` is the field b of the struct a.

    Raises:
        KeyError: there is no such column.
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
    """Return a column with the type that its feature wants, if the conversion loses nothing.

    Raises:
        pyarrow.ArrowTypeError: it has another type, as in a file whose schema has changed.
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
