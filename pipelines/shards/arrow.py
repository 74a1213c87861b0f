"""Arrow IPC files: the format of prepared shards, with one record batch per row group.

The manifest has each batch's byte range and checksum, so that a batch is read with one request and without the file's
footer. Any Arrow reader opens the files (`pyarrow.ipc.open_file`).
"""

import functools
import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from isal.isal_zlib import crc32

from perceiver.storage import Folder, ReadPolicy, check_regular, first_line, make_parent, read_range
from pipelines.shards.manifest import MAGIC_BYTES, BatchInfo, ShardInfo


@functools.lru_cache(maxsize=16)
def _columns_crc32(schema: pa.Schema) -> int:
    """Return the CRC-32 of the names and types of the columns, which a record batch itself does not contain."""
    return crc32("\n".join(f"{field.name} {field.type}" for field in schema).encode())


def read_batch(folder: Folder, name: str, batch: BatchInfo, schema: pa.Schema, policy: ReadPolicy) -> pa.RecordBatch:
    """Read one record batch; its values are views of the bytes that were read or mapped, not copies.

    Args:
        folder, name: the file.
        batch: its range in the file, from the manifest.
        schema: columns of the file, see `arrow_schema`.
        policy: time-out and retries of the request.

    Raises:
        OSError: the range cannot be read (`ReadError` for a remote file), its checksum is not that of the manifest, or
            it is not a valid record batch of that many rows.
    """
    data = read_range(folder, name, batch.offset, batch.offset + batch.length, policy)
    if crc32(data, _columns_crc32(schema)) != batch.crc32:
        raise OSError(f"record batch at byte {batch.offset} is damaged: its CRC-32 is not that of the manifest")
    try:
        found = pa.ipc.read_record_batch(pa.py_buffer(data), schema)
        found.validate(full=True)  # The checksum does not prove that a file was written by this program.
    except (EOFError, OSError, pa.ArrowException) as error:
        raise OSError(f"record batch at byte {batch.offset} is invalid: {first_line(error)}") from error
    if found.num_rows != batch.rows:
        raise OSError(f"record batch at byte {batch.offset} has {found.num_rows} rows, wanted {batch.rows}")
    return found


class _Sink(io.RawIOBase):
    """A write-only file in memory. `take` empties it but keeps its position."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data


class ShardWriter:
    """Write one shard, row group by row group.

    On a local disk the file has a temporary name until `close`; an object store lists it only once it is complete. An
    exception in the `with` block removes the file. Encoded media are stored uncompressed, so that they can be
    memory-mapped; a data set without media, such as texts, is compressed with zstd.

    Args:
        folder: where to write.
        name: file name.
        schema: columns, see `arrow_schema`.
        rows_per_group: rows of a row group; memory in use is about two row groups.

    Raises:
        UserError: a folder, device, FIFO or socket has the file's name.
    """

    def __init__(self, folder: Folder, name: str, schema: pa.Schema, rows_per_group: int) -> None:
        self.folder, self.name, self.schema, self.rows_per_group = folder, name, schema, rows_per_group
        self._pending: list[Mapping[str, Any]] = []
        self._batches: list[BatchInfo] = []
        self._digest = hashlib.sha256()
        self._path = folder.file(f"{name}.{os.getpid()}.partial" if folder.local else name)
        if folder.local:
            check_regular(folder.file(name))
        make_parent(folder.fs, self._path)
        self._stream = folder.fs.open(self._path, "wb")
        self._sink = _Sink()
        media = any(pa.types.is_binary(field.type) for field in schema)
        options = pa.ipc.IpcWriteOptions(compression=None if media else "zstd")
        self._writer = pa.ipc.new_file(self._sink, schema, options=options)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            self.discard()

    def write(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append samples: mappings with a value for each column."""
        for sample in samples:
            self._pending.append(sample)
            if len(self._pending) == self.rows_per_group:
                self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        # Arrow writes the magic number and the schema together with the first batch.
        offset = self._sink.size if self._batches else MAGIC_BYTES + self.schema.serialize().size
        skipped = offset - self._sink.size
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=self.schema))
        message = memoryview(self._save())[skipped:]
        self._batches.append(
            BatchInfo(offset, len(message), len(self._pending), crc32(message, _columns_crc32(self.schema)))
        )
        self._pending.clear()

    def _save(self) -> bytes:
        """Write to the file what Arrow has written; return it."""
        data = self._sink.take()
        self._digest.update(data)
        self._stream.write(data)
        return data

    def close(self) -> ShardInfo | None:
        """Finish the file and give it its name; a shard without a row leaves no file and returns None."""
        self._flush()
        if not self._batches:
            self.discard()
            return None
        self._writer.close()
        self._save()
        self._stream.close()
        if self.folder.local:
            self.folder.fs.mv(self._path, self.folder.file(self.name))
        return ShardInfo(
            name=self.name,
            rows=sum(batch.rows for batch in self._batches),
            rows_per_group=self.rows_per_group,
            bytes=self._sink.size,
            sha256=self._digest.hexdigest(),
            batches=tuple(self._batches),
        )

    def discard(self) -> None:
        """Close and remove the unfinished file."""
        self._writer.close()
        self._stream.close()
        if self.folder.fs.exists(self._path):
            self.folder.fs.rm_file(self._path)
