"""The balanced order: each class is drawn once in every K positions of the run, as a pure function of the position.

Position p belongs to cycle c = p div K of the K classes. Its class k is the (p mod K)-th of the cycle's permutation of
the classes, and its sample is the (c mod n_k)-th of a permutation of the n_k samples of that class, which changes with
each pass c div n_k. It is the sampler of Kong et al., "PANNs" (2020), without its state: a run resumes exactly at any
step, and ranks share the same global batches at any world size.

A sample of several classes is drawn for each of them, so that classes are balanced only approximately then; one without
a class is never drawn. An epoch has as many positions as there are samples, but it repeats samples of rare classes and
leaves out some of frequent ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.order.permutation import keys, permute
from pipelines.order.plan import I64, Planned, RowGroups, even_runs, padded, rank_positions


@dataclass(frozen=True, eq=False)
class ClassIndex:
    """The samples of each class of a split.

    Attributes:
        members: sample ids, class by class, in ascending order within a class.
        first: where each class begins in `members`, and their number: K + 1 integers.
    """

    members: NDArray[np.int32] | I64
    first: I64

    @classmethod
    def of(cls, rows: I64, labels: I64, classes: int) -> "ClassIndex":
        """Return the index of pairs of a sample id and a class; repeated pairs and classes out of range are left out.

        Args:
            rows: sample ids, in ascending order.
            labels: a class of each.
            classes: number of classes (K).
        """
        known = (labels >= 0) & (labels < classes)
        rows, labels = rows[known], labels[known]
        order = np.argsort(labels, kind="stable")
        rows, labels = rows[order], labels[order]
        fresh = np.ones(rows.size, bool)
        fresh[1:] = (rows[1:] != rows[:-1]) | (labels[1:] != labels[:-1])
        counts = np.bincount(labels[fresh], minlength=classes)
        members = rows[fresh]
        if not members.size or members.max() < 1 << 31:
            members = members.astype(np.int32)
        return cls(members, np.concatenate([[0], np.cumsum(counts)]))

    @property
    def counts(self) -> I64:
        """Return the number of samples of each class (n_k)."""
        return np.diff(self.first)


@dataclass(frozen=True, eq=False)
class BalancedPlan:
    """The balanced order of the samples of a run.

    Attributes:
        groups: row groups of the training split.
        index: the samples of each class; none is empty.
        seed: of all shuffling.
        global_batch: samples of a step over all ranks.
    """

    groups: RowGroups
    index: ClassIndex
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        """Raise `ValueError` for a class without samples, or an empty batch."""
        if self.global_batch < 1 or not self.index.counts.size or not self.index.counts.all():
            raise ValueError(
                f"global batch {self.global_batch}, samples of the classes {self.index.counts}: wanted positive numbers"
            )

    @property
    def samples(self) -> int:
        """Return the positions of an epoch: the samples of the split."""
        return self.groups.samples

    def peers(self, sample_id: int) -> tuple[int, int]:
        """Return the first id and the number of the samples of the same data set: all of them."""
        return 0, self.samples

    def shuffled(self, world: int) -> int:
        """Return 0: no row groups are kept for later positions."""
        return 0

    def share(self, start: int, stop: int, rank: int = 0, world: int = 1, rows: int | None = None) -> Planned:
        """Return the samples of one rank: see `SamplePlan.share`; the epoch is unique to the pass of the class."""
        return padded(self.at, rank_positions(self.global_batch, start, stop, rank, world, rows))

    def at(self, positions: I64) -> Planned:
        """Return the samples at these positions of the run."""
        counts = self.index.counts
        cycle, place = np.divmod(positions, counts.size)
        kind = permute(place, counts.size, keys(self.seed, 9, cycle))
        turn, draw = np.divmod(cycle, counts[kind])
        member = permute(draw, counts[kind], keys(self.seed, 10, kind, turn))
        ids = self.index.members[self.index.first[kind] + member].astype(np.int64)
        return Planned(ids, turn * counts.size + kind)

    def runs(self, start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
        """Cut the steps [start, stop) into runs of at most `most` steps."""
        return even_runs(start, stop, most)
