"""Shards and their manifest: the prepared form of a data set.

A prepared data set is a folder of Parquet files (one row a sample, encoded media in binary columns, small row groups)
and a `manifest.json` that is written last: a folder without one is not ready and is never read.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, model_validator

from perceiver.config import Config, UserError
from pipelines.features import Feature
from pipelines.shards.io import Folder, first_line, open_folder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def arrow_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """The columns of a shard: `key` (where the sample came from) and one column a feature, under the batch's key."""
    return pa.schema([("key", pa.string())] + [(name, f.arrow) for name, f in features.items()])


class ShardInfo(Config):
    """One Parquet file."""

    name: str = Field(description="file name, relative to the manifest, or the URL of a file that was indexed")
    rows: int = Field(gt=0, description="samples in it")
    rows_per_group: int = Field(gt=0, description="rows of each row group but the last, which holds the rest")
    bytes: int = Field(gt=0, description="size of the file")
    sha256: str = Field(default="", description="checksum of the file; empty: indexed without reading all of it")
    tag: str = Field(default="", description="version of an indexed file: the store's ETag, or its time of change")
    groups: tuple[tuple[int, int], ...] = Field(
        default=(), description="uneven row groups, as runs of (rows, rows of each group but the last); else empty"
    )


class Split(Config):
    """One part of a data set, such as train or test."""

    shards: tuple[ShardInfo, ...] = Field(description="its files; sample ids count through them in this order")
    columns: dict[str, str] = Field(
        default={}, description="column of each feature in indexed files, `a.b` for a field of a struct; else empty"
    )

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(shard.bytes for shard in self.shards)


class Manifest(Config):
    """What a prepared folder holds."""

    format_version: int = Field(default=FORMAT_VERSION, description="version of this layout")
    name: str = Field(description="name of the data set")
    features: dict[str, Feature] = Field(description="what a sample consists of, by batch key")
    classes: tuple[str, ...] = Field(default=(), description="class names; a label is an index into them")
    splits: dict[str, Split] = Field(description="the parts, by name")
    licence: str = Field(description="under which terms the data may be used")
    source: str = Field(description="where the data came from")
    fingerprint: str = Field(default="", description="of source and options of `prepare`: recognises a rerun")
    rejected: int = Field(default=0, ge=0, description="raw items left out, listed in quarantine.parquet beside this")

    @model_validator(mode="after")
    def _each_shard_once(self) -> "Manifest":
        """A shard that counts twice would weigh its samples double, or show test samples in training."""
        names: dict[str, str] = {}
        contents: dict[str, str] = {}
        for split, part in self.splits.items():
            for shard in part.shards:
                place = f"{split}: {shard.name}"
                if shard.name in names:
                    raise ValueError(f"shard {place} is listed twice, also as {names[shard.name]}")
                if shard.sha256 and shard.sha256 in contents:
                    raise ValueError(f"shard {place} has the same content as {contents[shard.sha256]}")
                names[shard.name] = contents[shard.sha256] = place
        return self

    def split(self, name: str) -> Split:
        """The part of that name.

        Raises:
            UserError: there is none.
        """
        if name not in self.splits:
            raise UserError(
                f"data set {self.name} has no split '{name}': it has {', '.join(self.splits)};"
                " set data.train_split or data.eval_split"
            )
        return self.splits[name]


def load_manifest(url: str, options: Mapping[str, str] | None = None) -> Manifest:
    """Read the manifest of a prepared folder.

    Args:
        url: path or fsspec URL of the folder.
        options: storage options; a value `$NAME` is taken from the environment.

    Raises:
        UserError: no such folder, no manifest in it, broken JSON, or a layout newer than this program.
    """
    folder = open_folder(url, options)
    try:
        raw = json.loads(folder.read_text(MANIFEST))
    except FileNotFoundError:
        there = folder.fs.exists(folder.path)
        what = f"has no {MANIFEST} (not prepared, or not to the end)" if there else "does not exist"
        raise UserError(
            f"data folder {url} {what}: make it with `perceiver prepare NAME [SRC] {url}`, for example NAME = digits"
        ) from None
    except NotADirectoryError:
        raise UserError(
            f"data folder {url} is a file: data.url wants the folder that `perceiver prepare` wrote"
        ) from None
    except Exception as error:  # noqa: BLE001  each file system has exceptions of its own, of missing credentials for one
        raise UserError(
            f"cannot read {url}/{MANIFEST}: {first_line(error)}; check access, or prepare the data again"
        ) from error
    return _parse_manifest(raw, f"{url}/{MANIFEST}")


def _parse_manifest(raw: Any, where: str) -> Manifest:
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{where} is not a manifest: wanted a JSON object with format_version; prepare the data again")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version}, this program reads up to {FORMAT_VERSION}:"
            " install a newer version, or prepare the data again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {place}: {first['msg']}; prepare the data again") from error


def save_manifest(manifest: Manifest, folder: Folder) -> None:
    """Write the manifest, atomically: from here on the folder is a data set."""
    folder.write_text(MANIFEST, manifest.model_dump_json(indent=1) + "\n")


class _HashingSink(io.RawIOBase):
    """A write-only file that counts and hashes what passes through it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        self.stream.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size


class ShardWriter:
    """Writes one shard, row group by row group, and returns what the manifest says about it.

    On a local disk the file has a temporary name until `close`; an object store shows it only once it is complete.
    Leaving the `with` block by an exception removes the file.

    Args:
        folder: where to write.
        name: file name.
        schema: columns, see `arrow_schema`.
        rows_per_group: rows of a row group; memory in use is about one row group.
    """

    def __init__(self, folder: Folder, name: str, schema: pa.Schema, rows_per_group: int) -> None:
        self.folder, self.name, self.schema, self.rows_per_group = folder, name, schema, rows_per_group
        self.rows = 0
        self._pending: list[Mapping[str, Any]] = []
        self._path = folder.file(f"{name}.{os.getpid()}.partial" if folder.local else name)
        folder.make_room(self._path)
        self._stream = folder.fs.open(self._path, "wb")
        self._sink = _HashingSink(self._stream)
        binary = [field.name for field in schema if pa.types.is_binary(field.type)]
        compression: Any = {name: "none" if name in binary else "zstd" for name in schema.names}
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            use_dictionary=False,
            store_schema=True,
            version="2.6",
            compression=compression,
            write_statistics=False,
            write_page_checksum=True,
        )

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
        if self._pending:
            table = pa.Table.from_pylist([dict(sample) for sample in self._pending], schema=self.schema)
            self._writer.write_table(table, row_group_size=self.rows_per_group)
            self.rows += len(self._pending)
            self._pending.clear()

    def close(self) -> ShardInfo | None:
        """Finish the file and give it its name; a shard without a row leaves no file and returns None."""
        self._flush()
        if not self.rows:
            self.discard()
            return None
        self._writer.close()
        self._stream.close()
        if self.folder.local:
            self.folder.fs.mv(self._path, self.folder.file(self.name))
        return ShardInfo(
            name=self.name,
            rows=self.rows,
            rows_per_group=self.rows_per_group,
            bytes=self._sink.size,
            sha256=self._sink.digest.hexdigest(),
        )

    def discard(self) -> None:
        """Give up: leave nothing behind."""
        self._writer.close()
        self._stream.close()
        if self.folder.fs.exists(self._path):
            self.folder.fs.rm_file(self._path)
