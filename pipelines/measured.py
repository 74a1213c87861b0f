"""What `prepare` measures on labels and targets while it writes shards, for normalisation and class weights."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from perceiver.config import Config, UserError
from perceiver.storage import PrintableName
from pipelines.features import Feature, LabelFeature, LabelsFeature, TargetFeature
from pipelines.sources import Sample

LEAST_DEVIATION = 1e-5
"""Targets are float32 in a batch: below this share of the mean, their differences are lost."""

SMALLEST = 1e-15
"""The smallest deviation that a manifest may have, see `TargetFeature`."""


class Measured(Config):
    """Figures of one feature in one shard, which add up exactly.

    Attributes:
        rows: samples.
        mean: of each target.
        squares: sum of the squared deviations from that mean, of each target.
        counts: (class, samples), of a label.
    """

    rows: int
    mean: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    counts: tuple[tuple[int, int], ...] = ()


class Meter:
    """Measures the samples that pass through it.

    Args:
        features: of the samples.
    """

    def __init__(self, features: Mapping[str, Feature]) -> None:
        self.rows = 0
        self.targets: dict[str, list[Sequence[float]]] = {
            name: [] for name, feature in features.items() if isinstance(feature, TargetFeature)
        }
        self.classes: dict[str, Counter[int]] = {
            name: Counter() for name, feature in features.items() if isinstance(feature, LabelFeature | LabelsFeature)
        }

    def watch(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples."""
        for sample in samples:
            self.rows += 1
            for name, values in self.targets.items():
                values.append(sample[name])
            for name, counter in self.classes.items():
                label = sample[name]
                counter.update(label if isinstance(label, list | tuple) else (label,))
            yield sample

    def found(self) -> dict[str, Measured]:
        """Return the figures by feature."""
        found = {}
        for name, values in self.targets.items():
            if values:
                array = np.asarray(values, np.float64)
                mean = array.mean(0)
                squares = np.square(array - mean).sum(0)
                found[name] = Measured(rows=self.rows, mean=tuple(mean.tolist()), squares=tuple(squares.tolist()))
        for name, counter in self.classes.items():
            known = sorted((label, count) for label, count in counter.items() if label is not None)
            found[name] = Measured(rows=self.rows, counts=tuple(known))
        return found


def class_counts(
    features: Mapping[str, Feature], shards: Sequence[Mapping[PrintableName, Measured]], rows: int, classes: int
) -> dict[str, tuple[int, ...]]:
    """Return the training samples of each class, by feature; see `with_measured`.

    Args:
        classes: number of classes of the data set, for labels without classes of their own.
    """
    found = {}
    for name, feature in features.items():
        parts = [shard[name] for shard in shards if name in shard]
        if isinstance(feature, LabelFeature | LabelsFeature) and rows and sum(part.rows for part in parts) == rows:
            total: Counter[int] = Counter()
            for part in parts:
                total.update(dict(part.counts))
            found[name] = tuple(total[number] for number in range(len(getattr(feature, "classes", ())) or classes))
    return found


def with_measured(
    features: Mapping[str, Feature], shards: Sequence[Mapping[PrintableName, Measured]], rows: int
) -> dict[str, Feature]:
    """Return the features with mean and deviation of targets.

    Args:
        features: of the data set.
        shards: figures of the shards of the training split, by feature.
        rows: samples of the training split; figures that do not cover all of them are left out.

    Raises:
        UserError: a target has the same value in all training samples.
    """
    result = dict(features)
    for name, feature in features.items():
        parts = [shard[name] for shard in shards if name in shard]
        if not rows or sum(part.rows for part in parts) != rows:
            continue
        if isinstance(feature, TargetFeature):
            result[name] = _scaled(feature, parts, rows)
    return result


def _scaled(feature: TargetFeature, parts: Sequence[Measured], rows: int) -> TargetFeature:
    weights = np.array([part.rows for part in parts], np.float64)
    means = np.array([part.mean for part in parts])
    mean = weights @ means / rows
    squares = np.array([part.squares for part in parts]).sum(0) + weights @ np.square(means - mean)
    std = np.sqrt(squares / rows)
    for number, target in enumerate(feature.names):
        if not std[number] > LEAST_DEVIATION * abs(mean[number]) or not math.isfinite(std[number]):
            raise UserError(
                f"target {target} is {mean[number]:.8g} in all {rows:,} training samples, or varies by less than"
                f" {LEAST_DEVIATION:g} of that: leave it out of --option target=, or subtract a constant"
            )
        if std[number] < SMALLEST:
            raise UserError(
                f"target {target} has the deviation {std[number]:.3g}, wanted {SMALLEST:g} or more: use smaller units"
            )
    return feature.model_copy(update={"mean": tuple(mean.tolist()), "std": tuple(std.tolist())})
