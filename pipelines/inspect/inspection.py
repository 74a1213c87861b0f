"""Inspection of a prepared folder: content, integrity, damaged and duplicate samples."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from perceiver.config import Config
from perceiver.report.page import text
from perceiver.storage import Folder, file_sha256, first_line, open_folder
from pipelines.features import Feature, LabelFeature, LabelsFeature, TargetFeature
from pipelines.features.base import UNLIMITED, ViewConfig
from pipelines.inspect.samples import measure
from pipelines.shards.listing import file_fault
from pipelines.shards.manifest import Manifest, ShardInfo, Split, arrow_schema, check_places, load_manifest, split_url
from pipelines.shards.parquet import column_at, fit
from pipelines.shards.quarantine import QUARANTINE, SCHEMA
from pipelines.shards.reader import Reader, RowGroup
from pipelines.transforms import BadSample
from pipelines.transforms.image import Placement

LOOK = ViewConfig.model_validate(
    {**UNLIMITED, "audio": {"rate": 8000, "samples": 8000}, "video": {"size": [64, 64]}, "clip": {"eval_clips": 4}}
)
"""Recordings are decoded at four places, one second of sound each."""
LISTED = 20
"""Damaged and duplicate samples that are named; all are counted."""
BINS = 24

Progress = Callable[[str], None]


class Spread(Config):
    """The distribution of a quantity over the samples."""

    least: float = Field(description="smallest")
    median: float = Field(description="half are below")
    most: float = Field(description="largest")
    bins: list[int] = Field(description="counts of up to 24 equal parts of that range")

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Return the spread of these values; None if there are none."""
        found = np.fromiter(values, np.float64)
        if not found.size:
            return None
        bins = np.histogram(found, BINS)[0] if found.min() < found.max() else [found.size]
        return cls(least=found.min(), median=float(np.median(found)), most=found.max(), bins=[int(n) for n in bins])


class SplitReport(Config):
    """Facts about one split. Lists of samples contain the first ones only; counts are complete."""

    samples: int = Field(description="rows")
    shards: int = Field(description="files")
    bytes: int = Field(description="size of the files")
    classes: dict[str, int] = Field(description="samples of each class, all classes of the manifest")
    sizes: dict[str, Spread] = Field(description="stored bytes, pixels, seconds, points, characters, ... of a sample")
    unreadable: int = Field(description="samples that training would quarantine")
    reasons: dict[str, int] = Field(description="samples by reason, the most frequent first")
    unreadable_samples: list[str] = Field(description="their keys and the reasons")
    doubles: int = Field(description="samples with the same content as an earlier one, in any split")
    double_samples: list[str] = Field(description="their keys, and the keys they repeat")


class Inspection(Config):
    """The result of `inspect`."""

    url: str = Field(description="the folder")
    name: str = Field(description="of the data set")
    features: dict[str, Any] = Field(description="the parts of a sample")
    licence: str = Field(description="terms of use")
    source: str = Field(description="origin")
    splits: dict[str, SplitReport] = Field(description="the parts")
    rejected: int = Field(description="raw items that `prepare` left out")
    rejected_items: list[str] = Field(description="the first of them, with the reasons")
    faults: list[str] = Field(description="files that are missing, changed or of another schema")

    @property
    def sound(self) -> bool:
        """Return whether all files match the manifest and all samples can be read."""
        return not self.faults and not any(split.unreadable for split in self.splits.values())


def inspect(
    url: str,
    *,
    verify: bool = False,
    samples: bool = True,
    options: Mapping[str, str] | None = None,
    files: Sequence[str] = (),
    progress: Progress | None = None,
) -> Inspection:
    """Report on a prepared folder.

    Args:
        url: path or fsspec URL.
        verify: read every file and compare its checksum, rows and schema with the manifest.
        samples: decode every sample, for class balance, sizes, duplicates and unreadable samples.
        options: storage options.
        files: folders in other stores that an index may name files of.
        progress: called with the name of each shard before it is read.

    Memory: about 300 bytes per sample for the search for duplicates, plus one row group.

    Raises:
        UserError: the folder has no readable manifest, or it is an index of files elsewhere.
    """
    manifest = load_manifest(url, options)
    for place in files:
        open_folder(place, options)
    check_places(url, manifest, files)
    folder = open_folder(url, options)
    faults: list[str] = []
    seen: dict[bytes, str] = {}
    splits = {}
    for name, split in manifest.splits.items():
        tally = _Tally()
        reader = Reader.of(url, manifest, split, options)
        for number, shard in enumerate(split.shards):
            if progress:
                progress(shard.name)
            if fault := shard_fault(url, manifest, split, shard, options, whole=verify):
                faults.append(f"{shard.name}: {fault}")
                continue
            for group, rows in enumerate(shard.group_sizes() if samples else ()):
                found = reader.row_groups({(number, group)})[number, group]
                for row in range(rows):
                    if found.error:
                        tally.reject(f"{name}: {reader.row_key(number, group, row)}", found.error)
                    else:
                        tally.add(stored_row(found, row), manifest, name, seen)
        splits[name] = tally.report(manifest, split.samples, len(split.shards), split.bytes)
    return Inspection(
        url=url,
        name=manifest.name,
        licence=manifest.licence,
        source=manifest.source,
        splits=splits,
        features={key: value.model_dump() for key, value in manifest.features.items()},
        faults=faults,
        rejected=manifest.rejected,
        rejected_items=_rejected(folder, manifest.rejected, faults),
    )


def _rejected(folder: Folder, count: int, faults: list[str]) -> list[str]:
    """Return the first of `count` raw items that `prepare` listed as unreadable; add a fault if the list is damaged."""
    if not count:
        return []
    try:
        with folder.fs.open(folder.existing(QUARANTINE), "rb") as stream:
            table = pq.read_table(stream, schema=SCHEMA)
        if table.num_rows != count:
            raise OSError(f"{table.num_rows} rows, wanted {count}")
        return [
            f"{row['split'] or 'raw data'}: {row['key']}: {row['reason']}" for row in table.slice(0, LISTED).to_pylist()
        ]
    except Exception as error:  # noqa: BLE001  Arrow raises many types for a damaged file
        faults.append(f"{QUARANTINE}: {first_line(error)}")
        return []


def shard_fault(
    url: str, manifest: Manifest, split: Split, shard: ShardInfo, options: Mapping[str, str] | None, *, whole: bool
) -> str:
    """Return the fault of a file, or "": missing, or another size, version, schema or number of row groups.

    With `whole`, all of it is read and its checksum compared. An indexed file has no checksum: its version in the
    store's listing is compared in any case.
    """
    folder_url, name = split_url(url, shard.name)
    folder = open_folder(folder_url, options)
    try:
        if fault := file_fault(shard, folder.fs.info(folder.file(name)), folder):
            return fault
        with folder.fs.open(folder.file(name), "rb") as stream:
            if shard.batches:
                file = pa.ipc.open_file(stream)
                schema, counts, what = file.schema, (file.num_record_batches, len(shard.batches)), "record batches"
            else:
                file = pq.ParquetFile(stream)
                schema, counts, what = file.schema_arrow, (file.metadata.num_rows, shard.rows), "rows"
        if counts[0] != counts[1]:
            return f"{counts[0]} {what}, wanted {counts[1]}"
        wanted = arrow_schema(manifest.features)
        if split.columns:
            for column in wanted:
                if column.name in split.columns:
                    fit(column_at(schema.empty_table(), split.columns[column.name]), column, manifest.classes)
        elif {column.name: column.type for column in schema} != {column.name: column.type for column in wanted}:
            return f"columns {schema.names}, wanted {wanted.names} with their types"
        if whole and shard.sha256 and (found := file_sha256(folder.file(name), folder.fs)) != shard.sha256:
            return f"checksum {found[:12]}, wanted {shard.sha256[:12]}"
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # noqa: BLE001  Arrow raises many types for a damaged file
        return first_line(error)
    return ""


def stored_row(group: RowGroup, row: int) -> dict[str, Any]:
    """Return a row as Python values; a string that is not UTF-8 as its bytes, which text features refuse."""
    found: dict[str, Any] = {}
    for name in group.columns:
        try:
            value = group.value(name, row)
        except UnicodeDecodeError as error:
            value = error.object
        found[name] = bytes(value) if isinstance(value, memoryview) else value
    return found


def check_followers(manifest: Manifest, sample: Mapping[str, Any]) -> None:
    """Raise `BadSample` if boxes do not fit their image or the class of a sample of decoded values."""
    for name, feature in manifest.features.items():
        if feature.follows:
            height, width = sample[feature.follows].shape[:2]
            whole = Placement((height, width), (height, width), (0, 0, width, height))
            feature.show_with(name, sample[name], LOOK, whole, sample)


@dataclass
class _Tally:
    """Running counts of one split."""

    labels: Counter[int] = field(default_factory=Counter)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], manifest: Manifest, split: str, seen: dict[bytes, str]) -> None:
        """Count one sample; `seen` maps content hashes to the first sample of any split with that content."""
        here = f"{split}: {row['key']}"
        content = b"".join(
            value if isinstance(value, bytes) else value.encode()
            for name, value in row.items()
            if name != "key" and isinstance(value, bytes | str)
        )
        self.sizes.setdefault("stored bytes", []).append(len(content))
        before = seen.setdefault(hashlib.blake2b(content, digest_size=8).digest(), here)
        if before != here:
            self.doubles.append(f"{here} = {before}")
        try:
            sample: dict[str, Any] = {}
            for name, feature in manifest.features.items():
                decoded = sample[name] = feature.decode(row[name], LOOK, len(manifest.classes))
                if feature.clips:  # decode() reads only the header of a recording.
                    feature.show(name, decoded, LOOK, False, np.random.default_rng)
                self._look(name, feature, decoded, row[name])
            check_followers(manifest, sample)
        except BadSample as error:
            self.reject(here, str(error))

    def reject(self, here: str, reason: str) -> None:
        """Count a sample that cannot be read."""
        self.unreadable.append(f"{here}: {reason}")
        self.reasons[reason] += 1

    def _look(self, name: str, feature: Feature, decoded: Any, stored: Any) -> None:
        if isinstance(feature, LabelFeature) and not feature.classes:
            self.labels[decoded] += 1
        elif isinstance(feature, LabelsFeature):
            self.labels.update(stored)
        elif isinstance(feature, TargetFeature):
            for target, number in zip(feature.names, decoded.tolist(), strict=True):
                self.sizes.setdefault(f"{name} {target}", []).append(number)
        for quantity, value in measure(feature.kind, decoded).items():
            title = quantity if quantity == name else f"{name} {quantity}"
            self.sizes.setdefault(title, []).append(value)

    def report(self, manifest: Manifest, samples: int, shards: int, size: int) -> SplitReport:
        """Return the counts as a report."""
        spreads = {name: Spread.of(values) for name, values in self.sizes.items()}
        return SplitReport(
            samples=samples,
            shards=shards,
            bytes=size,
            classes={name: self.labels[number] for number, name in enumerate(manifest.classes)} if self.sizes else {},
            sizes={name: spread for name, spread in spreads.items() if spread},
            unreadable=len(self.unreadable),
            unreadable_samples=self.unreadable[:LISTED],
            reasons=dict(self.reasons.most_common(LISTED)),
            doubles=len(self.doubles),
            double_samples=self.doubles[:LISTED],
        )


def describe(found: Inspection) -> list[str]:
    """Return the report as lines for a terminal."""
    lines = [f"{found.url}: {found.name}", f"  licence  {found.licence}", f"  source   {found.source}"]
    lines += [
        f"  {key:<8} " + ", ".join(f"{name} {value}" for name, value in facts.items())
        for key, facts in found.features.items()
    ]
    for name, split in found.splits.items():
        lines.append(f"  {name}: {split.samples:,} samples in {split.shards} shards, {split.bytes / 1e6:,.1f} MB")
        if split.classes:
            counts = sorted(split.classes.values())
            lines.append(f"    {len(counts)} classes of {counts[0]:,} to {counts[-1]:,} samples")
        for label, spread in split.sizes.items():
            lines.append(
                f"    {label}: {text(spread.least)}"
                + (f" to {text(spread.most)}, median {text(spread.median)}" if spread.least < spread.most else "")
            )
        for count, what, rows in (
            (split.unreadable, "cannot be used", split.unreadable_samples),
            (split.doubles, "repeat the content of another one", split.double_samples),
        ):
            if count:
                lines += [f"    {count} samples {what}:"] + [f"      {row}" for row in rows]
    if found.rejected:
        lines += [f"  {found.rejected} raw items were left out:"] + [f"      {row}" for row in found.rejected_items]
    return lines + [f"  FAULT {fault}" for fault in found.faults]
