"""The sample plan: the order of the samples in a run, as a pure function of a few integers.

A run is an endless sequence of positions. Step s is the global batch of positions [s B, (s + 1) B). Epoch e is the N
positions [e N, (e + 1) N), which contain each sample exactly once. So no sample is lost or repeated within an epoch, a
batch may contain the end of one epoch and the start of the next, and nothing is padded or dropped. Nothing depends on
the number of workers: rank r of W takes the r-th of W slices of each batch, which differ by at most one sample.

To keep reads sequential, a batch is drawn from L lanes, B / L samples from each in turn. In each epoch the row groups
are shuffled and divided among the lanes, and within a lane the samples of a window (a few row groups) are shuffled. A
rank whose slice covers whole lanes reads row groups that no other rank reads, each once. A world size that does not
divide the lanes gives the same batches, but two ranks read some of the same row groups.

Everything is computed on demand (`pipelines.order.permutation`): any step of any epoch of 10**9 samples costs the same,
and the state of a run is its step.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.order.permutation import keys, permute
from pipelines.shards.manifest import Split

I64 = NDArray[np.int64]

LANE_DRAW = 8
"""Approximate samples per lane and global batch: a rank then reads a moderate number of row groups at a time."""
WINDOW_GROUPS = 4
WINDOW_BYTES = 8 << 20


class RowGroups:
    """The first samples of the row groups of a split: a few numbers per shard, not one per group.

    Groups of the most common size are regular and are computed; only the others (the last of a shard, or shards of
    another group size) are listed.

    Args:
        rows: samples of each shard.
        rows_per_group: rows of each group of that shard except its last.
        places: (shard, first group) of each entry of `rows`, where a shard with groups of several sizes has one entry
            per run of equal ones; None: entry i is shard i.
    """

    def __init__(
        self,
        rows: Sequence[int] | I64,
        rows_per_group: Sequence[int] | I64,
        places: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.rows = np.asarray(rows, np.int64)
        self.places = None if places is None else np.asarray(places, np.int64).reshape(-1, 2)
        self.rows_per_group = np.asarray(rows_per_group, np.int64)
        if self.rows.ndim != 1 or self.rows.size == 0 or self.rows.min() < 1 or self.rows_per_group.min() < 1:
            raise ValueError(f"rows {rows}, rows_per_group {rows_per_group}: wanted at least one shard, all positive")
        self.first = np.concatenate([[0], np.cumsum(self.rows)])
        sizes, shares = np.unique(self.rows_per_group, return_inverse=True)
        self.size = int(sizes[np.argmax(np.bincount(shares, weights=self.rows))])
        regular = np.where(self.rows_per_group == self.size, self.rows // self.size, 0)
        self._regular = np.concatenate([[0], np.cumsum(regular)])
        odd_first, odd_size = zip(*map(self._odd_groups, range(self.rows.size)), strict=True)
        self.odd_first, self.odd_size = np.concatenate(odd_first), np.concatenate(odd_size)

    @classmethod
    def of(cls, split: Split) -> "RowGroups":
        """Return the row groups of a split."""
        if not any(shard.groups for shard in split.shards):
            return cls([shard.rows for shard in split.shards], [shard.rows_per_group for shard in split.shards])
        runs, places = [], []
        for number, shard in enumerate(split.shards):
            first = 0
            for rows, size in shard.runs:
                runs.append((rows, size))
                places.append((number, first))
                first += -(-rows // size)
        rows_of, sizes = zip(*runs, strict=True)
        return cls(rows_of, sizes, places)

    def _odd_groups(self, shard: int) -> tuple[I64, I64]:
        """Return first samples and sizes of the shard's groups that do not have the regular size."""
        rows, size = int(self.rows[shard]), int(self.rows_per_group[shard])
        starts = np.arange(0, rows, size) if size != self.size else np.arange(rows - rows % size, rows, size)
        return self.first[shard] + starts, np.minimum(size, rows - starts)

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return int(self.first[-1])

    @property
    def regular(self) -> int:
        """Return the number of groups of the regular size."""
        return int(self._regular[-1])

    def regular_first(self, group: I64) -> I64:
        """Return the first sample of each regular group."""
        shard = np.searchsorted(self._regular, group, side="right") - 1
        return self.first[shard] + (group - self._regular[shard]) * self.size

    def locate(self, ids: I64) -> tuple[I64, I64, I64]:
        """Return the shard, the row group within the shard and the row within the group of each sample."""
        run = np.searchsorted(self.first, ids, side="right") - 1
        row = ids - self.first[run]
        group = row // self.rows_per_group[run]
        row -= group * self.rows_per_group[run]
        return (run, group, row) if self.places is None else (self.places[run, 0], self.places[run, 1] + group, row)


class Planned(NamedTuple):
    """Samples of consecutive steps, in order: arrays of the shape (steps, samples of a step)."""

    ids: I64
    epochs: I64


@dataclass(frozen=True)
class SamplePlan:
    """The order of the samples of a run.

    Attributes:
        groups: row groups of the training split.
        seed: of all shuffling.
        global_batch: samples of a step over all ranks (B).
        lanes: places that are read at a time (L), a divisor of B.
        window: samples that are shuffled together in a lane.
    """

    groups: RowGroups
    seed: int
    global_batch: int
    lanes: int
    window: int

    @classmethod
    def build(
        cls, groups: RowGroups, *, seed: int, global_batch: int, lanes: int | None = None, window: int | None = None
    ) -> "SamplePlan":
        """Return a plan; default: the largest divisor of B up to B / 8 as lanes, and a window of four row groups.

        Raises:
            ValueError: a size is not positive, or the lanes do not divide the global batch.
        """
        lanes = lanes or max(d for d in range(1, max(1, global_batch // LANE_DRAW) + 1) if global_batch % d == 0)
        window = window or WINDOW_GROUPS * groups.size
        if global_batch < 1 or lanes < 1 or window < 1 or global_batch % lanes:
            raise ValueError(
                f"global batch {global_batch}, lanes {lanes}, window {window}: wanted positive numbers,"
                " the lanes dividing the batch"
            )
        return cls(groups, seed, global_batch, lanes, window)

    @staticmethod
    def window_for(groups: RowGroups, stored_bytes: int) -> int:
        """Return a window of four row groups, or of 8 MiB if that is more: small samples are shuffled thoroughly."""
        return max(WINDOW_GROUPS * groups.size, WINDOW_BYTES * groups.samples // max(1, stored_bytes))

    @property
    def samples(self) -> int:
        """Return the samples of an epoch (N)."""
        return self.groups.samples

    @property
    def draw(self) -> int:
        """Return the samples of each lane in each global batch (B / L)."""
        return self.global_batch // self.lanes

    def peers(self, sample_id: int) -> tuple[int, int]:
        """Return the first id and the number of the samples of the same data set: all of them."""
        return 0, self.samples

    def shuffled(self, world: int) -> int:
        """Return how many samples of one rank are shuffled together: their row groups are needed at the same time."""
        return min(self.window * self.lanes, self.samples) // world

    def share(self, start: int, stop: int, rank: int = 0, world: int = 1, rows: int | None = None) -> Planned:
        """Return the samples of one rank in the steps [start, stop), shape (stop - start, rows); id -1 is padding.

        Args:
            start, stop: the steps.
            rank, world: the rank, and the number of ranks.
            rows: of each step; default: the samples of the rank with most.
        """
        return padded(self.at, rank_positions(self.global_batch, start, stop, rank, world, rows))

    def at(self, positions: I64) -> Planned:
        """Return the samples at these positions of the run."""
        epoch = positions // self.samples
        lane = positions % self.global_batch // self.draw
        begin = epoch * self.samples
        window, start, stop = self._window(epoch, positions // self.global_batch)
        before = self._drawn(begin, lane)
        size = self._drawn(begin + self.samples, lane) - before
        first = np.clip(self._drawn(start * self.global_batch, lane) - before, 0, size)
        width = np.clip(self._drawn(stop * self.global_batch, lane) - before, 0, size) - first
        offset = self._drawn(positions, lane) - before - first
        shuffled = permute(offset, width, keys(self.seed, 1, epoch, lane, window))
        in_epoch = self._lanes_before(begin + self.samples, lane) - self._lanes_before(begin, lane) + first + shuffled
        return Planned(self._ordered(epoch, in_epoch), epoch)

    def _drawn(self, position: I64, lane: I64) -> I64:
        """Return how many samples the lane has given before this position of the run."""
        step, rest = np.divmod(position, self.global_batch)
        return step * self.draw + np.clip(rest - lane * self.draw, 0, self.draw)

    def _lanes_before(self, position: I64, lane: I64) -> I64:
        """Return how many samples all lanes left of this one have given before this position of the run."""
        step, rest = np.divmod(position, self.global_batch)
        return step * lane * self.draw + np.minimum(rest, lane * self.draw)

    def _window(self, epoch: I64, step: I64) -> tuple[I64, I64, I64]:
        """Return number, first step and last step (exclusive) of the epoch's window that contains this step.

        All lanes share these steps, so that a run of steps can cover whole windows of all lanes. Windows of an epoch
        differ by at most one step in length: none is too short to shuffle.
        """
        begin = epoch * self.samples // self.global_batch
        length = -(-(epoch + 1) * self.samples // self.global_batch) - begin
        count = -(-length // max(1, self.window // self.draw))
        window = ((step - begin + 1) * count - 1) // length
        return window, begin + window * length // count, begin + (window + 1) * length // count

    def _ordered(self, epochs: I64, index: I64) -> I64:
        """Return the index-th sample of each epoch when row groups, but not the samples in them, are shuffled."""
        ids = np.empty(index.shape, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = _in_group_order(self.groups, self.seed, int(epoch), index[here])
        return ids

    def runs(self, start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
        """Cut the steps [start, stop) into runs of at most `most` steps that end with a window where possible.

        A run that covers a window reads each of its row groups once.
        """
        while start < stop:
            step = np.array([start])
            end = min(stop, int(self._window(step * self.global_batch // self.samples, step)[2][0]))
            parts = -(-(end - start) // most)
            end = start + -(-(end - start) // parts)
            yield start, end
            start = end


def even_runs(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut the steps [start, stop) into runs of `most` steps; the last may be shorter."""
    return ((first, min(stop, first + most)) for first in range(start, stop, most))


def rank_positions(global_batch: int, start: int, stop: int, rank: int, world: int, rows: int | None = None) -> I64:
    """Return the positions of one rank in the steps [start, stop), shape (stop - start, rows); -1 is padding."""
    first, last = rank * global_batch // world, (rank + 1) * global_batch // world
    place = first + np.arange(rows or -(-global_batch // world), dtype=np.int64)
    steps = np.arange(start, stop, dtype=np.int64)[:, None]
    return np.where(place < last, steps * global_batch + place, -1)


def padded(at: Callable[[I64], Planned], positions: I64) -> Planned:
    """Return the samples at these positions; -1 where the position is -1."""
    planned = at(np.maximum(positions, 0))
    return Planned(np.where(positions < 0, -1, planned.ids), planned.epochs)


def _in_group_order(groups: RowGroups, seed: int, epoch: int, index: I64) -> I64:
    """Return the sample ids at these places of the epoch's order of row groups."""
    starts, first, size = _odd_order(groups, seed, epoch)
    odd = np.searchsorted(starts, index, side="right") - 1
    in_odd = (odd >= 0) & (index < starts[odd] + size[odd]) if starts.size else np.zeros(index.shape, bool)
    ids = np.empty(index.shape, np.int64)
    if starts.size:
        ids[in_odd] = (first[odd] + index - starts[odd])[in_odd]
    skipped = np.concatenate([[0], np.cumsum(size)])[odd + 1]
    place, row = np.divmod((index - skipped)[~in_odd], groups.size)
    ids[~in_odd] = groups.regular_first(permute(place, groups.regular, keys(seed, 2, epoch))) + row
    return ids


@functools.lru_cache(maxsize=4)
def _odd_order(groups: RowGroups, seed: int, epoch: int) -> tuple[I64, I64, I64]:
    """Return the groups of odd size in the epoch's order: where they start in it, their first samples, their sizes.

    Each is inserted before a random regular group.
    """
    number = np.arange(groups.odd_size.size)
    slot = (keys(seed, 3, epoch, number) % np.uint64(groups.regular + 1)).astype(np.int64)
    order = np.lexsort((keys(seed, 4, epoch, number), slot))
    size = groups.odd_size[order]
    starts = slot[order] * groups.size + np.cumsum(size) - size
    return starts, groups.odd_first[order], size


@dataclass(frozen=True)
class EvalPlan:
    """A split once, in order: rank r reads the r-th of W equal ranges, in the same number of batches on each rank.

    Attributes:
        samples: samples of the split.
        batch: samples of a batch on one rank.
    """

    samples: int
    batch: int

    def batches(self, world: int) -> int:
        """Return the batches of each rank."""
        return -(-self._range(world) // self.batch)

    def _range(self, world: int) -> int:
        return -(-self.samples // world)

    def peers(self, sample_id: int) -> tuple[int, int]:
        """Return the first id and the number of the samples of the same data set: all of them."""
        return 0, self.samples

    def shuffled(self, world: int) -> int:
        """Return 0: nothing is shuffled."""
        return 0

    def runs(self, start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
        """Cut the batches [start, stop) into runs of at most `most` batches."""
        return even_runs(start, stop, most)

    def share(self, start: int, stop: int, rank: int = 0, world: int = 1, rows: int | None = None) -> Planned:
        """Return one rank's batches [start, stop), arrays (stop - start, batch); id -1 is padding, the epoch is 0."""
        offset = np.arange(start * self.batch, stop * self.batch, dtype=np.int64)
        ids = rank * self._range(world) + offset
        ids = np.where((offset < self._range(world)) & (ids < self.samples), ids, -1).reshape(-1, self.batch)
        return Planned(ids, np.zeros_like(ids))
