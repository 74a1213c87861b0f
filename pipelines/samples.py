"""From planned sample ids to decoded, augmented arrays: the work of one data task, without Ray and torch."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from pipelines.permute import keys
from pipelines.plan import EvalPlan, SamplePlan
from pipelines.reader import Reader, RowGroup
from pipelines.shards import Feature, ImageFeature
from pipelines.transforms import image as images
from pipelines.transforms.image import AugmentConfig, BadSample

Arrays = dict[str, NDArray[Any]]

PROBLEM = "problem"
"""The column that carries quarantined samples: empty, or `id<TAB>key<TAB>reason` lines, beside the row they concern."""


@dataclass(frozen=True)
class SampleSpec:
    """How stored samples become rows of a batch.

    Attributes:
        features: what a sample consists of, by batch key.
        image_size: (height, width) of the images of a batch.
        augment: random changes; None in evaluation.
        eval_crop: share of the image that the evaluation crop covers.
        max_pixels: larger images are bad samples.
        classes: number of classes; labels outside are bad samples.
        keep_decoded: whether decoded images stay in the process's cache.
    """

    features: Mapping[str, Feature]
    image_size: tuple[int, int]
    augment: AugmentConfig | None
    eval_crop: float
    max_pixels: int
    classes: int
    keep_decoded: bool

    def shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape (without the batch) and type of each feature in a batch."""
        return {name: ((f.channels, *self.image_size), np.uint8) if isinstance(f, ImageFeature) else ((), np.int64)
                for name, f in self.features.items()}


@dataclass(frozen=True)
class Work:
    """All that a data task needs to produce one rank's rows of any steps.

    Attributes:
        token: identifies this object in the processes that get copies of it.
        split: name of the split, for the quarantine.
        plan: which samples.
        rank, world: whose.
        seed: of the augmentation.
        chunk: rows to hand over at a time.
    """

    token: str
    split: str
    reader: Reader
    plan: SamplePlan | EvalPlan
    rank: int
    world: int
    seed: int
    spec: SampleSpec
    chunk: int

    @property
    def rows_per_step(self) -> int:
        """Rows of this rank in each step."""
        return self.plan.share(0, 1, self.rank, self.world).ids.size

    def rows(self, start: int, stop: int) -> Iterator[Arrays]:
        """The rows of the steps [start, stop), in order, as arrays of up to `chunk` rows.

        Keys: the features, `sample_id` int64 (-1: padding), `valid` bool, `problem` str.
        """
        planned = self.plan.share(start, stop, self.rank, self.world)
        ids, epochs = planned.ids.ravel(), planned.epochs.ravel()
        places = self.reader.locate(np.maximum(ids, 0))
        groups = self.reader.row_groups({place[:2] for place, number in zip(places, ids, strict=True) if number >= 0})
        for first in range(0, ids.size, self.chunk):
            part = slice(first, first + self.chunk)
            yield self._chunk(ids[part], epochs[part], places[part], groups)

    def _chunk(self, ids: NDArray[np.int64], epochs: NDArray[np.int64], places: list[tuple[int, int, int]],
               groups: Mapping[tuple[int, int], RowGroup]) -> Arrays:
        out: Arrays = {name: np.zeros((ids.size, *shape), kind) for name, (shape, kind) in self.spec.shapes().items()}
        out["sample_id"], out["valid"] = ids.copy(), ids >= 0
        problems = [""] * ids.size
        for number in range(ids.size):
            if ids[number] < 0:
                continue
            shard, group, row = places[number]
            found = self._usable(groups[shard, group], row, int(ids[number]), int(epochs[number]))
            problems[number] = found.problems
            out["valid"][number] = found.values is not None
            if found.values is not None:
                out["sample_id"][number] = found.sample_id
                for name, value in found.values.items():
                    out[name][number] = value
        out[PROBLEM] = np.array(problems, dtype=object)
        return out

    def _usable(self, group: RowGroup, row: int, sample_id: int, epoch: int) -> "_Found":
        """The sample, or in training the next good one of its row group, whatever rank reads it.

        In evaluation a bad sample is left out, since another one would be counted twice.
        """
        problems = []
        for offset in range(group.rows if self.spec.augment is not None else 1):
            place = (row + offset) % group.rows
            number = sample_id - row + place
            try:
                values = make_sample(self.spec, group, place, lambda n=number: sample_rng(self.seed, epoch, n))
                return _Found(values, number, "\n".join(problems))
            except BadSample as error:
                key = str(group.columns["key"][place].as_py())
                problems.append(f"{number}\t{key}\t{error}".replace("\n", " "))
        return _Found(None, sample_id, "\n".join(problems))


_WORK: dict[str, Work] = {}
"""The work this process has seen: each task gets a new copy, and the plan keeps tables by identity."""


def produce(batch: Any, work: Work) -> Iterator[Arrays]:
    """The function of a data task: runs of steps in (columns `start` and `stop`), their rows out, a chunk at a time."""
    work = _WORK.setdefault(work.token, work)
    for start, stop in zip(batch["start"], batch["stop"], strict=True):
        yield from work.rows(int(start), int(stop))


@dataclass(frozen=True)
class _Found:
    values: dict[str, Any] | None
    sample_id: int
    problems: str


def sample_rng(seed: int, epoch: int, sample_id: int) -> Generator:
    """The generator of all randomness of one sample in one epoch."""
    return Generator(Philox(key=np.array([_epoch_key(seed, epoch), sample_id], np.uint64)))


@functools.lru_cache(maxsize=16)
def _epoch_key(seed: int, epoch: int) -> int:
    return int(keys(seed, 5, epoch))


def make_sample(spec: SampleSpec, group: RowGroup, row: int, rng: Any) -> dict[str, Any]:
    """Decode one row and take its view.

    Args:
        spec: how.
        group: the row group.
        row: which row of it.
        rng: makes the sample's generator; called only if something is random.

    Raises:
        BadSample: it cannot be decoded, or its label is not a class.
    """
    values: dict[str, Any] = {}
    for name, feature in spec.features.items():
        if isinstance(feature, ImageFeature):
            image = _decoded(spec, group, name, row, feature)
            values[name] = (images.evaluation_view(image, spec.image_size, spec.eval_crop) if spec.augment is None else
                            images.training_view(image, spec.image_size, spec.augment, rng()))
        else:
            label = group.columns[name][row].as_py()
            if label is None or not 0 <= label < spec.classes:
                raise BadSample(f"label {label} is not one of {spec.classes} classes")
            values[name] = label
    return values


def _decoded(spec: SampleSpec, group: RowGroup, name: str, row: int, feature: ImageFeature) -> Any:
    if (image := group.decoded.get((name, row))) is None:
        encoded = group.columns[name][row].as_py()
        image = images.decode(encoded or b"", feature.channels, spec.max_pixels)
        if spec.keep_decoded:
            group.decoded[name, row] = image
    return image
