"""Parquet files, read through pyarrow: indexed files, and shards of format version 1.

Their columns are matched to the features: by other names, fields of structs, and lossless conversions.
"""

import functools
import io
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from perceiver.storage import Bytes, Folder, ReadPolicy, read_range
from pipelines.shards.manifest import KEY

MAX_BYTES = 4 << 30
"""Limit of a row group's bytes, by the footer."""


class RangeFile(io.RawIOBase):
    """A read-only file; each read is a range request with the retries of a policy."""

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
def read_footer(folder: Folder, name: str, size: int, policy: ReadPolicy, tag: str = "") -> pq.FileMetaData:
    """Return the footer of a Parquet file of `size` bytes, usually with one range request.

    It is kept in the process for the same size and `tag`, the file's version in the manifest.

    Raises:
        OSError: the file cannot be read, see `read_range`.
        pyarrow.ArrowException: it is not a Parquet file.
    """
    return pq.read_metadata(RangeFile(folder, name, size, policy))


def read_row_group(
    folder: Folder,
    name: str,
    size: int,
    group: int,
    groups: NDArray[np.int64],
    schema: pa.Schema,
    columns: Mapping[str, str],
    classes: tuple[str, ...],
    policy: ReadPolicy,
    tag: str = "",
) -> pa.RecordBatch:
    """Read the features' columns of one row group.

    Args:
        folder, name: the file.
        size: its bytes, from the manifest.
        group: its index.
        groups: rows of each row group of the file, from the manifest.
        schema: names and types of the result: `key` and the features.
        columns: column of each feature in an indexed file, see `Split`; empty for a shard, which has the features' own
            names and a column of keys.
        classes: class names, for indexed files whose labels are strings.
        policy: time-out and retries of the requests.
        tag: version of an indexed file, from the manifest.

    Raises:
        OSError: the file cannot be read, see `read_range`, or it has other row groups.
        KeyError, pyarrow.ArrowException: it is damaged, or a column is missing or of another type.
    """
    paths = {field.name: columns.get(field.name, field.name) for field in schema if field.name != KEY or not columns}
    footer = read_footer(folder, name, size, policy, tag)
    found, wanted = (footer.num_rows, footer.num_row_groups), (int(groups.sum()), groups.size)
    if found != wanted or footer.row_group(group).num_rows != groups[group]:
        raise OSError(f"{found[0]} rows in {found[1]} row groups, wanted {wanted[0]} in {wanted[1]}, each as listed")
    if footer.row_group(group).total_byte_size > MAX_BYTES:
        raise OSError(f"a row group of {footer.row_group(group).total_byte_size:,} bytes, wanted up to {MAX_BYTES:,}")
    stream = RangeFile(folder, name, size, policy)
    with pq.ParquetFile(stream, metadata=footer, page_checksum_verification=True, pre_buffer=True) as file:
        table = file.read_row_group(group, columns=list(paths.values()), use_threads=False)
    arrays = []
    for field in schema:
        if field.name in paths:
            arrays.append(fit(column_at(table, paths[field.name]), field, classes if columns else ()))
        else:
            arrays.append(pa.array([row_key(name, group, row) for row in range(table.num_rows)], pa.string()))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def row_key(name: str, group: int, row: int) -> str:
    """Return the key of a row without a stored key."""
    return f"{name}#{group}.{row}"


def column_at(table: pa.Table, path: str) -> pa.Array:
    """Return a column as one array; `a.b` is the field b of the struct a. A missing column is a `KeyError`."""
    first, *rest = path.split(".")
    if first not in table.column_names:
        raise KeyError(f"no column {first}")
    chunks = table.column(first)
    array = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()  # which also copies a single chunk
    for name in rest:
        if not pa.types.is_struct(array.type) or array.type.get_field_index(name) < 0:
            raise KeyError(f"no column {path}")
        array = array.flatten()[array.type.get_field_index(name)]
    return array


def fit(array: pa.Array, wanted: pa.Field, classes: tuple[str, ...]) -> pa.Array:
    """Convert a column to its feature's type; raise `pyarrow.ArrowTypeError` if that would lose information."""
    kind = array.type
    if kind.equals(wanted.type):
        return array
    if pa.types.is_dictionary(kind):
        return fit(array.dictionary_decode(), wanted, classes)
    if (pa.types.is_integer(kind) or pa.types.is_boolean(kind)) and pa.types.is_int64(wanted.type):
        return array.cast(wanted.type)
    if kind in (pa.large_binary(), pa.large_string(), pa.binary_view(), pa.string_view()) and (
        pa.types.is_binary(wanted.type) or pa.types.is_string(wanted.type)
    ):
        return array.cast(wanted.type)
    if pa.types.is_list(wanted.type) and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return array.cast(wanted.type)
    if pa.types.is_int64(wanted.type) and kind in (pa.string(), pa.large_string(), pa.string_view()) and classes:
        numbers = {name: number for number, name in enumerate(classes)}
        return pa.array([numbers.get(label, -1) for label in array.to_pylist()], wanted.type)
    raise pa.ArrowTypeError(f"column {wanted.name} is {kind}, wanted {wanted.type}")
