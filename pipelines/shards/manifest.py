"""The manifest of a prepared data set: its features, its shards, and the index of their row groups.

A prepared data set is a folder of Arrow IPC files (one row per sample, encoded media in binary columns, small record
batches) and a `manifest.json` that is written last: a folder without one is incomplete and is never read.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pydantic import Field, ValidationError, model_validator

from perceiver.config import Config, UserError
from perceiver.storage import (
    Folder,
    NonNegativeCount,
    PositiveCount,
    PrintableName,
    first_line,
    invalid_key,
    open_folder,
    parse_json,
    safe_name,
)
from pipelines.features import BoxesFeature, Feature, ImageFeature
from pipelines.shards.statistics import SpectrogramStatistics, Statistics
from pipelines.transforms.store import StoreConfig

FORMAT_VERSION = 2
"""Version 1 has Parquet files as shards, which are still read."""
_ESCAPE = re.compile("%(25|[89A-F][0-9A-F])")
MANIFEST = "manifest.json"
KEY = "key"
MAGIC_BYTES = 8
"""An Arrow IPC file begins with `ARROW1` and two bytes of padding."""
BLOCK_BYTES, TRAILER_BYTES = 24, 26
"""The end of an Arrow IPC file: the schema, this many bytes for each record batch, and this many of markers."""
TOLERANCE_BYTES = 64
"""By which a version of Arrow may differ in that; the smallest record batch has several times as many."""


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

    offset: NonNegativeCount
    length: PositiveCount
    rows: PositiveCount
    crc32: Annotated[int, Field(strict=True, ge=0, lt=1 << 32)]


class ShardInfo(Config):
    """One file: a shard, or a Parquet file that was indexed."""

    name: str = Field(description="file name, relative to the manifest, or the URL of a file that was indexed")
    rows: PositiveCount = Field(description="samples in it")
    rows_per_group: PositiveCount = Field(description="rows of each row group but the last, which has the rest")
    bytes: PositiveCount = Field(description="size of the file")
    sha256: str = Field(
        default="",
        pattern="^([0-9a-f]{64})?$",
        description="checksum of the file; empty: indexed without reading all of it",
    )
    tag: str = Field(default="", description="version of an indexed file: the store's ETag, or its modification time")
    groups: tuple[tuple[PositiveCount, PositiveCount], ...] = Field(
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
        if not self.batches:
            return self
        end = max(MAGIC_BYTES, self.batches[0].offset)
        for number, (batch, rows) in enumerate(zip(self.batches, self.group_sizes(), strict=True)):
            stop = batch.offset + batch.length
            if batch.rows != rows:
                raise ValueError(f"batch {number} has {batch.rows} rows, wanted {rows}")
            if batch.offset != end or batch.offset % 8 or stop > self.bytes:
                raise ValueError(
                    f"batch {number} at [{batch.offset}, {stop}): wanted ranges without gaps, from multiples of"
                    f" 8, in [{MAGIC_BYTES}, {self.bytes})"
                )
            end = stop
        schema_bytes = self.batches[0].offset - MAGIC_BYTES
        wanted = end + schema_bytes + BLOCK_BYTES * count + TRAILER_BYTES
        if abs(self.bytes - wanted) > TOLERANCE_BYTES:
            raise ValueError(f"{count} batches up to byte {end} make a file of {wanted} bytes, got {self.bytes}")
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

    shards: tuple[ShardInfo, ...] = Field(
        min_length=1, description="its files; sample ids run through them in this order"
    )
    columns: dict[PrintableName, PrintableName] = Field(
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

    format_version: PositiveCount = Field(default=FORMAT_VERSION, description="version of this layout")
    name: PrintableName = Field(description="name of the data set")
    features: dict[PrintableName, Feature] = Field(min_length=1, description="the parts of a sample, by batch key")
    classes: tuple[str, ...] = Field(default=(), description="class names; a label is an index into them")
    class_counts: dict[PrintableName, tuple[NonNegativeCount, ...]] = Field(
        default={}, description="samples of each class in the split train, by feature; empty: not counted"
    )
    splits: dict[PrintableName, Split] = Field(min_length=1, description="the parts, by name")
    licence: str = Field(description="terms of use of the data")
    source: str = Field(description="origin of the data")
    fingerprint: str = Field(default="", description="hash of source and options of `prepare`: recognises a rerun")
    raw: str = Field(default="", description="hash of names, sizes and times of the raw files; empty: not known")
    stored: StoreConfig = Field(
        default=StoreConfig(), description="what `prepare` limited media to; all null: stored as they came"
    )
    statistics: dict[PrintableName, Statistics] = Field(
        default={}, description="mean and deviation of the training split, by batch key; empty: not measured"
    )
    spectrograms: tuple[SpectrogramStatistics, ...] = Field(
        default=(), description="those of log-mel spectrograms of its sound"
    )
    rejected: NonNegativeCount = Field(
        default=0, description="raw items left out, listed in quarantine.parquet next to this"
    )

    @model_validator(mode="after")
    def _shards_are_of_these_features(self) -> "Manifest":
        """Refuse columns of other features, file names that leave the folder, and first batches not after the schema.

        Indexed files are elsewhere: their names are absolute, see `check_places`.
        """
        if KEY in self.features:
            raise ValueError(f"features: {KEY!r} is the column of the samples' origin; wanted another name")
        first = MAGIC_BYTES + arrow_schema(self.features).serialize().size
        for split, part in self.splits.items():
            if part.columns and part.columns.keys() != self.features.keys():
                raise ValueError(f"splits.{split}.columns has {[*part.columns]}, wanted {[*self.features]}")
            for number, shard in enumerate(part.shards):
                where = f"splits.{split}.shards.{number}"
                if shard.batches and abs(shard.batches[0].offset - first) > TOLERANCE_BYTES:
                    raise ValueError(f"{where}: batch 0 at {shard.batches[0].offset}, wanted {first} after the schema")
                if part.columns and (shard.batches or shard.sha256):
                    raise ValueError(f"{where} has batches or a checksum, which an indexed file does not have")
                try:
                    _check_name(shard.name, indexed=bool(part.columns))
                except ValueError as error:
                    raise ValueError(f"{where}.name: {error}") from None
        return self

    @model_validator(mode="after")
    def _statistics_are_of_these_features(self) -> "Manifest":
        """Refuse statistics of other features or of another number of channels."""
        channels = {key: c for name, feature in self.features.items() for key, c in feature.normalised(name).items()}
        found = [(f"statistics.{key}", key, each) for key, each in self.statistics.items()]
        found += [(f"spectrograms.{number}", "audio", each) for number, each in enumerate(self.spectrograms)]
        for where, key, each in found:
            if channels.get(key) != len(each.mean):
                raise ValueError(f"{where} has {len(each.mean)} channels, wanted {channels.get(key, 'no such entry')}")
        return self

    @model_validator(mode="after")
    def _followed_images_exist(self) -> "Manifest":
        """Refuse boxes without the image that they are in, and classes that must have boxes but do not exist."""
        for name, feature in self.features.items():
            if feature.follows and not isinstance(self.features.get(feature.follows), ImageFeature):
                raise ValueError(f"features.{name}.image: got {feature.follows!r}, wanted a feature of kind image")
            if isinstance(feature, BoxesFeature) and max(feature.located, default=-1) >= len(self.classes):
                raise ValueError(
                    f"features.{name}.located: got {feature.located}, wanted less than {len(self.classes)}"
                )
        return self

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


def content_digest(manifest: Manifest, splits: Collection[str]) -> str:
    """Return a SHA-256 of features, classes and the shards of some splits, the same for a copy in another place.

    Names of files and of the data set, and terms of use, do not count.
    """
    content = {
        "features": {name: _content(manifest.features[name]) for name in sorted(manifest.features)},
        "classes": manifest.classes,
        "splits": {
            name: [shard.model_dump(mode="json", exclude={"name", "tag"}) for shard in manifest.split(name).shards]
            for name in sorted(set(splits))
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_versions(manifest: Manifest, splits: Collection[str]) -> str:
    """Return a hash of the places and one of the versions of indexed files, `PLACES:VERSIONS`; empty without any.

    `content_digest` does not see a changed file of the same size: indexed files have no checksum.
    """
    files = [shard for name in sorted(set(splits)) for shard in manifest.split(name).shards if shard.tag]
    facts = [shard.name for shard in files], [shard.tag for shard in files]
    return ":".join(hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16] for each in facts) if files else ""


def _content(feature: Feature) -> dict[str, Any]:
    """Return a feature as it counts in a digest; a label without classes of its own counts as in earlier versions."""
    found = feature.model_dump(mode="json")
    return {key: value for key, value in found.items() if key != "classes" or value}


def _check_name(name: str, indexed: bool) -> None:
    """Raise `ValueError` unless it is a plain name, or for an indexed file an absolute path or URL."""
    if not indexed and "/" in safe_name(name):
        raise ValueError(f"got {name[:80]!r}, wanted a file next to the manifest")
    if indexed:
        _, _, path = name.partition("://")
        if not (name.startswith("/") or path):
            raise ValueError(f"got {name[:80]!r}, wanted an absolute path or URL of an indexed file")
        safe_name((path or name).strip("/").replace(":", ""))


def check_places(url: str, manifest: Manifest, places: Sequence[str] = ()) -> None:
    """Refuse an index whose files are in another store than the manifest, unless the user has named their folder.

    Otherwise whoever wrote the manifest could make its reader send requests to any address.

    Args:
        url: folder of the manifest.
        manifest: its content.
        places: folders of indexed files, as paths or URLs.

    Raises:
        UserError: a file is elsewhere.
    """
    for split in manifest.splits.values():
        for shard in split.shards if split.columns else ():
            below = any(shard.name.startswith(place.rstrip("/") + "/") for place in places)
            if not below and _store(shard.name) != _store(url):
                raise UserError(
                    f"{url}/{MANIFEST} is an index of {shard.name}, which is in another store: if you trust it, set"
                    f" data.files=['{shard.name.rpartition('/')[0]}'] (inspect: --files)"
                )


def _store(url: str) -> str:
    """Return protocol and host or bucket of a URL; empty for a local path."""
    protocol, found, path = url.partition("://")
    return f"{protocol}://{path.split('/')[0]}" if found and protocol not in ("file", "local") else ""


def load_manifest(url: str, options: Mapping[str, str] | None = None) -> Manifest:
    """Read the manifest of a prepared folder.

    Args:
        url: path or fsspec URL of the folder.
        options: storage options; a value `$NAME` is taken from the environment.

    Raises:
        UserError: no such folder, no manifest in it, invalid JSON, a newer format, or a contradictory index.
    """
    folder, where = open_folder(url, options), f"{url}/{MANIFEST}"
    try:
        text = folder.fs.cat_file(folder.existing(MANIFEST))
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
        raise UserError(f"cannot read {where}: {first_line(error)}; check access, or prepare the data again") from error
    return _parse_manifest(parse_json(text, where), where)


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
        raise UserError(f"{where}: {invalid_key(error)}; prepare the data again") from error


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


def utf8_name(name: str) -> str:
    """Return a name of a raw file as a key, which must be UTF-8.

    Bytes that are not UTF-8, which Python reads as half of a surrogate pair, become `%80` to `%FF`. A `%` stays as it
    is unless it would read as one of these or as `%25`, by which it is then replaced: different names have different
    keys, and replacing these three-letter codes by their bytes gives the name.
    """
    if name.isascii() and "%" not in name:
        return name
    name = _ESCAPE.sub(r"%25\1", name)
    return (
        "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in name)
        .encode("utf-8", "replace")
        .decode()
    )
