"""From planned sample ids to decoded, augmented arrays: the work of a data task, without Ray and torch."""

import functools
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.random import PCG64DXSM, Generator
from numpy.typing import NDArray

from pipelines.features import Feature, ImageFeature
from pipelines.features.base import RngFactory, Shapes, ViewConfig
from pipelines.order.balanced import BalancedPlan
from pipelines.order.mixture import MixturePlan
from pipelines.order.permutation import keys
from pipelines.order.plan import EvalPlan, SamplePlan
from pipelines.shards.reader import Reader, RowAddress, RowGroup
from pipelines.transforms import BadSample
from pipelines.transforms.image import Placement

Arrays = dict[str, NDArray[Any]]
Groups = dict[tuple[int, int], RowGroup]
"""Row groups by (shard, group)."""
Plan = SamplePlan | MixturePlan | BalancedPlan | EvalPlan

NICENESS = 10
"""Added to the niceness of a data task; on a cluster Ray starts its processes with 15, and 19 is the maximum."""
SUBSTITUTES = 8
"""Other row groups that are tried if one has no usable sample."""
PROBLEM = "problem"
"""The column of quarantined samples: empty, or lines `id<TAB>key<TAB>reason` about the row's sample."""


@dataclass(frozen=True)
class SampleSpec:
    """How stored samples become rows of a batch.

    Attributes:
        features: the parts of a sample, by name.
        view: how they are shown.
        classes: number of classes.
        training: whether views are random and bad samples are replaced.
        keep_decoded: whether decoded samples stay in the process's cache.
        keep_shown: whether clips of recordings do, of which nothing is random: those that show a whole recording.
    """

    features: Mapping[str, Feature]
    view: ViewConfig
    classes: int
    training: bool
    keep_decoded: bool
    keep_shown: bool = False

    @functools.cached_property
    def decoding(self) -> dict[str, str]:
        """Return what a decoded value depends on, by name: the process's cache may contain those of another run."""
        return {name: f"{name} {feature!r} {self.view!r} {self.classes}" for name, feature in self.features.items()}

    @functools.cached_property
    def showing(self) -> dict[str, str]:
        """Return what a clip that is kept depends on, by the name of its feature."""
        names = [name for name, feature in self.features.items() if feature.clips and self.keep_shown]
        return {name: f"shown {self.training} {self.decoding[name]}" for name in names}

    @functools.cached_property
    def followers(self) -> tuple[str, ...]:
        """Return the features that share the view of an image."""
        return tuple(name for name, feature in self.features.items() if feature.follows)

    @functools.cached_property
    def followed(self) -> frozenset[str]:
        """Return the images whose view others share."""
        return frozenset(self.features[name].follows for name in self.followers)

    def shapes(self) -> Shapes:
        """Return the shape (without the batch axis) and type of each key of a batch.

        Raises:
            UserError: the view does not set the size of images that differ in size.
        """
        axes = self.view.clip.axes(self.training)
        return {
            key: ((*axes, *shape) if feature.clips else shape, kind)
            for name, feature in self.features.items()
            for key, (shape, kind) in feature.shapes(name, self.view, self.classes).items()
        }

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row of a batch."""
        return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in self.shapes().values())


@dataclass(frozen=True)
class RankWork:
    """All that a data task needs to produce one rank's rows of any steps.

    Attributes:
        token: identifies this object in the processes that receive copies of it.
        split: name of the split, for the quarantine.
        plan: the order of the samples.
        rank, world: the rank, and the number of ranks.
        seed: of the augmentation.
        chunk: rows to return at a time.
        rows_wanted: rows of each step, padding included; None: as many as the rank with most samples has.
    """

    token: str
    split: str
    reader: Reader
    plan: Plan
    rank: int
    world: int
    seed: int
    spec: SampleSpec
    chunk: int
    rows_wanted: int | None = None

    @functools.cached_property
    def rows_per_step(self) -> int:
        """Return the rows of this rank in each step."""
        return self.plan.share(0, 1, self.rank, self.world, self.rows_wanted).ids.size

    @functools.cached_property
    def stored_bytes(self) -> float:
        """Return the mean bytes of a stored sample."""
        return sum(sum(files.sizes) for files in self.reader.files) / self.reader.groups.samples

    def split_of(self, sample_id: int) -> str:
        """Return the split for the quarantine; in a mixture also the data set that the sample belongs to."""
        if len(self.reader.files) == 1:
            return self.split
        shard = self.reader.locate(np.array([sample_id]))[0][0]
        return f"{self.split} of {self.reader.folder(shard)}"

    def rows(self, start: int, stop: int) -> Iterator[Arrays]:
        """Yield the rows of the steps [start, stop), in order, as arrays of `chunk` rows; the last may have fewer.

        The row groups of a window are read while the rows of the one before are decoded.

        Keys: the features, `sample_id` int64 (-1: padding), `valid` bool, `problem` str.
        """
        left = (stop - start) * self.rows_per_step
        out, filled = self._empty(min(self.chunk, left)), 0
        for read in self._windows(list(self.plan.runs(start, stop, min(self._span_steps, stop - start)))):
            for number in range(len(read.ids)):
                self._fill(out, filled, read, number)
                filled += 1
                if filled == len(out["valid"]):
                    yield out
                    left -= filled
                    out, filled = self._empty(min(self.chunk, left)), 0

    def _windows(self, spans: Sequence[tuple[int, int]]) -> "Iterator[_Read]":
        """Yield what is read for each span of steps; the next span is read ahead if the cache has room for it."""
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            ahead: Future[_Read] | None = None
            for number, span in enumerate(spans):
                read = ahead.result() if ahead else self._read(*span)
                ahead = None
                if number + 1 < len(spans) and self._stored_bytes(spans[number + 1]) <= self.reader.cache_bytes:
                    ahead = reader.submit(self._read, *spans[number + 1])
                yield read

    @functools.cached_property
    def _span_steps(self) -> int:
        """Return the steps whose row groups are read together.

        In the balanced order, where each sample is in another row group, half the cache: two spans are in memory.
        """
        if not isinstance(self.plan, BalancedPlan) or self._stored_bytes((0, 1 << 40)) * 2 <= self.reader.cache_bytes:
            return sys.maxsize
        return max(1, int(self.reader.cache_bytes / 2 / self._stored_bytes((0, 1))))

    def _stored_bytes(self, span: tuple[int, int]) -> float:
        """Return the approximate bytes of the row groups that this rank's rows of some steps need."""
        stored = (span[1] - span[0]) * self.rows_per_step * self.stored_bytes
        if isinstance(self.plan, BalancedPlan):
            stored = min(stored * self.reader.groups.size, self.stored_bytes * self.reader.groups.samples)
        return stored

    def _read(self, start: int, stop: int) -> "_Read":
        """Read the row groups of some steps; return them with the ids, epochs and addresses of the rows."""
        planned = self.plan.share(start, stop, self.rank, self.world, self.rows_wanted)
        ids, epochs = planned.ids.ravel(), planned.epochs.ravel()
        places = self.reader.locate(np.maximum(ids, 0))
        wanted = {place[:2] for place, number in zip(places, ids.tolist(), strict=True) if number >= 0}
        streams = sample_streams(self.seed, epochs, ids)
        return _Read(ids.tolist(), epochs.tolist(), streams, places, self.reader.row_groups(wanted))

    def _empty(self, rows: int) -> Arrays:
        """Return uninitialised arrays of `rows` rows."""
        out: Arrays = {name: np.empty((rows, *shape), kind) for name, (shape, kind) in self.spec.shapes().items()}
        problems = np.full(rows, "", dtype=object)
        return out | {"sample_id": np.empty(rows, np.int64), "valid": np.empty(rows, bool), PROBLEM: problems}

    def _fill(self, out: Arrays, row: int, read: "_Read", number: int) -> None:
        """Decode a planned sample into a row; zeros if it cannot be used."""
        found = self._usable(read, number) if read.ids[number] >= 0 else PADDING
        out["sample_id"][row] = found.sample_id
        out["valid"][row] = found.values is not None
        if found.problems:
            out[PROBLEM][row] = found.problems
        for name, value in (found.values or dict.fromkeys(self.spec.shapes(), 0)).items():
            out[name][row] = value

    def _usable(self, read: "_Read", planned: int) -> "_Found":
        """Return the sample, or in training its replacement, which is the same on every rank and at every attempt.

        In evaluation a bad sample is left out, since another one would be counted twice.
        """
        problems = []
        sample_id, epoch = read.ids[planned], read.epochs[planned]
        for number, (shard, group, row) in self._candidates(read.groups, read.places[planned], sample_id, epoch):
            found = read.groups[shard, group]
            try:
                if found.error:
                    raise BadSample(found.error)
                stream = read.streams[planned] if number == sample_id else sample_stream(self.seed, epoch, number)
                return _Found(make_sample(self.spec, found, row, SampleRng(stream)), number, "\n".join(problems))
            except BadSample as error:
                key = self.reader.row_key(shard, group, row) if found.error else found.value("key", row)
                problems.append(f"{number}\t{key}\t{error}".replace("\n", " "))
        return _Found(None, sample_id, "\n".join(problems))

    def _candidates(
        self, groups: Groups, place: RowAddress, sample_id: int, epoch: int
    ) -> Iterator[tuple[int, RowAddress]]:
        """Yield the sample itself, then, in training, the others of its row group and of row groups drawn at random.

        All samples of a lost row group move to the same other one, which costs one more read.
        """
        yield sample_id, place
        if not self.spec.training:
            return
        shard, group, row = place
        start = sample_id - row
        tried = {(shard, group)}
        yield from ((start + other, (shard, group, other)) for other in _after(row, groups[shard, group].rows))
        first, count = self.plan.peers(sample_id)
        for attempt in range(SUBSTITUTES):
            drawn = first + int(keys(self.seed, 8, epoch, start, attempt) % np.uint64(count))
            shard, group, drawn_row = self.reader.locate(np.array([drawn]))[0]
            if (shard, group) not in tried:
                tried.add((shard, group))
                if (shard, group) not in groups:
                    groups.update(self.reader.row_groups({(shard, group)}))
                rows = groups[shard, group].rows
                yield from ((drawn - drawn_row + other, (shard, group, other)) for other in _after(row - 1, rows))


def _after(row: int, rows: int) -> Iterator[int]:
    """Yield the rows of a group after this one, wrapping around to the one before it."""
    return ((row + offset) % rows for offset in range(1, rows))


_SEEN: dict[str, RankWork] = {}
"""The first copy of each work in this process: each task receives a new one, and the plan caches tables by identity."""


def produce(batch: Any, work: RankWork) -> Iterator[Arrays]:
    """Yield the rows of some runs of steps (columns `start` and `stop`), a chunk at a time: the body of a data task."""
    work = _SEEN.setdefault(work.token, work)
    _step_back()
    for start, stop in zip(batch["start"], batch["stop"], strict=True):
        yield from work.rows(int(start), int(stop))


@functools.cache
def _step_back() -> None:
    """Lower this process's priority: training workers wait for each other, so none may wait for a data task."""
    os.nice(NICENESS)


class _Read(NamedTuple):
    ids: list[int]
    epochs: list[int]
    streams: list[int]
    places: list[RowAddress]
    groups: Groups


class _Found(NamedTuple):
    values: dict[str, Any] | None
    sample_id: int
    problems: str


PADDING = _Found(None, -1, "")


class _Streams(threading.local):
    """One generator per thread, whose state is set for each sample, since making one takes ten times as long.

    PCG64DXSM, since Philox takes a quarter longer where a sample draws thousands of numbers, as point clouds do.
    """

    def __init__(self) -> None:
        self.bits = PCG64DXSM(0)
        self.generator, self.state = Generator(self.bits), self.bits.state

    def begin(self, stream: int) -> Generator:
        """Return the generator at this place of its period of 2**128 numbers."""
        self.state["state"]["state"] = stream
        self.bits.state = self.state
        return self.generator


_STREAMS = _Streams()


def sample_streams(seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> list[int]:
    """Return where the random numbers of samples in their epochs begin in the generator's period."""
    kinds, places = np.unique(epochs, return_inverse=True)
    high = keys(keys(seed, 5, kinds)[places] ^ ids.astype(np.uint64))
    return [first << 64 | second for first, second in zip(high.tolist(), keys(high).tolist(), strict=True)]


def sample_stream(seed: int, epoch: int, sample_id: int) -> int:
    """Return `sample_streams` of one sample."""
    return sample_streams(seed, np.array([epoch]), np.array([sample_id]))[0]


class SampleRng:
    """Start a sample's generator at the first call; it is valid until another sample's is started in the thread."""

    __slots__ = ("_generator", "_stream")

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._generator: Generator | None = None

    def __call__(self) -> Generator:
        if self._generator is None:
            self._generator = _STREAMS.begin(self._stream)
        return self._generator


def _stored(group: RowGroup, name: str, row: int) -> Any:
    try:
        return group.value(name, row)
    except UnicodeDecodeError as error:  # A column of strings in an indexed file may contain anything.
        raise BadSample(f"invalid UTF-8: {error.reason}") from error


def make_sample(spec: SampleSpec, group: RowGroup, row: int, rng: RngFactory) -> dict[str, Any]:
    """Decode one row of a group and return its view by key; raise `BadSample` if it is damaged."""
    sample = {
        name: _decoded(spec, name, one, group, row) for name, one in spec.features.items() if name not in spec.showing
    }
    values: dict[str, Any] = {}
    places: dict[str, Placement] = {}
    for name, feature in spec.features.items():
        if isinstance(feature, ImageFeature) and name in spec.followed:
            shown, places[name] = feature.show_placed(name, sample[name], spec.view, spec.training, rng)
            values.update(shown)
        elif name in spec.showing:
            values.update(_kept_clip(spec, name, feature, group, row, rng))
        elif not feature.follows:
            values.update(feature.show(name, sample[name], spec.view, spec.training, rng))
    for name in spec.followers:
        feature = spec.features[name]
        values.update(feature.show_with(name, sample[name], spec.view, places[feature.follows], sample))
    return values


def _kept_clip(
    spec: SampleSpec, name: str, feature: Feature, group: RowGroup, row: int, rng: RngFactory
) -> Mapping[str, Any]:
    """Return the view of a recording, from the cache if it is there; it stays there if nothing of it is random."""
    key = spec.showing[name], row
    if key in group.decoded:
        return group.decoded[key]
    drawn = False

    def noted() -> np.random.Generator:
        nonlocal drawn
        drawn = True
        return rng()

    shown = feature.show(name, _decoded(spec, name, feature, group, row), spec.view, spec.training, noted)
    if not drawn:
        group.decoded[key] = shown
    return shown


def _decoded(spec: SampleSpec, name: str, feature: Feature, group: RowGroup, row: int) -> Any:
    """Return the decoded value of one feature, from the cache if it is there."""
    key = spec.decoding[name], row
    decoded = group.decoded.get(key)
    if decoded is None:
        decoded = feature.decode(_stored(group, name, row), spec.view, spec.classes)
        if spec.keep_decoded and feature.decoded_bytes():
            group.decoded[key] = decoded
    return decoded
