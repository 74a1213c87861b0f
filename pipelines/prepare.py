"""Prepare a data set: write a source's samples as shards, in parallel and resumable, and the manifest last."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

from pydantic import Field, ValidationError

from perceiver.config import Bytes, Config, Count, NonNegative, Probability, Seed, UserError
from perceiver.storage import Folder, NotRegularError, open_folder, open_target, refusing
from perceiver.tracking.printable import printable, safe_line
from perceiver.tracking.redaction import redact_text
from pipelines.features import Feature
from pipelines.fingerprints import RawFiles, check_unchanged, unit_fingerprint
from pipelines.measured import Measured, Meter, class_counts, with_measured
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    Split,
    arrow_schema,
    load_manifest,
    save_manifest,
    utf8_name,
)
from pipelines.shards.quarantine import QUARANTINE, Problem, count_reasons, write_problems
from pipelines.sources import Listing, Rejected, Sample, Source, Unit, load_source
from pipelines.statistics import with_statistics
from pipelines.transforms import BadSample
from pipelines.transforms.store import StoreConfig, check_encoder

RECEIPTS = "_receipts"
PROBE, MEDIA_PROBE = 64, 8
"""Samples by which the size of row groups is chosen; fewer if media are encoded for it."""

Progress = Callable[[int, str], None]
"""Called after each shard with the number of samples so far and the shard's name."""
Note = Callable[[str], None]
"""Called with a line about the data, such as what was taken for splits and classes."""


class PrepareConfig(Config):
    """How shards are written."""

    seed: Seed = Field(default=0, description="seed of splits and order")
    shard_rows: Count = Field(default=8192, description="samples of a shard, the unit of parallel work")
    group_rows: Count = Field(default=128, description="most rows of a row group")
    group_bytes: Bytes = Field(default=4 << 20, description="most bytes of a row group, approximately")
    parallel: Literal["auto", "ray", "off"] = Field(
        default="auto", description="write with Ray tasks; auto: if Ray is running"
    )
    in_flight: Count = Field(default=64, description="Ray tasks at a time")
    max_bad_fraction: Probability = Field(default=0.01, description="largest share of unreadable raw items")
    options: dict[str, str] = Field(default={}, description="options of the source")
    media: StoreConfig = Field(default=StoreConfig(), description="the size at which media are stored")
    spectrogram: dict[str, NonNegative] = Field(
        default={}, description="settings of the log-mel spectrogram whose statistics are measured"
    )
    storage_options: dict[str, str] = Field(
        default={}, description="options of the destination; `$NAME`: environment variable"
    )


class Receipt(Config):
    """The record of a finished unit, kept until the manifest is written."""

    fingerprint: str
    split: str
    shard: ShardInfo | None
    rejected: tuple[tuple[str, str], ...] = ()
    measured: dict[str, Measured] = {}


@dataclass(frozen=True)
class _Job:
    """What a worker needs to write one shard."""

    source_name: str
    unit: Unit
    name: str
    url: str
    features: Mapping[str, Any]
    rows_per_group: int
    fingerprint: str
    storage_options: Mapping[str, str]
    media: StoreConfig


def prepare(
    source_name: str,
    src: str | None,
    dst: str,
    config: PrepareConfig | None = None,
    *,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Manifest:
    """Turn raw data into a prepared folder.

    Idempotent: of a complete destination of the same source and settings at most the statistics are completed. A
    stopped run continues with the shards that are missing, or whose unit (raw files, labels, settings, versions of
    the software) is another one than when they were written.

    Args:
        source_name: a module of `pipelines.sources`.
        src: location of the raw data; None if the source needs none.
        dst: folder to write, a path or fsspec URL.
        config: sizes, order, parallelism.
        progress: called after each shard.
        note: called with each of the listing's notes, before anything is written.

    Raises:
        UserError: unknown source or option, missing source data, a destination that contains another data set, whose
            raw files have changed since, or that is not writable, or more unreadable raw items than the budget allows
            (they are listed in any case).
    """
    config = config or PrepareConfig()
    folder = open_target(dst, config.storage_options)
    mark = fingerprint(source_name, src, config)
    fix = "give a writable folder"
    with refusing(dst, fix):
        finished = folder.exists(MANIFEST)
    source = load_source(source_name)
    options = {"seed": config.seed, "shard_rows": config.shard_rows, "options": config.options}
    if finished:
        manifest = existing(dst, config, mark)
        check_unchanged(manifest.raw, dst, src, source, lambda: source.listing(src, **options), note)
        return completed(manifest, dst, config)
    listing = source.listing(src, **options)
    raw = RawFiles(listing.versions, src)
    if note:
        for line in listing.notes:
            note(line)
    check_media(listing, config.media)
    with refusing(dst, fix):
        folder.write(f"{RECEIPTS}/fingerprint", mark)
    jobs = _jobs(source, source_name, listing, raw, dst, config, mark)
    runner = _run_on_ray(jobs, config.in_flight) if _use_ray(config.parallel) else map(write_shard, jobs)
    receipts = list(_reported(runner, progress))
    splits, rejected = _collect(receipts)
    rejected += [Problem("", -1, utf8_name(found.key), found.reason) for found in listing.rejected]
    _check_rejected(folder, rejected, sum(split.samples for split in splits.values()), config.max_bad_fraction)
    features = {name: _after(feature, config.media) for name, feature in listing.features.items()}
    measured = _measured(receipts)
    manifest = Manifest(
        name=safe_line(utf8_name(listing.name)),
        features=with_measured(features, *measured),
        class_counts=class_counts(features, *measured, len(listing.classes)),
        stored=config.media,
        classes=tuple(printable(utf8_name(name)) for name in listing.classes),
        splits=splits,
        rejected=len(rejected),
        licence=listing.licence,
        source=redact_text(utf8_name(listing.origin)),
        fingerprint=mark,
        raw=raw.digest(),
    )
    manifest = with_statistics(manifest, dst, config.storage_options, config.spectrogram)
    save_manifest(manifest, folder)
    _tidy(folder, manifest)
    return manifest


def _tidy(folder: Folder, manifest: Manifest) -> None:
    """Remove the receipts, and shards of an earlier listing that had more of them."""
    kept = {shard.name for split in manifest.splits.values() for shard in split.shards}
    receipts = Folder(folder.fs, folder.file(RECEIPTS), f"{folder.url}/{RECEIPTS}")
    for name in (receipt.removesuffix(".json") for receipt in receipts.names()):
        if name.endswith(".arrow") and name not in kept and folder.exists(name):
            folder.fs.rm_file(folder.file(name))
    folder.fs.rm(folder.file(RECEIPTS), recursive=True)


def fingerprint(source_name: str, src: str | None, config: PrepareConfig) -> str:
    """Return a hash of source and settings, but not of the format: a folder of format 1 counts as prepared."""
    facts = config.model_dump(include={"seed", "shard_rows", "group_rows", "group_bytes", "options"})
    if config.media.given:
        facts["media"] = config.media.model_dump()
    text = json.dumps([1, source_name, src, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def existing(dst: str, config: PrepareConfig, mark: str) -> Manifest:
    """Return the manifest of a complete destination; refuse one of another source or of other settings."""
    manifest = load_manifest(dst, config.storage_options)
    if manifest.fingerprint != mark:
        raise UserError(
            f"{dst} already contains data set {manifest.name} from another source or with other settings:"
            " give another folder, or delete this one first"
        )
    return manifest


def completed(manifest: Manifest, dst: str, config: PrepareConfig) -> Manifest:
    """Return the manifest of a complete destination with the statistics that it lacks, which are added to it."""
    found = with_statistics(manifest, dst, config.storage_options, config.spectrogram)
    if found != manifest:
        with refusing(dst, "give a writable folder"):
            save_manifest(found, open_target(dst, config.storage_options))
    return found


def _jobs(
    source: Source, source_name: str, listing: Listing, raw: RawFiles, dst: str, config: PrepareConfig, mark: str
) -> Iterator[_Job]:
    """Yield one job per unit; the row group size is measured on the first samples and is the same in all shards."""
    units = iter(listing.units)
    first = next(units, None)
    if first is None:
        raise UserError(f"source {source_name} has no samples: check its path")
    some = islice(source.samples(first), MEDIA_PROBE if config.media.given else PROBE)
    probe = [sample for sample in _smaller(some, listing.features, config.media) if not isinstance(sample, Rejected)]
    rows_per_group = group_rows(probe, config.group_rows, config.group_bytes)
    counts: dict[str, int] = {}
    features = dict(listing.features)
    facts = [mark, rows_per_group, {name: feature.model_dump(mode="json") for name, feature in features.items()}]
    for unit in chain([first], units):
        number = counts[unit.split] = counts.get(unit.split, -1) + 1
        name, own = f"{unit.split}-{number:06d}.arrow", unit_fingerprint(raw, unit, *facts)
        yield _Job(source_name, unit, name, dst, features, rows_per_group, own, config.storage_options, config.media)


def group_rows(probe: Iterable[Sample], most: int, most_bytes: int) -> int:
    """Return the rows of a row group: at most `most`, about `most_bytes` by the probe's mean size, at least 1."""
    sizes = [sum(len(value) for value in sample.values() if isinstance(value, bytes)) for sample in probe]
    mean = max(1.0, sum(sizes) / max(1, len(sizes)))
    return max(1, min(most, int(most_bytes / mean)))


def write_shard(job: _Job) -> Receipt:
    """Write one unit as a shard with a receipt, or return an existing receipt of the same unit.

    A shard with rejected items is written again, since they may have been repaired. The receipt of another unit is
    removed before its shard is replaced, so that a stop between the two does not leave it with the new shard.
    """
    folder = open_folder(job.url, job.storage_options)
    name = f"{RECEIPTS}/{job.name}.json"
    finished = _read_receipt(folder, name)
    kept = finished and job.fingerprint and finished.fingerprint == job.fingerprint and not finished.rejected
    if finished and kept and (not finished.shard or folder.exists(job.name)):
        return finished
    if finished:
        folder.fs.rm_file(folder.file(name))
    rejected: list[tuple[str, str]] = []
    meter = Meter(job.features)
    with ShardWriter(folder, job.name, arrow_schema(job.features), job.rows_per_group) as writer:
        samples = _smaller(load_source(job.source_name).samples(job.unit), job.features, job.media)
        writer.write(meter.watch(_accepted(samples, rejected)))
        shard = writer.close()
    receipt = Receipt(
        fingerprint=job.fingerprint,
        split=job.unit.split,
        shard=shard,
        rejected=tuple(rejected),
        measured=meter.found(),
    )
    folder.write(name, receipt.model_dump_json())
    return receipt


def check_media(listing: Listing, media: StoreConfig) -> None:
    """Refuse a size of media that the data do not have, and one that cannot be encoded here."""
    stores = {key for feature in listing.features.values() for key in feature.stores}
    for key in media.given:
        if key not in stores:
            raise UserError(
                f"--{key} {getattr(media, key)} does not apply to the features {', '.join(listing.features)} of"
                f" {listing.name}"
                + (f", which take {', '.join(f'--{one}' for one in sorted(stores))}" * bool(stores))
                + ": remove it"
            )
    for feature in listing.features.values():
        if "fps" in feature.stores and media.given:
            check_encoder(media, sound="rate" in feature.stores)


def _applies(feature: Feature, media: StoreConfig) -> bool:
    return bool(set(feature.stores) & set(media.given))


def _after(feature: Feature, media: StoreConfig) -> Feature:
    return feature.after(media) if _applies(feature, media) else feature


def _smaller(
    samples: Iterable[Sample | Rejected], features: Mapping[str, Feature], media: StoreConfig
) -> Iterator[Sample | Rejected]:
    """Yield the samples with their media at the wanted size; those that cannot be decoded are rejected."""
    changed = {name: feature for name, feature in features.items() if _applies(feature, media)}
    for sample in samples:
        if isinstance(sample, Rejected) or not changed:
            yield sample
            continue
        try:
            yield {**sample, **{name: feature.smaller(sample[name], media) for name, feature in changed.items()}}
        except BadSample as error:
            yield Rejected(sample["key"], str(error))


def _accepted(samples: Iterable[Sample | Rejected], rejected: list[tuple[str, str]]) -> Iterator[Sample]:
    """Yield the samples; add rejected items to the list."""
    for sample in samples:
        if isinstance(sample, Rejected):
            rejected.append((utf8_name(sample.key), sample.reason))
        else:
            yield {**sample, "key": utf8_name(sample["key"])}


def _read_receipt(folder: Folder, name: str) -> Receipt | None:
    try:
        return Receipt.model_validate_json(folder.fs.cat_file(folder.existing(name)))
    except (FileNotFoundError, NotRegularError, ValidationError):  # writing it refuses a file that is not regular
        return None


def _use_ray(parallel: str) -> bool:
    ray = sys.modules.get("ray")
    return parallel == "ray" or (parallel == "auto" and ray is not None and ray.is_initialized())


def _run_on_ray(jobs: Iterator[_Job], in_flight: int) -> Iterator[Receipt]:
    """Run jobs as Ray tasks, a bounded number at a time; yield the receipts in the order of the jobs."""
    import ray

    task = ray.remote(write_shard)
    running = [task.remote(job) for job in islice(jobs, in_flight)]
    while running:
        yield ray.get(running.pop(0))
        running += [task.remote(job) for job in islice(jobs, 1)]


def _reported(receipts: Iterable[Receipt], progress: Progress | None) -> Iterator[Receipt]:
    """Yield the receipts and report each shard."""
    done = 0
    for receipt in receipts:
        if receipt.shard:
            done += receipt.shard.rows
            if progress:
                progress(done, receipt.shard.name)
        yield receipt


def _collect(receipts: Iterable[Receipt]) -> tuple[dict[str, Split], list[Problem]]:
    """Return the splits and the rejected items."""
    shards: dict[str, list[ShardInfo]] = {}
    rejected: list[Problem] = []
    for receipt in receipts:
        rejected += [Problem(receipt.split, -1, key, reason) for key, reason in receipt.rejected]
        if receipt.shard:
            shards.setdefault(receipt.split, []).append(receipt.shard)
    return {split: Split(shards=tuple(infos)) for split, infos in shards.items()}, rejected


def _measured(receipts: Iterable[Receipt]) -> tuple[list[dict[str, Measured]], int]:
    """Return what was measured on each shard of the training split, and the number of its samples."""
    train = [receipt for receipt in receipts if receipt.split == "train" and receipt.shard]
    rows = sum(receipt.shard.rows for receipt in train if receipt.shard)
    return [receipt.measured for receipt in train], rows


def _check_rejected(folder: Folder, rejected: list[Problem], samples: int, budget: float) -> None:
    """List the rejected items next to the manifest; refuse too many. The next run keeps the finished shards."""
    if rejected:
        write_problems(folder, rejected)
    elif folder.exists(QUARANTINE):
        folder.fs.rm_file(folder.file(QUARANTINE))
    tried = samples + len(rejected)
    if not samples or len(rejected) > math.ceil(budget * tried):
        raise UserError(
            f"{len(rejected)} of {tried} raw items could not be read, more than the budget of {budget:g}"
            f" allows: {count_reasons(rejected)}; {folder.file(QUARANTINE)} lists them: repair the data,"
            " or give a larger --max-bad-fraction"
        )
