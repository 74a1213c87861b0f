"""Folders of images next to folders of masks of the same names: `SRC/**/images/a.jpg` with `SRC/**/masks/a.png`."""

import random
from collections.abc import Iterator, Mapping
from functools import partial

from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines.features import SegmentationFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, hold_out, shuffled_units, source_folder
from pipelines.sources._files import look, read_file, unreadable
from pipelines.sources._layout import class_notes, held_out_share, split_notes, splits_of_files
from pipelines.sources._masks import mask_classes
from pipelines.sources._probe import PROBE, image_feature
from pipelines.transforms import BadSample
from pipelines.transforms.mask import pack

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OPTIONS = ("images", "masks", "classes", "channels", "held_out", "splits")


class SegmentationFolder:
    """The source: grey or palette PNG files with a class for each pixel, 255 where it does not count.

    Options: `classes` (names with commas, from class 0 on), `images` and `masks` (names of the folders), `channels`
    (1 or 3; default: as found), `held_out` (share of the images, 0.2 if no name states a split), `splits`.
    """

    title = "folders of images with folders of masks (SRC/images/a.jpg with SRC/masks/a.png; option classes=NAMES)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """Pair the images below `src` with their masks."""
        refuse_options(options, OPTIONS)
        classes = mask_classes(options)
        folder = source_folder("segmentation_folder", src, "images/a.jpg with masks/a.png")
        images, masks = options.get("images", "images"), options.get("masks", "masks")
        found = look(folder, SUFFIXES)
        theirs: dict[str, str] = {}
        for name in found.names:
            if masks in name.split("/")[:-1]:
                theirs[_place(name, masks)] = name
        pairs, rejected = {}, list(found.rejected)
        for name in found.names:
            parts = name.split("/")[:-1]
            if masks in parts:
                continue
            if images not in parts:
                found.ignore(f"files outside folders named {images} and {masks}", name)
                continue
            mask = theirs.pop(_place(name, images), None)
            if mask is None:
                rejected.append(Rejected(name, f"no mask of its name in a folder {masks}"))
            else:
                pairs[name] = mask
        rejected += [Rejected(name, f"a mask without an image in a folder {images}") for name in theirs.values()]
        if not pairs:
            raise UserError(
                f"{folder.url} has no images with masks: wanted {images}/a.jpg with {masks}/a.png, or name the folders"
                " by --option images=NAME and masks=NAME"
            )
        splits = splits_of_files(folder, list(pairs), options)
        held_out = held_out_share(splits, folder, options, "0.2")
        rng = random.Random(seed)
        parts = hold_out(splits[next(iter(splits))], held_out, rng) if held_out else splits
        held_out = held_out if "test" in parts else 0.0
        files = [partial(folder.fs.open, folder.file(name), "rb") for name in list(pairs)[:PROBE]]
        plain = image_feature(options, files)
        items = {split or "train": [(name, pairs[name]) for name in names] for split, names in parts.items()}
        return Listing(
            name=base_name(str(src)),
            features={"image": SegmentationFeature(channels=plain.channels, size=plain.size)},
            classes=classes,
            licence="not stated: the user's own data",
            origin=str(src),
            units=shuffled_units(items, rng, shard_rows, src=src, classes=len(classes)),
            notes=(*class_notes(classes), *split_notes(splits, held_out), *found.notes()),
            rejected=tuple(rejected),
            versions=found.versions,
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's images and masks."""
        folder = open_folder(unit.content["src"])
        for name, mask in unit.content["items"]:
            try:
                packed = pack(read_file(folder, name), read_file(folder, mask), unit.content["classes"])
                yield {"key": name, "image": packed}
            except (BadSample, ValueError) as error:
                yield Rejected(name, str(error))
            except OSError as error:
                yield unreadable(name, error)


def _place(name: str, folder: str) -> str:
    """Return a file's place without the name of the nearest folder of images or masks, and without its ending."""
    parts = name.split("/")
    nearest = max(number for number, part in enumerate(parts[:-1]) if part == folder)
    stem = parts[-1].rpartition(".")[0]
    return "/".join([*parts[:nearest], "", *parts[nearest + 1 : -1], stem])


source = SegmentationFolder()
