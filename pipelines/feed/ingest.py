"""Batches for training and evaluation: the recipe's `data:` section, and the iterators that a worker consumes.

Each worker has its own pipeline: a Ray Dataset whose items are short runs of its steps. Data tasks turn them into rows
(`pipelines.feed.samples`), and the worker collates them. Ranks do not wait for each other: the plan fixes their order.
"""

import contextlib
import dataclasses
import math
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from perceiver.config import Bytes, Count, Location, Probability, Real, UserError
from perceiver.storage import ReadPolicy
from perceiver.tracking.printable import safe_line
from pipelines.features.base import ViewConfig
from pipelines.feed.samples import PROBLEM, Plan, RankWork, SampleSpec
from pipelines.order.balanced import BalancedPlan
from pipelines.order.mixture import MixturePart, MixturePlan, folders_of, mixed_manifest
from pipelines.order.plan import EvalPlan, RowGroups, SamplePlan
from pipelines.shards.labels import class_index
from pipelines.shards.listing import check_listing
from pipelines.shards.manifest import Manifest, check_places, load_manifest
from pipelines.shards.quarantine import Problem, Quarantine
from pipelines.shards.reader import Reader

if TYPE_CHECKING:
    import torch

    from pipelines.feed.stream import RayOptions, Run

    Batch = dict[str, torch.Tensor]
    Execute = Callable[[RankWork, list[Run], RayOptions], Iterator[tuple[Any, int, list[str]]]]
    Checkable = Generator[tuple[Batch, list[str]], None, None]

KEEP_DECODED_BYTES = 128 << 10
"""Decoded samples up to this size stay in the cache of the data task's process."""
BLOCK_BYTES, LEAST_BLOCK_BYTES = 24 << 20, 8 << 20
"""Size of the blocks that data tasks return; each costs Ray milliseconds. Smaller where few bytes may wait."""
LARGE_ROW_BYTES = 16 << 10
"""From this size of a row on each data task has its own stream; smaller rows come from one, at a lower cost."""
STREAM_SAMPLES, STREAM_BYTES, STREAM_READS = 16, 512 << 20, 4
"""A task with its own stream produces this many times `data.run_samples`, up to this many decoded bytes, and reads this
many times `data.run_bytes`: the next task starts after 50 ms, but if a task dies, all its work is repeated."""

SHOWN = 5
"""Classes that a message names."""
TrainPlan = SamplePlan | MixturePlan | BalancedPlan


class DataConfig(ViewConfig):
    """The data and how they are read (recipe key `data:`)."""

    retired: ClassVar[tuple[str, ...]] = ("read_apart",)

    url: Location = Field(description="prepared folder: a path or an fsspec URL such as s3://bucket/folder")
    mixture: tuple[MixturePart, ...] = Field(
        default=(), description="data sets to train on by weight; `url` is then only evaluated on"
    )
    files: tuple[Location, ...] = Field(
        default=(), description="folders in other stores that an index (`prepare --index`) may name files of"
    )
    train_split: str = Field(default="train", description="split to train on")
    order: Literal["shuffled", "balanced"] = Field(
        default="shuffled", description="each sample once an epoch, or each class equally often"
    )
    eval_split: str = Field(default="test", description="split to evaluate on")
    executor: Literal["ray", "inline"] = Field(default="ray", description="Ray Data, or this process (debugging)")
    cpus_per_task: Real = Field(
        default=0.25, ge=0.001, le=10_000, description="CPUs that a data task reserves; below 1 it shares a core"
    )
    tasks: int = Field(default=2, gt=0, le=10_000, description="data tasks at a time for each worker")
    task_memory: int = Field(default=0, ge=0, le=1 << 50, description="bytes of memory a data task reserves; 0: none")
    task_labels: dict[str, str] = Field(default={}, description="labels of the nodes that data tasks run on")
    run_samples: Count = Field(
        default=2048,
        description="most samples of a data task, approximately; 16 times as many if tasks split each step",
    )
    run_bytes: Bytes = Field(
        default=384 << 20, description="stored bytes that a data task reads, approximately; there 4 times as many"
    )
    prefetch_batches: int = Field(
        default=4, ge=0, le=100_000, description="batches ahead of the training step, in whole blocks"
    )
    prefetch_bytes: Bytes = Field(default=128 << 20, description="decoded bytes waiting for each worker")
    read: ReadPolicy = Field(default=ReadPolicy(), description="time-out and retries of remote reads")
    cache_bytes: Bytes = Field(default=256 << 20, description="row groups cached in each data task's process")
    window: Count | None = Field(default=None, description="samples that are shuffled together; null: by size")
    lanes: Count | None = Field(default=None, description="places that are read at a time; null: by batch size")
    max_bad_fraction: Probability = Field(default=0.01, description="largest share of bad samples")
    storage_options: dict[str, str] = Field(
        default={}, description="options of the file system; `$NAME`: environment variable"
    )


def load_data(data: DataConfig, load: Callable[[str, dict[str, str]], Manifest] = load_manifest) -> Manifest:
    """Return the manifest of `data.url`, with the training splits of `data.mixture` if there is one.

    Args:
        data: the recipe's data section.
        load: reads a manifest, given URL and storage options.

    Raises:
        UserError: a folder is not a prepared data set or an index of files elsewhere, or the data sets of a mixture do
            not agree.
    """

    def checked(url: str) -> Manifest:
        manifest = load(url, data.storage_options)
        check_places(url, manifest, data.files)
        return manifest

    manifest = checked(data.url)
    if not data.mixture:
        return manifest
    parts = [(part, checked(part.url)) for part in data.mixture]
    return mixed_manifest(manifest, data.train_split, parts)


def check_files(data: DataConfig, manifest: Manifest) -> None:
    """Refuse data of either split whose files are missing or differ from the store's listings."""
    for name in dict.fromkeys((data.train_split, data.eval_split)):
        for folder in folders_of(data.url, manifest.split(name)):
            check_listing(folder.url, folder.split, data.storage_options)


def batch_shapes(data: DataConfig, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shape of one sample by key, such as {"image": (1, 28, 28), "label": ()}; see `sample_spec`."""
    spec = sample_spec(data, manifest, split=data.train_split, training=True)
    return {name: shape for name, (shape, _) in spec.shapes().items()}


def sample_spec(data: DataConfig, manifest: Manifest, *, split: str, training: bool) -> SampleSpec:
    """Return how samples become rows. Small samples and clips of a split that fits into the cache are kept decoded.

    Raises:
        UserError: the view does not set the size of images that differ in size.
    """
    size = sum(feature.decoded_bytes() for feature in manifest.features.values())
    room = min(KEEP_DECODED_BYTES, data.cache_bytes // max(1, manifest.split(split).samples))
    larger = not training and data.flow.eval_size
    view = data.model_copy(update={"image_size": data.flow.eval_size}) if larger else data
    spec = SampleSpec(manifest.features, view, len(manifest.classes), training, 0 < size <= room)
    return dataclasses.replace(spec, keep_shown=spec.row_bytes <= room)


def sample_plan(data: DataConfig, manifest: Manifest, *, seed: int, global_batch: int) -> TrainPlan:
    """Return the order of the training samples.

    The window is at least four row groups, and for small samples 8 MiB: these are shuffled thoroughly at no cost.

    Raises:
        UserError: the keys of `data` that decide the order do not fit each other or the data.
    """
    if data.order == "balanced":
        return _balanced_plan(data, manifest, seed=seed, global_batch=global_batch)
    folders = folders_of(data.url, manifest.split(data.train_split))
    groups = [RowGroups.of(folder.split) for folder in folders]
    windows = [
        data.window or SamplePlan.window_for(found, folder.split.bytes)
        for found, folder in zip(groups, folders, strict=True)
    ]
    if data.mixture:
        if data.lanes:
            raise UserError(f"data.lanes = {data.lanes} cannot be set for a mixture: remove data.lanes")
        weights = [folder.weight for folder in folders]
        return MixturePlan.build(groups, weights, windows, seed=seed, global_batch=global_batch)
    if data.lanes and global_batch % data.lanes:
        raise UserError(
            f"data.lanes = {data.lanes} does not divide the global batch {global_batch}:"
            " remove data.lanes, or set it to a divisor"
        )
    return SamplePlan.build(groups[0], seed=seed, global_batch=global_batch, lanes=data.lanes, window=windows[0])


def _balanced_plan(data: DataConfig, manifest: Manifest, *, seed: int, global_batch: int) -> BalancedPlan:
    """Return the balanced order; refuse a class without samples."""
    for name in ("mixture", "lanes", "window"):
        if getattr(data, name):
            raise UserError(f"data.order = balanced cannot be combined with data.{name}: remove one of them")
    split = manifest.split(data.train_split)
    index = class_index(data.url, manifest, data.train_split, data.storage_options, data.read)
    empty = [name for name, count in zip(manifest.classes, index.counts.tolist(), strict=True) if not count]
    if empty:
        shown = ", ".join(map(safe_line, empty[:SHOWN])) + (f" and {len(empty) - SHOWN}" * (len(empty) > SHOWN))
        raise UserError(
            f"data.order = balanced draws each class equally often, but split {data.train_split} of {data.url} has no"
            f" sample of {shown}: remove data.order, or prepare the data with samples of each class"
        )
    return BalancedPlan(RowGroups.of(split), index, seed, global_batch)


@dataclass(frozen=True)
class TrainShare:
    """What one rank trains on: its part of each global batch of some steps.

    Attributes:
        seed: of order and augmentation.
        global_batch: samples of a step over all ranks.
        micro_batch: rows of a batch on one rank. Each rank has whole batches: rows without a sample are padding.
        start_step, stop_step: the steps [start_step, stop_step).
        rank, world: the rank, and the number of ranks.
    """

    seed: int
    global_batch: int
    micro_batch: int
    start_step: int
    stop_step: int
    rank: int = 0
    world: int = 1

    @property
    def rows(self) -> int:
        """Return the rows of this rank in each step, padding included."""
        samples = -(-self.global_batch // self.world)
        return -(-samples // self.micro_batch) * self.micro_batch


def train_batches(
    data: DataConfig,
    manifest: Manifest,
    share: TrainShare,
    device: "torch.device | str",
    quarantine: Quarantine | None = None,
) -> "Generator[Batch, None, None]":
    """Yield one rank's micro-batches, `share.rows` / `share.micro_batch` for each step.

    Step s consists of the same samples with the same augmentation at any world size and after any restart. Padding rows
    have `valid` False and `sample_id` -1. Epochs follow each other without a boundary.

    Args:
        data: the recipe's data section.
        manifest: see `load_data`.
        share: the steps, and the rank's part of them.
        device: of the tensors.
        quarantine: collects the bad samples; default: a new one with the recipe's budget.

    Raises:
        UserError: more bad samples than `data.max_bad_fraction` allows.
    """
    plan = sample_plan(data, manifest, seed=share.seed, global_batch=share.global_batch)
    works = train_streams(data, manifest, plan, share)
    if len(works) == 1:
        most = _run_steps(data, works[0], _turn_samples(data, works[0]))
        runs = plan.runs(share.start_step, share.stop_step, most)
        batches = _execute(data, works[0], runs, share.micro_batch, device)
    else:
        batches = _side_by_side(data, works, share, device)
    yield from _checked(
        batches, works[0], math.ceil(plan.samples / share.world), quarantine or Quarantine(data.max_bad_fraction)
    )


def train_streams(data: DataConfig, manifest: Manifest, plan: TrainPlan, share: TrainShare) -> list[RankWork]:
    """Return the rank's streams: one, or several where rows are large or the shuffled samples cannot wait decoded.

    Tasks that take turns at the steps of one stream each read all row groups of the window. Several streams divide each
    step as ranks do: each reads its own row groups, and none waits for another.
    """
    rows = share.rows
    spec = sample_spec(data, manifest, split=data.train_split, training=True)
    streams = 1
    if data.executor == "ray" and (
        spec.row_bytes >= LARGE_ROW_BYTES or _waiting_rows(data, spec) < plan.shuffled(share.world)
    ):
        streams = max(count for count in range(1, data.tasks + 1) if rows % count == 0)
    batch = share.micro_batch if streams == 1 else rows // streams
    same: dict[str, Any] = {"world": share.world * streams, "seed": share.seed, "batch": batch, "rows": rows // streams}
    return [rank_work(data, manifest, plan, rank=share.rank * streams + number, **same) for number in range(streams)]


def _side_by_side(
    data: DataConfig, works: list[RankWork], share: TrainShare, device: "torch.device | str"
) -> "Checkable":
    """Yield micro-batches of steps whose parts come from several streams, with one task at a time each."""
    from pipelines.feed.stream import RayBatches, steps_of

    streams, waiting = [], data.prefetch_bytes // len(works)
    for one in works:
        work = dataclasses.replace(one, chunk=_chunk(one.spec, one.rows_per_step, waiting))
        samples = max(data.run_samples, min(data.run_samples * STREAM_SAMPLES, STREAM_BYTES // work.spec.row_bytes))
        most = _run_steps(data, work, samples, STREAM_READS)
        windows = work.plan.runs(share.start_step, share.stop_step, most)
        options = dataclasses.replace(_ray_options(data, work), tasks=1, bytes_in_flight=waiting)
        streams.append(RayBatches(work, joined_runs(windows, most), work.rows_per_step, device, options))
    return steps_of(streams, share.micro_batch)


def joined_runs(runs: Iterator[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Join consecutive runs of steps while they have at most `most` steps together."""
    begin, end = next(runs, (0, 0))
    for first, last in runs:
        if last - begin > most:
            yield begin, end
            begin = first
        end = last
    if end > begin:
        yield begin, end


@dataclass(frozen=True)
class EvalShare:
    """What one rank evaluates on.

    Attributes:
        split: its name.
        batch: samples of a batch on one rank.
        rank, world: the rank, and the number of ranks.
        first: the first batch; earlier ones are skipped.
    """

    split: str
    batch: int
    rank: int = 0
    world: int = 1
    first: int = 0


def eval_batches(
    data: DataConfig,
    manifest: Manifest,
    share: EvalShare,
    device: "torch.device | str",
    quarantine: Quarantine | None = None,
) -> "Generator[Batch, None, None]":
    """Yield one rank's batches of a split, once, in order, without augmentation; the same number on each rank.

    The last batches are padded with rows of `valid` False and `sample_id` -1. A bad sample is such a row, too, with its
    own id, since a replacement would be counted twice.
    """
    work, runs, samples = _eval_work(data, manifest, share)
    yield from _checked(
        _execute(data, work, runs, share.batch, device), work, samples, quarantine or Quarantine(data.max_bad_fraction)
    )


def eval_outcomes(
    data: DataConfig, manifest: Manifest, share: EvalShare, execute: "Execute", quarantine: Quarantine
) -> Iterator[Any]:
    """Yield what the caller's executor makes of each batch of `eval_batches`, in order; bad samples are counted.

    Args:
        data: the recipe's data section.
        manifest: see `load_data`.
        share: which batches.
        execute: takes the work, its runs and the limits of the data tasks; yields (outcome, rows, problem lines) of
            each batch.
        quarantine: collects the bad samples.
    """
    work, runs, samples = _eval_work(data, manifest, share)
    for outcome, rows, lines in execute(work, list(runs), _ray_options(data, work)):
        _count(lines, rows, work, samples, quarantine)
        yield outcome


def _eval_work(data: DataConfig, manifest: Manifest, share: EvalShare) -> tuple[RankWork, Iterator["Run"], int]:
    """Return the work of an evaluation, its runs of batches, and the number of the rank's samples."""
    plan = EvalPlan(manifest.split(share.split).samples, share.batch)
    work = rank_work(
        data, manifest, plan, rank=share.rank, world=share.world, seed=0, batch=share.batch, split=share.split
    )
    runs = plan.runs(share.first, plan.batches(share.world), _run_steps(data, work, _turn_samples(data, work)))
    return work, runs, math.ceil(plan.samples / share.world)


def _run_steps(data: DataConfig, work: RankWork, samples: int, reads: int = 1) -> int:
    """Return the steps of a run: as many as `samples` and `reads` times `data.run_bytes` allow, at least one."""
    return max(1, int(min(reads * data.run_bytes / work.stored_bytes, samples)) // work.rows_per_step)


def _turn_samples(data: DataConfig, work: RankWork) -> int:
    """Return the samples of a run where tasks take turns: few enough that those of all tasks can wait."""
    return min(data.run_samples, _waiting_rows(data, work.spec))


def _waiting_rows(data: DataConfig, spec: SampleSpec) -> int:
    """Return how many decoded rows each task may let wait."""
    return max(1, data.prefetch_bytes // (data.tasks + 1) // spec.row_bytes)


def rank_work(
    data: DataConfig,
    manifest: Manifest,
    plan: Plan,
    *,
    rank: int,
    world: int,
    seed: int,
    batch: int,
    split: str | None = None,
    rows: int | None = None,
) -> RankWork:
    """Return the work of one rank on a split, by default the training split."""
    name = split or data.train_split
    found = manifest.split(name)
    spec = sample_spec(data, manifest, split=name, training=split is None)
    kept = spec.row_bytes if spec.keep_decoded or spec.showing else 0
    limits = {"policy": data.read, "cache_bytes": data.cache_bytes, "decoded_bytes": kept}
    reader = Reader.of(data.url, manifest, found, data.storage_options, **limits)
    chunk = _chunk(spec, batch, _waiting_rows(data, spec) * spec.row_bytes)
    return RankWork(uuid.uuid4().hex, name, reader, plan, rank, world, seed, spec, chunk, rows)


def _chunk(spec: SampleSpec, batch: int, waiting: int) -> int:
    """Return the rows of a block of whole batches, given the bytes that a task may let wait."""
    size = max(LEAST_BLOCK_BYTES, min(BLOCK_BYTES, waiting * 3 // 8))
    return batch * max(1, round(size / spec.row_bytes / batch))


def _execute(
    data: DataConfig, work: RankWork, runs: Iterator[tuple[int, int]], batch: int, device: "torch.device | str"
) -> "Checkable":
    if data.executor == "inline":
        return _inline(work, runs, batch, device)
    from pipelines.feed.stream import RayBatches

    return iter(RayBatches(work, runs, batch, device, _ray_options(data, work)))


def _ray_options(data: DataConfig, work: RankWork) -> "RayOptions":
    from pipelines.feed.stream import RayOptions

    block = work.chunk * work.spec.row_bytes  # whole batches, so that none is put together from parts
    limits = (data.cpus_per_task, data.tasks, data.prefetch_batches, data.prefetch_bytes)
    return RayOptions(*limits, block, data.task_memory, data.task_labels)


def _inline(work: RankWork, runs: Iterator[tuple[int, int]], batch: int, device: "torch.device | str") -> "Checkable":
    """Yield the same rows without Ray, in this process, one run after the other."""
    import torch

    for start, stop in runs:
        for rows in work.rows(start, stop):
            lines = rows.pop(PROBLEM)
            for first in range(0, len(lines), batch):
                part = slice(first, first + batch)
                yield (
                    {name: torch.from_numpy(values[part].copy()).to(device) for name, values in rows.items()},
                    [line for line in lines[part] if line],
                )


def _checked(
    batches: "Checkable", work: RankWork, epoch_share: int, quarantine: Quarantine
) -> "Generator[Batch, None, None]":
    """Yield the batches; count their bad samples."""
    with contextlib.closing(batches):
        for batch, lines in batches:
            _count(lines, len(batch["sample_id"]), work, epoch_share, quarantine)
            yield batch


def _count(lines: list[str], rows: int, work: RankWork, epoch_share: int, quarantine: Quarantine) -> None:
    """Count the bad samples of a batch of `rows` rows."""
    problems = [
        Problem(work.split_of(int(number)), int(number), key, reason)
        for line in lines
        for number, key, reason in (entry.split("\t", 2) for entry in line.split("\n"))
    ]
    quarantine.add(problems, met=len(lines), seen=rows, epoch_share=epoch_share)
