"""ImageNet (ILSVRC 2012): class folders or the original tars, by synset.

Folders: `SRC/train/n01440764/*.JPEG` with `SRC/val/n01440764/*.JPEG`, or `SRC/val/*.JPEG` with a list of labels; the
layout of Kaggle (`SRC/ILSVRC/Data/CLS-LOC/train`, ...) is found, too. Tars: `ILSVRC2012_img_train.tar` (one tar per
class) and `ILSVRC2012_img_val.tar`, which are read in place and never unpacked. Lists of the validation labels:
`LOC_val_solution.csv`, or one synset per line in the order of the images (`*synset_labels.txt`). Classes are synsets in
alphabetical order, with their words if `LOC_synset_mapping.txt` or `synset_words.txt` is found.
"""

import random
import re
import tarfile
from collections.abc import Iterator, Mapping

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder, raise_unanswered
from pipelines.features import ImageFeature, LabelFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import MAX_FILE, TAR_ERRORS, read_list, shuffled_units, source_folder, tar_members
from pipelines.sources._files import Found, look, unreadable
from pipelines.sources._layout import class_notes

IMAGES = (".jpeg", ".jpg", ".png")
SYNSET = re.compile(r"n\d{8}")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}")
WANTED = "train/n01440764/*.JPEG and val/..., or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
LICENCE = "ImageNet terms of access: non-commercial research and education"

ImageLocation = tuple[str, str, int, int, str]
"""Key, file, offset and size in it (-1: the whole file), synset."""


class ImageNet:
    """The source: split `train`, and the 50,000 validation images as split `val`."""

    title = "ImageNet ILSVRC 2012: class folders, or the original tars"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the images below `src`."""
        refuse_options(options)
        folder, found = self._found(src)
        names = found.names
        splits = {"train": list(find_train(folder, names)), "val": list(find_val(folder, names))}
        _check_places(folder, found, splits)
        if not splits["train"] and not splits["val"]:
            raise UserError(f"{folder.url} is not laid out like ImageNet: wanted {WANTED}")
        synsets = sorted({place[-1] for places in splits.values() for place in places})
        words = synset_words(folder, names)
        labels = {synset: number for number, synset in enumerate(synsets)}
        items = {
            split: [(*place[:-1], labels[place[-1]]) for place in places] for split, places in splits.items() if places
        }
        units = shuffled_units(items, random.Random(seed), shard_rows, src=folder.url)
        features = {"image": ImageFeature(channels=3), "label": LabelFeature()}
        classes = tuple(f"{synset} {words[synset]}" if synset in words else synset for synset in synsets)
        return Listing(
            "imagenet",
            features,
            classes,
            LICENCE,
            folder.url,
            units,
            notes=(*class_notes(classes), *found.notes()),
            rejected=tuple(found.rejected),
            versions=found.versions,
        )

    def versions(self, src: str | None) -> Mapping[str, str]:
        """Return those of a listing without reading the headers of the tars."""
        return self._found(src)[1].versions

    @staticmethod
    def _found(src: str | None) -> tuple[Folder, Found]:
        folder = source_folder("imagenet", src, WANTED)
        return folder, look(folder, (*IMAGES, ".tar", ".txt", ".csv"))

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's images unchanged."""
        folder = open_folder(unit.content["src"])
        for key, name, offset, size, label in unit.content["items"]:
            if size > MAX_FILE:
                yield Rejected(key, f"{size} bytes, more than {MAX_FILE}")
                continue
            try:
                part = {} if size < 0 else {"start": offset, "end": offset + size}
                yield {"key": key, "image": folder.fs.cat_file(folder.file(name), **part), "label": label}
            except OSError as error:
                yield unreadable(key, error)


def find_train(folder: Folder, names: list[str]) -> Iterator[ImageLocation]:
    """Yield the training images: in class folders below `train`, or in a tar of class tars."""
    for name in names:
        parts = name.split("/")
        if parts[-1].endswith("img_train.tar"):
            yield from _train_tar(folder, name)
        elif "train" in parts[:-2] and SYNSET.fullmatch(parts[-2]) and name.lower().endswith(IMAGES):
            yield f"train/{parts[-2]}/{parts[-1]}", name, 0, -1, parts[-2]


def find_val(folder: Folder, names: list[str]) -> Iterator[ImageLocation]:
    """Yield the validation images: in class folders below `val`, or flat or in a tar, with a list of labels."""
    flat: list[tuple[str, str, int, int]] = []
    for name in names:
        parts = name.split("/")
        if parts[-1].endswith("img_val.tar"):
            flat += [
                (f"val/{member.name}", name, member.offset_data, member.size)
                for member in _members(folder, name)
                if VAL_IMAGE.search(member.name)
            ]
        elif "val" in parts[:-1] and name.lower().endswith(IMAGES):
            if "val" in parts[:-2] and SYNSET.fullmatch(parts[-2]):
                yield f"val/{parts[-2]}/{parts[-1]}", name, 0, -1, parts[-2]
            elif VAL_IMAGE.match(parts[-1]):
                flat.append((f"val/{parts[-1]}", name, 0, -1))
    if flat:
        labels = val_labels(folder, names, len(flat))
        for place in sorted(flat):
            image = VAL_IMAGE.search(place[0])
            assert image is not None, "filtered by it"
            if image[0] not in labels:
                raise UserError(f"no label for {place[0]} in the list of validation labels of {folder.url}")
            yield *place, labels[image[0]]


def _check_places(folder: Folder, found: Found, splits: Mapping[str, list[ImageLocation]]) -> None:
    """Count the images that have no place in the layout as left out; refuse two images of one key."""
    places = [place for part in splits.values() for place in part]
    taken = {place[1] for place in places}
    for name in found.names:
        if name not in taken and name.lower().endswith(IMAGES):
            found.ignore("images outside train/SYNSET/ and val/", name)
    first: dict[str, str] = {}
    for key, name, *_ in places:
        if key in first:
            raise UserError(
                f"{folder.url} has {key} twice, in {first[key]} and in {name}: keep the tar or the unpacked folder"
            )
        first[key] = name


def _members(folder: Folder, name: str) -> list[tarfile.TarInfo]:
    """Return the plain files of a tar."""
    try:
        with folder.fs.open(folder.file(name), "rb") as stream:
            return [member for _, member in tar_members(stream) if member.isfile()]
    except TAR_ERRORS as error:
        raise_unanswered(error)
        raise UserError(f"{folder.url}/{name} is truncated or not a tar ({error}): download it again") from error


def _train_tar(folder: Folder, name: str) -> Iterator[ImageLocation]:
    """Yield the images of a tar of tars, by their offset in the outer one."""
    with folder.fs.open(folder.file(name), "rb") as stream:
        for outer, member in tar_members(stream):
            synset = member.name.rsplit("/", 1)[-1].removesuffix(".tar")
            inside = outer.extractfile(member) if member.isfile() and SYNSET.fullmatch(synset) else None
            if inside is None:
                continue
            try:
                for _, image in tar_members(inside):
                    if image.isfile():
                        offset = member.offset_data + image.offset_data
                        yield f"train/{synset}/{image.name}", name, offset, image.size, synset
            except TAR_ERRORS as error:
                raise_unanswered(error)
                where = f"{member.name} in {folder.url}/{name}"
                raise UserError(f"{where} is truncated or not a tar ({error}): download it again") from error


def val_labels(folder: Folder, names: list[str], images: int) -> dict[str, str]:
    """Return the synset of each validation image, by its file name without suffix."""
    for name in names:
        if name.endswith("val_solution.csv"):
            rows = [line.split(",") for line in read_list(folder, name).splitlines()[1:]]
            return {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1]}
    for name in names:
        if name.endswith("synset_labels.txt"):
            synsets = read_list(folder, name).split()
            if len(synsets) < images or not all(map(SYNSET.fullmatch, synsets)):
                raise UserError(
                    f"{folder.url}/{name}: {len(synsets)} lines for {images} images, wanted one synset"
                    " per image, such as n01440764"
                )
            return {f"ILSVRC2012_val_{number + 1:08d}": synset for number, synset in enumerate(synsets)}
    raise UserError(
        f"{folder.url} has validation images without labels: add LOC_val_solution.csv, or"
        " imagenet_2012_validation_synset_labels.txt with one synset per line"
    )


def synset_words(folder: Folder, names: list[str]) -> dict[str, str]:
    """Return the first word of each synset, if a list is there."""
    for name in names:
        if name.endswith(("synset_mapping.txt", "synset_words.txt")):
            lines = [line.partition(" ") for line in read_list(folder, name).splitlines() if line.strip()]
            return {synset: words.split(",")[0].strip() for synset, _, words in lines}
    return {}


source = ImageNet()
