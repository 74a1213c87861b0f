"""Folders of images named after their classes, on any fsspec file system.

Layout: `SRC/CLASS/**/*.jpg`, of which a seeded, stratified share is held out as split `test`; or `SRC/train/CLASS/...`
with `SRC/test/CLASS/...` (also `val`, `validation`), whose splits are kept. Files are stored unchanged.
"""

import random
from collections.abc import Iterator, Mapping

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder, raise_unanswered
from pipelines.features import ImageFeature, LabelFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, channels, find_files, share, shuffled_units, source_folder
from pipelines.transforms import BadSample
from pipelines.transforms.decode import open_image, upright_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = {"train": "train", "test": "test", "val": "val", "validation": "val"}
PROBE = 32
OPTIONS = ("held_out", "channels")

Labelled = tuple[str, int]
"""A path relative to the source folder and its class."""


class ImageFolder:
    """The source: one class per folder. Options: `held_out` (share, 0.2), `channels` (1 or 3; default: as found)."""

    title = "folders of images, one folder per class (SRC/CLASS/*.jpg, or SRC/train/CLASS/*.jpg with SRC/test)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the image files below `src`."""
        refuse_options(options, OPTIONS)
        folder = source_folder("image_folder", src, "one folder of images per class")
        classes, splits = find_images(folder)
        rng = random.Random(seed)
        if set(splits) == {""}:
            splits = _hold_out(splits[""], share(options, "held_out", "0.2"), rng)
        features = {"image": _probe(folder, next(iter(splits.values()))[:PROBE], options), "label": LabelFeature()}
        units = shuffled_units(splits, rng, shard_rows, src=src)
        licence = "not stated: the user's own data"
        return Listing(base_name(str(src)), features, tuple(classes), licence, str(src), units)

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's files unchanged."""
        folder = open_folder(unit.content["src"])
        for name, label in unit.content["items"]:
            try:
                yield {"key": name, "image": folder.fs.cat_file(folder.file(name)), "label": label}
            except OSError as error:
                raise_unanswered(error)
                yield Rejected(name, f"unreadable file: {type(error).__name__}")


def find_images(folder: Folder) -> tuple[list[str], dict[str, list[Labelled]]]:
    """Return class names in order, and the image files of each split (split "" if there are no splits)."""
    names = find_files(folder, SUFFIXES)
    parts = [name.split("/") for name in names]
    split_layout = bool(parts) and all(part[0] in SPLITS and len(part) > 2 for part in parts)
    depth = 1 if split_layout else 0
    found = [
        (SPLITS[part[0]] if split_layout else "", part[depth], name)
        for part, name in zip(parts, names, strict=True)
        if len(part) > depth + 1
    ]
    if not found:
        raise UserError(f"no images below {folder.url}: wanted CLASS/*.jpg (or .png, .webp, ...) in it")
    classes = sorted({label for _, label, _ in found})
    index = {label: number for number, label in enumerate(classes)}
    splits: dict[str, list[Labelled]] = {}
    for split, label, name in found:
        splits.setdefault(split, []).append((name, index[label]))
    return classes, dict(sorted(splits.items(), key=lambda item: item[0] != "train"))


def _hold_out(members: list[Labelled], part: float, rng: random.Random) -> dict[str, list[Labelled]]:
    by_class: dict[int, list[Labelled]] = {}
    for member in members:
        by_class.setdefault(member[1], []).append(member)
    splits: dict[str, list[Labelled]] = {"train": [], "test": []}
    for label in sorted(by_class):
        rng.shuffle(by_class[label])
        cut = round(len(by_class[label]) * part)
        splits["test"] += by_class[label][:cut]
        splits["train"] += by_class[label][cut:]
    return {split: found for split, found in splits.items() if found}


def _probe(folder: Folder, members: list[Labelled], options: Mapping[str, str]) -> ImageFeature:
    """Return channels and size by the headers of a few files; the size is left open if it varies or is unreadable."""
    sizes, modes = set(), set()
    for name, _ in members:
        try:
            with folder.fs.open(folder.file(name), "rb") as stream, open_image(stream) as image:
                sizes.add(upright_size(image))
                modes.add(image.mode)
        except (OSError, BadSample):
            continue
    found = channels(options, "1" if modes <= {"L", "1"} and modes else "3")
    return ImageFeature(channels=found, size=sizes.pop() if len(sizes) == 1 else None)


source = ImageFolder()
