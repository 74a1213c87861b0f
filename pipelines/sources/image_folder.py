"""Folders of images named after their classes, on any fsspec file system; the layouts of `_layout.class_files`.

Without a split by name, a seeded, stratified share is held out as split `test`. Files are stored unchanged.
"""

import random
from collections.abc import Iterator, Mapping
from functools import partial

from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines.features import LabelFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, shuffled_units, source_folder
from pipelines.sources._layout import class_files, hold_out_classes, look
from pipelines.sources._probe import PROBE, image_feature

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OPTIONS = ("held_out", "channels", "splits")


class ImageFolder:
    """The source: one class per folder.

    Options: `held_out` (share, 0.2), `channels` (1 or 3; default: as found), `splits` (`names`: by names of folders and
    files; `none`: all folders are classes).
    """

    title = "folders of images, one folder per class (SRC/CLASS/*.jpg, or SRC/train/CLASS/*.jpg with SRC/test)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the image files below `src`."""
        refuse_options(options, OPTIONS)
        folder = source_folder("image_folder", src, "one folder of images per class")
        found = look(folder, SUFFIXES)
        if not found.names:
            raise UserError(f"no images below {folder.url}: wanted CLASS/*.jpg (or .png, .webp, ...) in it")
        rng = random.Random(seed)
        files = hold_out_classes(class_files(folder, found, options), folder, options, "0.2", rng)
        probe = [name for name, _ in next(iter(files.splits.values()))[:PROBE]]
        feature = image_feature(options, [partial(folder.fs.open, folder.file(name), "rb") for name in probe])
        return Listing(
            name=base_name(str(src)),
            features={"image": feature, "label": LabelFeature()},
            classes=tuple(files.classes),
            licence="not stated: the user's own data",
            origin=str(src),
            units=shuffled_units(files.splits, rng, shard_rows, src=src),
            notes=(*files.notes, *found.notes()),
            rejected=tuple(found.rejected),
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's files unchanged."""
        folder = open_folder(unit.content["src"])
        for name, label in unit.content["items"]:
            try:
                yield {"key": name, "image": folder.fs.cat_file(folder.file(name)), "label": label}
            except OSError as error:
                yield Rejected(name, f"unreadable file: {type(error).__name__}")


source = ImageFolder()
