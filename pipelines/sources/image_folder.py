"""Own images: folders named after classes, with image files in them, on any fsspec file system.

Layout: `SRC/CLASS/**/*.jpg`, of which a seeded, stratified share is held out as split `test`; or `SRC/train/CLASS/...`
beside `SRC/test/CLASS/...` (also `val`, `validation`), which is kept as it is. Files are copied into the shards as
they are.
"""

import random
from collections.abc import Iterator, Mapping

from PIL import Image

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder
from pipelines.features import ImageFeature, LabelFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, channels, share, shuffled_units
from pipelines.transforms.decode import upright_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = {"train": "train", "test": "test", "val": "val", "validation": "val"}
PROBE = 32
OPTIONS = ("held_out", "channels")

Labelled = tuple[str, int]
"""A path relative to the source folder and its class."""


class ImageFolder:
    """The source: one class a folder. Options: `held_out` (share, default 0.2), `channels` (1 or 3, else as found)."""

    title = "folders of images, one folder a class (SRC/CLASS/*.jpg or SRC/train/CLASS/*.jpg beside SRC/test)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the image files below `src`.

        Raises:
            UserError: no such folder, no images, or classes that only a held-out split has.
        """
        refuse_options(options, OPTIONS)
        if src is None:
            raise UserError("source image_folder needs a source folder: perceiver prepare image_folder SRC DST")
        folder = open_folder(src)
        classes, splits = find_images(folder)
        rng = random.Random(seed)
        if set(splits) == {""}:
            splits = _hold_out(splits[""], share(options, "held_out", "0.2"), rng)
        feature = _probe(folder, next(iter(splits.values()))[:PROBE], options)
        return Listing(
            base_name(src),
            {"image": feature, "label": LabelFeature()},
            tuple(classes),
            "not stated: the user's own data",
            src,
            shuffled_units(splits, rng, shard_rows, src=src),
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's files as they are."""
        folder = open_folder(unit.content["src"])
        for name, label in unit.content["items"]:
            try:
                yield {"key": name, "image": folder.fs.cat_file(folder.file(name)), "label": label}
            except OSError as error:
                yield Rejected(name, f"unreadable file: {type(error).__name__}")


def find_images(folder: Folder) -> tuple[list[str], dict[str, list[Labelled]]]:
    """Class names in order, and the image files of each split (split "" if there are none).

    Raises:
        UserError: no such folder, or no image below a class folder.
    """
    if not folder.fs.isdir(folder.path):
        raise UserError(f"source folder {folder.url} does not exist: wanted a folder with one folder of images a class")
    root = folder.path.rstrip("/") + "/"
    names = sorted(path[len(root) :] for path in folder.fs.find(folder.path) if path.lower().endswith(SUFFIXES))
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
    """Channels and size from the headers of a few files; sizes that differ, or cannot be read, are left open."""
    sizes, modes = set(), set()
    for name, _ in members:
        try:
            with folder.fs.open(folder.file(name), "rb") as stream, Image.open(stream) as image:
                sizes.add(upright_size(image))
                modes.add(image.mode)
        except (OSError, Image.DecompressionBombError):
            continue
    found = channels(options, "1" if modes <= {"L", "1"} and modes else "3")
    return ImageFeature(channels=found, size=sizes.pop() if len(sizes) == 1 else None)


source = ImageFolder()
