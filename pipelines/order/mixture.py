"""Mixtures: training on several data sets by weight, each in its own order and its own epochs.

A repeating table gives the data set of each position of the run. After any number of positions from the start, each
data set has been drawn within one sample of its weight; any other range of positions is within two (one for two data
sets). The n-th draw from a data set is the n-th position of that set's own `SamplePlan`. So a mixture, too, has equal
global batches at any world size, and its state is the step.

An epoch of a mixture has as many samples as its data sets together. A data set whose weight is above its share of the
samples goes through several epochs in that time, another one through part of an epoch.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Config, Location, Real, UserError
from pipelines.features import Feature, TargetFeature
from pipelines.order.permutation import keys
from pipelines.order.plan import I64, LANE_DRAW, Planned, RowGroups, SamplePlan, even_runs, padded, rank_positions
from pipelines.shards.manifest import Manifest, Split
from pipelines.shards.statistics import SpectrogramStatistics, Statistics

LONGEST = 1 << 16
"""Most positions of the table; weights that need more are rounded to this many equal parts."""
VARIED = 1 << 10
"""A shorter table is repeated up to about this length before the seed varies it."""
PASSES = 4


class MixturePart(Config):
    """One data set of a mixture (an item of the recipe's `data.mixture`)."""

    url: Location = Field(description="prepared folder: a path or an fsspec URL")
    weight: Real = Field(ge=1e-6, le=1e6, description="share of the training samples, relative to the other weights")
    split: str | None = Field(default=None, description="its split to train on; null: data.train_split")


@dataclass(frozen=True)
class SplitFolder:
    """The shards of one split of the folder at `url`, with their weight in the mixture."""

    url: str
    split: Split
    weight: float = 1.0


class MixedSplit(Split):
    """The training splits of several data sets; sample ids run through their shards in order."""

    parts: tuple[Any, ...] = Field(description="the data sets (`SplitFolder`)")


def folders_of(url: str, split: Split) -> tuple[SplitFolder, ...]:
    """Return the folders of a split's shards: the folder itself, or the several of a mixture."""
    return split.parts if isinstance(split, MixedSplit) else (SplitFolder(url, split),)


def mixed_manifest(manifest: Manifest, split: str, parts: Sequence[tuple[MixturePart, Manifest]]) -> Manifest:
    """Return the manifest of a mixture: that of the data set to evaluate on, with the training split replaced.

    Args:
        manifest: of the data set to evaluate on; its classes and features are those of the mixture.
        split: name of the training split.
        parts: the data sets to train on, with their manifests.

    Raises:
        UserError: features or classes differ.
    """
    features = dict(manifest.features)
    for part, other in parts:
        if other.classes != manifest.classes:
            difference = _first_difference(manifest.classes, other.classes)
            raise UserError(
                f"data.mixture: {part.url} has other classes than data set {manifest.name}: {difference};"
                " prepare both with the same classes"
            )
        features = _agreed(features, other.features, part.url, manifest.name)
    for name, feature in features.items():
        if isinstance(feature, TargetFeature):
            features[name] = _mixed_target([(part.weight, other.features[name]) for part, other in parts])
    folders = tuple(SplitFolder(part.url, other.split(part.split or split), part.weight) for part, other in parts)
    mixed = MixedSplit(shards=tuple(shard for folder in folders for shard in folder.split.shards), parts=folders)
    measured = [(part.weight, other.statistics) for part, other in parts]
    changed = {"features": features, "class_counts": {}, "splits": {**manifest.splits, split: mixed}}
    changed |= {"statistics": _mixed_statistics(measured), "spectrograms": _spectrograms(parts)}
    return manifest.model_copy(update=changed)


def _spectrograms(parts: Sequence[tuple[MixturePart, Manifest]]) -> tuple[SpectrogramStatistics, ...]:
    """Return the statistics of the spectrograms that all parts have."""
    found = [
        (part.weight, {one.spectrogram.option(): one for one in manifest.spectrograms}) for part, manifest in parts
    ]
    first = found[0][1]
    mixed = _mixed_statistics(found)
    return tuple(SpectrogramStatistics(**dict(one), spectrogram=first[key].spectrogram) for key, one in mixed.items())


def _mixed_target(parts: Sequence[tuple[float, Any]]) -> TargetFeature:
    """Return a target with the mean and deviation of the mixture; without them if one part has none."""
    feature: TargetFeature = parts[0][1].plain()
    if not all(target.mean for _, target in parts):
        return feature
    mean, std = _mixed_moments([(weight, target.mean, target.std) for weight, target in parts])
    return feature.model_copy(update={"mean": mean, "std": std})


def _mixed_moments(
    parts: Sequence[tuple[float, Sequence[float], Sequence[float]]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of the mixture of parts of some weight, mean and deviation."""
    weights, means, deviations = (np.array(column) for column in zip(*parts, strict=True))
    weights = weights / weights.sum()
    mean = weights @ means
    deviation = np.sqrt(weights @ (deviations**2 + (means - mean) ** 2))
    return tuple(mean.tolist()), tuple(deviation.tolist())


def _mixed_statistics(parts: Sequence[tuple[float, Mapping[str, Statistics]]]) -> dict[str, Statistics]:
    """Return mean and deviation of the mixture of each key that all parts have, by weight."""
    mixed = {}
    for key in parts[0][1]:
        found = [(weight, statistics[key]) for weight, statistics in parts if key in statistics]
        if len(found) == len(parts):
            mean, std = _mixed_moments([(weight, one.mean, one.std) for weight, one in found])
            mixed[key] = Statistics(mean=mean, std=std, samples=sum(one.samples for _, one in found))
    return mixed


def _first_difference(wanted: Sequence[str], got: Sequence[str]) -> str:
    if len(wanted) != len(got):
        return f"{len(got)}, wanted {len(wanted)}"
    number = next(i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b)
    return f"class {number} is '{got[number]}', wanted '{wanted[number]}'"


def _agreed(wanted: Mapping[str, Feature], got: Mapping[str, Feature], url: str, name: str) -> dict[str, Feature]:
    """Return the features if they are the same; images may differ in size, which is then left open."""
    if wanted.keys() != got.keys():
        raise UserError(
            f"data.mixture: {url} has the features {', '.join(got)}, data set {name} has"
            f" {', '.join(wanted)}: mix data sets of the same features"
        )
    agreed = {}
    for key, feature in wanted.items():
        other = got[key]
        if feature != other and hasattr(feature, "size"):
            feature, other = (f.model_copy(update={"size": None}) for f in (feature, other))
        if feature.plain() != other.plain():
            raise UserError(
                f"data.mixture: feature '{key}' of {url} is {other!r}, of data set {name} {feature!r}:"
                " mix data sets of the same features"
            )
        agreed[key] = feature
    return agreed


def whole_parts(weights: Sequence[float]) -> tuple[int, ...]:
    """Return weights as whole numbers in the same proportion, exact if their sum is at most 65,536, else rounded.

    Weights are taken as decimals: 0.7 and 0.3 are 7 and 3. A weight that would round to 0 raises `UserError`.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    scale = math.lcm(*((weight / total).denominator for weight in exact))
    if scale <= LONGEST:
        return tuple(int(f / total * scale) for f in exact)
    shares = [f / total * LONGEST for f in exact]
    counts = [int(share) for share in shares]
    by_rest = sorted(range(len(counts)), key=lambda k: counts[k] - shares[k])
    for k in by_rest[: LONGEST - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        raise UserError(
            f"data.mixture: weight {weights[counts.index(0)]:g} is less than 1/{LONGEST} of all weights:"
            " remove that data set, or give it a larger weight"
        )
    return tuple(counts)


@functools.lru_cache(maxsize=8)
def mixing_table(counts: tuple[int, ...], seed: int) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Return which data set each position of the table draws from, and how often it was drawn from before.

    Args:
        counts: positions of each data set among sum(counts).
        seed: varies the order within the bounds.

    Returns:
        Two arrays of the same length, a multiple of sum(counts). In any prefix of n positions each data set appears
        more than n w - 1 and less than n w + 1 times.
    """
    repeats = max(1, VARIED // sum(counts))
    which = np.tile(_even_sequence(counts), repeats)
    which = _varied(which, counts, seed)
    before = np.zeros(which.size, np.int32)
    for k in range(len(counts)):
        here = which == k
        before[here] = np.arange(int(here.sum()))
    return which.astype(np.int16), before


def _even_sequence(counts: tuple[int, ...]) -> I64:
    """Solve the chairman assignment problem as Tijdeman does: no prefix is off by more than 1 - 1 / (2 K - 2).

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980), in whole numbers: everything is
    scaled by total x (2 K - 2).
    """
    total, slack = sum(counts), max(1, 2 * len(counts) - 2)
    weights = np.array(counts, np.int64)
    drawn = np.zeros(len(counts), np.int64)
    sequence = np.empty(total, np.int64)
    for position in range(total):
        due = ((position + 1) * weights - drawn * total) * slack
        # Of those due, the one that would be the first to fall too far behind.
        left = np.where(due >= total, (total * slack - total - due) / weights, np.inf)
        chosen = int(np.argmin(left))
        sequence[position] = chosen
        drawn[chosen] += 1
    return sequence


def _varied(which: I64, counts: tuple[int, ...], seed: int) -> I64:
    """Swap neighbours at random where all prefixes stay within one sample of the weights."""
    sequence, total = which.tolist(), sum(counts)
    for number in range(PASSES):
        coin = (keys(seed, 7, number, np.arange(len(sequence))) & np.uint64(1)).tolist()
        drawn = [0] * len(counts)
        for i in range(len(sequence) - 1):
            a, b = sequence[i], sequence[i + 1]
            if a != b and coin[i]:
                ahead = (drawn[b] + 1) * total - (i + 1) * counts[b]
                behind = (i + 1) * counts[a] - drawn[a] * total
                if ahead < total and behind < total:
                    sequence[i], sequence[i + 1] = b, a
            drawn[sequence[i]] += 1
    return np.array(sequence, np.int64)


@dataclass(frozen=True)
class MixturePlan:
    """The order of the samples of a run on several data sets. Sample ids run through the data sets.

    Attributes:
        plans: of the data sets.
        counts: their weights as whole numbers.
        seed: of the order in which they take turns.
        global_batch: samples of a step over all ranks.
    """

    plans: tuple[SamplePlan, ...]
    counts: tuple[int, ...]
    seed: int
    global_batch: int

    @classmethod
    def build(
        cls,
        groups: Sequence[RowGroups],
        weights: Sequence[float],
        windows: Sequence[int | None],
        *,
        seed: int,
        global_batch: int,
    ) -> "MixturePlan":
        """Return a plan for some data sets; each is read by about as many lanes as its share of the batch needs."""
        counts = whole_parts(weights)
        plans = []
        for number, (part, count, window) in enumerate(zip(groups, counts, windows, strict=True)):
            share = readable_batch(global_batch * count / sum(counts))
            own_seed = int(keys(seed, 6, number) >> np.uint64(1))
            plans.append(SamplePlan.build(part, seed=own_seed, global_batch=share, window=window))
        return cls(tuple(plans), counts, seed, global_batch)

    @property
    def samples(self) -> int:
        """Return the samples of an epoch: those of all data sets together."""
        return sum(plan.samples for plan in self.plans)

    @property
    def first(self) -> I64:
        """Return the first sample id of each data set."""
        return np.cumsum([0] + [plan.samples for plan in self.plans[:-1]])

    def peers(self, sample_id: int) -> tuple[int, int]:
        """Return the first sample id and the number of samples of the data set that this sample belongs to."""
        number = int(np.searchsorted(self.first, sample_id, side="right")) - 1
        return int(self.first[number]), self.plans[number].samples

    def shuffled(self, world: int) -> int:
        """Return how many samples of one rank are shuffled together, over all data sets."""
        return sum(plan.shuffled(world) for plan in self.plans)

    def share(self, start: int, stop: int, rank: int = 0, world: int = 1, rows: int | None = None) -> Planned:
        """Return the samples of one rank: see `SamplePlan.share`; epochs are those of each data set."""
        return padded(self.at, rank_positions(self.global_batch, start, stop, rank, world, rows))

    def drawn(self, positions: I64) -> tuple[I64, I64]:
        """Return the data set that each position of the run draws from, and the number of its earlier draws."""
        which, before = mixing_table(self.counts, self.seed)
        turn, place = np.divmod(positions, which.size)
        found = which[place].astype(np.int64)
        in_turn = np.array(self.counts, np.int64) * (which.size // sum(self.counts))
        return found, turn * in_turn[found] + before[place]

    def at(self, positions: I64) -> Planned:
        """Return the samples at these positions of the run."""
        which, draws = self.drawn(positions)
        ids, epochs = np.empty(positions.shape, np.int64), np.empty(positions.shape, np.int64)
        for number, (plan, first) in enumerate(zip(self.plans, self.first, strict=True)):
            here = which == number
            planned = plan.at(draws[here])
            ids[here], epochs[here] = planned.ids + first, planned.epochs
        return Planned(ids, epochs)

    def runs(self, start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
        """Cut the steps [start, stop) into runs of at most `most` steps."""
        return even_runs(start, stop, most)


def readable_batch(share: float) -> int:
    """Return a whole number near a data set's share of a batch that divides into lanes of about eight samples each.

    A step draws about this many samples from the data set; the closer, the longer a rank stays in its lanes.
    """
    near = max(1, round(share))
    if near < 2 * LANE_DRAW:
        return near
    fits = [n for n in range(near - 2, near + 3) if any(n % draw == 0 for draw in range(LANE_DRAW, LANE_DRAW + 5))]
    return min(fits, key=lambda n: abs(n - share), default=near)
