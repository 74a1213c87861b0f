"""The manifest of a prepared data set: its features, its shards, and the index of their row groups.

A prepared data set is a folder of Arrow IPC files (one row per sample, encoded media in binary columns, small record
batches) and a `manifest.json` that is written last: a folder without one is incomplete and is never read.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pydantic import Field, ValidationError, model_validator

from perceiver.config import Config, UserError
from perceiver.storage import Folder, first_line, open_folder
from pipelines.features import Feature

FORMAT_VERSION = 2
"""Version 1 has Parquet files as shards, which are still read."""
MANIFEST = "manifest.json"
KEY = "key"
MAGIC_BYTES = 8
"""An Arrow IPC file begins with `ARROW1` and two bytes of padding."""
Count = Annotated[int, Field(gt=0, lt=1 << 48)]
"""A number of rows or bytes; sums of them fit into 64 bits."""


def arrow_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """Return the columns of a shard: `key` (the sample's origin), then one column per feature.

    They are sorted by name, since data sets of a mixture may list the same features in different orders.
    """
    return pa.schema([(KEY, pa.string())] + [(name, features[name].arrow) for name in sorted(features)])


class BatchInfo(NamedTuple):
    """One record batch of a shard.

    Attributes:
        offset: first byte of its encapsulated message (metadata and body) in the file.
        length: bytes of the message.
        rows: samples in it.
        crc32: checksum of the message, continued from that of the columns' names and types (`key string`, ... by line).
    """

    offset: int
    length: int
    rows: int
    crc32: int


class ShardInfo(Config):
    """One file: a shard, or a Parquet file that was indexed."""

    name: str = Field(description="file name, relative to the manifest, or the URL of a file that was indexed")
    rows: Count = Field(description="samples in it")
    rows_per_group: Count = Field(description="rows of each row group but the last, which has the rest")
    bytes: Count = Field(description="size of the file")
    sha256: str = Field(default="", description="checksum of the file; empty: indexed without reading all of it")
    tag: str = Field(default="", description="version of an indexed file: the store's ETag, or its modification time")
    groups: tuple[tuple[Count, Count], ...] = Field(
        default=(), description="uneven row groups, as runs of (rows, rows of each group but the last); else empty"
    )
    batches: tuple[BatchInfo, ...] = Field(
        default=(), description="[offset, length, rows, crc32] of each record batch; empty: a Parquet file"
    )

    @model_validator(mode="after")
    def _index_is_consistent(self) -> "ShardInfo":
        """Refuse contradictory numbers before anything is read or allocated by them."""
        runs = self.runs
        if sum(rows for rows, _ in runs) != self.rows:
            raise ValueError(f"groups {runs} do not add up to {self.rows} rows")
        count = sum(-(-rows // size) for rows, size in runs)
        if count > self.bytes or self.batches and count != len(self.batches):
            raise ValueError(f"{count} row groups in {self.bytes} bytes and {len(self.batches)} batches")
        end = MAGIC_BYTES
        for number, (batch, rows) in enumerate(zip(self.batches, self.group_sizes() if self.batches else ())):
            stop = batch.offset + batch.length
            if batch.rows != rows:
                raise ValueError(f"batch {number} has {batch.rows} rows, wanted {rows}")
            if batch.offset < end or batch.offset % 8 or batch.length < 1 or stop > self.bytes:
                raise ValueError(
                    f"batch {number} at [{batch.offset}, {stop}): wanted ranges one after the other, from multiples of"
                    f" 8, in [{MAGIC_BYTES}, {self.bytes})"
                )
            if not 0 <= batch.crc32 < 1 << 32:
                raise ValueError(f"batch {number} has CRC-32 {batch.crc32}, wanted 0 to 2**32 - 1")
            end = stop
        return self

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The row groups as runs of (rows, rows of each group but the last)."""
        return self.groups or ((self.rows, self.rows_per_group),)

    def group_sizes(self) -> list[int]:
        """Return the rows of each row group."""
        return [min(size, rows - first) for rows, size in self.runs for first in range(0, rows, size)]


class Split(Config):
    """A part of a data set, such as train or test."""

    shards: tuple[ShardInfo, ...] = Field(description="its files; sample ids run through them in this order")
    columns: dict[str, str] = Field(
        default={}, description="column of each feature in indexed files, `a.b` for a field of a struct; else empty"
    )

    @property
    def samples(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


class Manifest(Config):
    """The content of a prepared folder."""

    format_version: int = Field(default=FORMAT_VERSION, description="version of this layout")
    name: str = Field(description="name of the data set")
    features: dict[str, Feature] = Field(description="the parts of a sample, by batch key")
    classes: tuple[str, ...] = Field(default=(), description="class names; a label is an index into them")
    splits: dict[str, Split] = Field(description="the parts, by name")
    licence: str = Field(description="terms of use of the data")
    source: str = Field(description="origin of the data")
    fingerprint: str = Field(default="", description="hash of source and options of `prepare`: recognises a rerun")
    rejected: int = Field(default=0, ge=0, description="raw items left out, listed in quarantine.parquet next to this")

    @model_validator(mode="after")
    def _each_shard_once(self) -> "Manifest":
        """Refuse a repeated shard: its samples would count twice, or training would see test samples."""
        names: dict[str, str] = {}
        contents: dict[str, str] = {}
        for split, part in self.splits.items():
            for shard in part.shards:
                this = f"{split}: {shard.name}"
                if shard.name in names:
                    raise ValueError(f"shard {this} is listed twice, also as {names[shard.name]}")
                if shard.sha256 and shard.sha256 in contents:
                    raise ValueError(f"shard {this} has the same content as {contents[shard.sha256]}")
                names[shard.name] = contents[shard.sha256] = this
        return self

    def split(self, name: str) -> Split:
        """Return the split of that name, or raise `UserError` if there is none."""
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
        UserError: no such folder, no manifest in it, invalid JSON, a newer format, or a contradictory index.
    """
    folder = open_folder(url, options)
    try:
        raw = json.loads(folder.read_text(MANIFEST))
    except FileNotFoundError:
        there = folder.fs.exists(folder.path)
        what = f"has no {MANIFEST} (not prepared, or incomplete)" if there else "does not exist"
        raise UserError(
            f"data folder {url} {what}: make it with `perceiver prepare NAME [SRC] {url}`, for example NAME = digits"
        ) from None
    except NotADirectoryError:
        raise UserError(
            f"data folder {url} is a file: set data.url to the folder that `perceiver prepare` wrote"
        ) from None
    except Exception as error:  # noqa: BLE001  each file system has its own exceptions
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
            f"{where} has format version {version}, this version reads up to {FORMAT_VERSION}:"
            " install a newer version, or prepare the data again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key}: {first['msg']}; prepare the data again") from error


def save_manifest(manifest: Manifest, folder: Folder) -> None:
    """Write the manifest atomically, which completes the data set."""
    text = manifest.model_dump_json(indent=1)
    one_line = re.sub(r"\[\n *(\d+),\n *(\d+),\n *(\d+),\n *(\d+)\n *\]", r"[\1, \2, \3, \4]", text)  # of each batch
    folder.write(MANIFEST, one_line + "\n")


def split_url(url: str, name: str) -> tuple[str, str]:
    """Return folder and file name of a shard: its name is relative to `url`, or itself a URL or an absolute path."""
    if "://" not in name and not name.startswith("/"):
        return url, name
    folder, _, file = name.rpartition("/")
    return folder, file
