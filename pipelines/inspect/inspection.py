"""Looking into a prepared folder: what it holds, whether it is whole, which samples are damaged or doubled."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from perceiver.config import Config
from perceiver.report.page import text
from pipelines.features import Feature, LabelFeature, LabelsFeature
from pipelines.features.base import ViewConfig
from pipelines.inspect.samples import measure
from pipelines.shards.io import Folder, open_folder
from pipelines.shards.manifest import Manifest, load_manifest
from pipelines.shards.quarantine import QUARANTINE
from pipelines.shards.stored import StoredFile, stored_files
from pipelines.transforms import BadSample

LOOK = ViewConfig.model_validate(
    {"audio": {"rate": 8000, "samples": 8000}, "video": {"size": [64, 64]}, "clip": {"eval_clips": 4}}
)
"""Recordings are decoded at four places, a second of sound each."""
LISTED = 20
"""Damaged samples and doubles that are named; all are counted."""
BLOCK = 8 << 20
BINS = 24

Progress = Callable[[str], None]


class Spread(Config):
    """How a quantity is spread over the samples."""

    least: float = Field(description="smallest")
    median: float = Field(description="half are below")
    most: float = Field(description="largest")
    bins: list[int] = Field(description="how many lie in each of up to 24 equal parts of that range")

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """The spread of these values; None if there are none."""
        found = np.fromiter(values, np.float64)
        if not found.size:
            return None
        bins = np.histogram(found, BINS)[0] if found.min() < found.max() else [found.size]
        return cls(least=found.min(), median=float(np.median(found)), most=found.max(), bins=[int(n) for n in bins])


class SplitReport(Config):
    """What is known of one split. Lists of samples hold the first ones only; the counts are complete."""

    samples: int = Field(description="rows")
    shards: int = Field(description="files")
    bytes: int = Field(description="size of the files")
    classes: dict[str, int] = Field(description="samples of each class, all classes of the manifest")
    sizes: dict[str, Spread] = Field(description="stored bytes, pixels, seconds, points, characters, ... of a sample")
    unreadable: int = Field(description="samples that training would quarantine")
    reasons: dict[str, int] = Field(description="why, with the number of samples, commonest first")
    unreadable_samples: list[str] = Field(description="their keys and the reasons")
    doubles: int = Field(description="samples with the same content as one before them, in this split or another")
    double_samples: list[str] = Field(description="their keys, and the keys they repeat")


class Inspection(Config):
    """What `inspect` found."""

    url: str = Field(description="the folder")
    name: str = Field(description="of the data set")
    features: dict[str, Any] = Field(description="what a sample consists of")
    licence: str = Field(description="terms of use")
    source: str = Field(description="origin")
    splits: dict[str, SplitReport] = Field(description="the parts")
    rejected: int = Field(description="raw items that `prepare` left out")
    rejected_items: list[str] = Field(description="where the first of them came from, and why")
    faults: list[str] = Field(description="what is wrong with the files: missing, changed, of another schema")

    @property
    def sound(self) -> bool:
        """Whether all files are as the manifest says and all samples can be read."""
        return not self.faults and not any(split.unreadable for split in self.splits.values())


def inspect(
    url: str,
    *,
    verify: bool = False,
    samples: bool = True,
    options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Report on a prepared folder.

    Args:
        url: path or fsspec URL.
        verify: read every file and compare its checksum, rows and schema with the manifest.
        samples: decode every sample, which gives class balance, sizes, doubles and unreadable ones.
        options: storage options.
        progress: called with the name of each shard before it is read.

    Memory: some 300 bytes a sample while looking for doubles, plus one row group.

    Raises:
        UserError: the folder has no manifest that can be read.
    """
    manifest = load_manifest(url, options)
    folder = open_folder(url, options)
    faults: list[str] = []
    seen: dict[bytes, str] = {}
    splits = {}
    for name, split in manifest.splits.items():
        tally = _Tally()
        for file in stored_files(url, manifest, split, options):
            if progress:
                progress(file.shard.name)
            fault = shard_fault(file, whole=verify)
            faults += [fault] if fault else []
            for _, table in file.tables() if samples and not fault else ():
                for row in rows_of(table):
                    tally.add(row, manifest, name, seen)
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
        rejected_items=_rejected(folder) if manifest.rejected else [],
    )


def _rejected(folder: Folder) -> list[str]:
    """The first raw items that `prepare` listed as unreadable."""
    with folder.fs.open(folder.file(QUARANTINE), "rb") as stream:
        rows = pq.read_table(stream).slice(0, LISTED).to_pylist()
    return [f"{row['split']}: {row['key']}: {row['reason']}" for row in rows]


def shard_fault(file: StoredFile, *, whole: bool) -> str | None:
    """What is wrong with a shard, or None: missing, other size, rows or columns; with `whole` also other bytes.

    An indexed file has no checksum: its version in the store's listing stands for it.
    """
    fault = file.fault()
    if not fault and whole and file.shard.sha256 and (found := checksum(file.folder, file.name)) != file.shard.sha256:
        fault = f"checksum {found[:12]}, the manifest says {file.shard.sha256[:12]}"
    return f"{file.shard.name}: {fault}" if fault else None


def checksum(folder: Folder, name: str) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with folder.fs.open(folder.file(name), "rb", block_size=BLOCK) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as Python values; a string that is not UTF-8 as its bytes, which no text feature takes."""
    columns = [_texts(column) if pa.types.is_string(column.type) else column.to_pylist() for column in table.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(table.column_names, values, strict=True))


def _texts(column: pa.ChunkedArray) -> list[str | bytes | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        found: list[str | bytes | None] = []
        for raw in column.cast(pa.binary()).to_pylist():
            try:
                found.append(raw if raw is None else raw.decode("utf-8"))
            except UnicodeDecodeError:
                found.append(raw)
        return found


@dataclass
class _Tally:
    """Counts of one split while its samples pass by."""

    labels: Counter[int] = field(default_factory=Counter)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], manifest: Manifest, split: str, seen: dict[bytes, str]) -> None:
        """Count one sample; `seen` maps content hashes of all splits to places."""
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
            for name, feature in manifest.features.items():
                decoded = feature.decode(row[name], LOOK, len(manifest.classes))
                if feature.clips:  # Only the header of a recording was read so far.
                    feature.show(name, decoded, LOOK, False, np.random.default_rng)
                self._look(name, feature, decoded, row[name])
        except BadSample as error:
            self.unreadable.append(f"{here}: {error}")
            self.reasons[str(error)] += 1

    def _look(self, name: str, feature: Feature, decoded: Any, stored: Any) -> None:
        if isinstance(feature, LabelFeature):
            self.labels[decoded] += 1
        elif isinstance(feature, LabelsFeature):
            self.labels.update(stored)
        for quantity, value in measure(feature.kind, decoded).items():
            title = quantity if quantity == name else f"{name} {quantity}"
            self.sizes.setdefault(title, []).append(value)

    def report(self, manifest: Manifest, samples: int, shards: int, size: int) -> SplitReport:
        """The counts as a report."""
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
    """The report as lines for a terminal."""
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
            (split.doubles, "repeat another one's content", split.double_samples),
        ):
            if count:
                lines += [f"    {count} samples {what}:"] + [f"      {row}" for row in rows]
    if found.rejected:
        lines += [f"  {found.rejected} raw items were left out:"] + [f"      {row}" for row in found.rejected_items]
    return lines + [f"  FAULT {fault}" for fault in found.faults]
