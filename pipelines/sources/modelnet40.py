"""ModelNet40 (Wu et al. 2015) or any data set in its layouts: objects as meshes or as point clouds.

Meshes: `SRC/CLASS/train/*.off` with `SRC/CLASS/test/*.off`, as in the Princeton archive; points are drawn from the
surface by area. Point clouds: `SRC/CLASS/NAME.txt` (x, y, z and optional normals, with commas) and lists `*_train.txt`
and `*_test.txt` of names, as in `modelnet40_normal_resampled`; or `.npy` arrays (n, 3 or more) in either layout; or
HDF5 files `*train*.h5` and `*test*.h5`, as in `modelnet40_ply_hdf5_2048` (`_hdf5`).
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder, raise_unanswered
from pipelines.features import LabelFeature, PointsFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, _hdf5, refuse_options
from pipelines.sources._common import base_name, item_seed, number, read_list, shuffled_units, source_folder
from pipelines.sources._files import Found, look
from pipelines.sources._layout import (
    ClassFiles,
    Labelled,
    check_classes,
    class_files,
    class_notes,
    hold_out_classes,
    split_notes,
)
from pipelines.transforms import BadSample
from pipelines.transforms.cloud import read_points
from pipelines.transforms.points import Points

LISTS = {"train": "_train.txt", "test": "_test.txt"}
WANTED = "CLASS/train/*.off with CLASS/test/*.off, or CLASS/*.txt with lists *_train.txt and *_test.txt; or *train*.h5"

OBJECTS = (".off", ".npy", ".txt")
SUFFIXES = (*OBJECTS, *_hdf5.SUFFIXES)
OPTIONS = ("points", "held_out", "splits")
LICENCE = "ModelNet: for academic research, copyright of the models with their authors"
# fmt: off
CLASSES = {
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup",
    "curtain", "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop",
    "mantel", "monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa",
    "stairs", "stool", "table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
}
# fmt: on
"""Of ModelNet40."""


class ModelNet40:
    """The source.

    Options: `points` (drawn from each mesh, 2,048), `held_out` (share of each class, 0.2 if no name states a split),
    `splits` (`names` or `none`, see `_layout.class_files`).
    """

    title = "ModelNet40 and similar data: OFF meshes (SRC/CLASS/train/*.off) or point clouds (.txt, .npy, .h5)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the objects below `src`."""
        refuse_options(options, OPTIONS)
        folder = source_folder("modelnet40", src, WANTED)
        found = look(folder, SUFFIXES)
        rng = random.Random(seed)
        files = hold_out_classes(find_objects(folder, found, options), folder, options, "0.2", rng)
        content = {"src": folder.url, "seed": seed, "points": number(options, "points", 2048)}
        return Listing(
            name=base_name(folder.url),
            features={"points": PointsFeature(), "label": LabelFeature()},
            classes=tuple(files.classes),
            licence=LICENCE if is_modelnet(files) else "not stated: the user's own data",
            origin=folder.url,
            units=shuffled_units(files.splits, rng, shard_rows, **content),
            notes=(*files.notes, *found.notes()),
            rejected=tuple(found.rejected),
            versions=_versions(found, files),
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Draw or read the points of each object."""
        content = unit.content
        folder = open_folder(content["src"])
        with _hdf5.Hdf5Rows(folder) as rows:
            for name, label in content["items"]:
                try:
                    points = rows.read(name) if _hdf5.is_row(name) else self._points(folder, name, content)
                    yield {"key": name, "points": points.tobytes(), "label": label}
                except (BadSample, OSError) as error:
                    raise_unanswered(error)
                    yield Rejected(name, str(error))

    @staticmethod
    def _points(folder: Folder, name: str, content: Mapping[str, Any]) -> Points:
        encoded = folder.fs.cat_file(folder.file(name))
        return read_points(name, encoded, content["points"], item_seed(content["seed"], name))


def is_modelnet(files: ClassFiles) -> bool:
    """Return whether classes and files have ModelNet40's names, such as `chair_0001.off`."""
    if not set(files.classes) <= CLASSES:
        return False
    stems = (
        (files.classes[label], name.rsplit("/", 1)[-1].rsplit(".", 1)[0])
        for objects in files.splits.values()
        for name, label in objects
        if isinstance(label, int) and not _hdf5.is_row(name)
    )
    return all(re.fullmatch(rf"{label}_\d{{4}}", stem) for label, stem in stems)


def find_objects(folder: Folder, found: Found, options: Mapping[str, str]) -> ClassFiles:
    """Return the classes and the objects of each split: by HDF5 files, by lists of names, or by folders."""
    if rows := _hdf5.find_rows(folder, found.names, options):
        for name in found.names:
            if name.lower().endswith(OBJECTS) and not name.endswith(_hdf5.NAMES):
                found.ignore("files next to HDF5 files", name)
        return ClassFiles(*rows, (*class_notes(rows[0]), *split_notes(_names(rows[1]), 0, "object")))
    members = list(_listed(folder, found))
    if not members:
        found.names = [name for name in found.names if name.lower().endswith(OBJECTS)]
        if not found.names:
            raise UserError(f"no objects below {folder.url}: wanted {WANTED}")
        return class_files(folder, found, options)
    classes = sorted({label for _, label, _ in members})
    splits = {
        split: [(name, classes.index(label)) for part, label, name in members if part == split] for split in LISTS
    }
    if not splits["train"]:
        raise UserError(f"the lists of {folder.url} name no objects to train on: wanted {WANTED}")
    check_classes(folder, classes, splits)
    splits = {split: objects for split, objects in splits.items() if objects}
    return ClassFiles(classes, splits, (*class_notes(classes), *split_notes(_names(splits), 0, "object")))


def _versions(found: Found, files: ClassFiles) -> dict[str, str]:
    """Return the versions of the files by name, and of HDF5 files also by their rows."""
    rows = [name for objects in files.splits.values() for name, _ in objects if _hdf5.is_row(name)]
    return found.versions | {row: found.versions[row.rsplit("#", 1)[0]] for row in rows}


def _names(splits: Mapping[str, Sequence[Labelled]]) -> dict[str, list[str]]:
    return {split: [name for name, _ in objects] for split, objects in splits.items()}


def _listed(folder: Folder, found: Found) -> Iterator[tuple[str, str, str]]:
    """Yield (split, class, file) by the lists of names at the top; a name without a file is rejected."""
    files: dict[str, list[str]] = {}
    for path in (name for name in found.names if "/" in name and name.lower().endswith(OBJECTS)):
        stem, file = path.rsplit(".", 1)[0], path.rsplit("/", 1)[-1]
        for name in {file.rsplit(".", 1)[0], file, "/".join(stem.split("/")[-2:]), "/".join(path.split("/")[-2:])}:
            files.setdefault(name, []).append(path)
    split_of: dict[str, str] = {}
    listed = False
    for split, ending in LISTS.items():
        # There are lists for ModelNet10, too: the longest one has all classes.
        lists = [
            read_list(folder, name).split("\n") for name in found.names if "/" not in name and name.endswith(ending)
        ]
        listed |= bool(lists)
        for entry in filter(None, map(str.strip, max(lists, key=len, default=[]))):
            paths = files.get(entry, [])
            if len(paths) != 1:
                why = "without a file" if not paths else f"of {len(paths)} files, such as {paths[0]}"
                found.rejected.append(Rejected(entry, f"in the list of {split}, but {why}"))
            elif split_of.setdefault(paths[0], split) != split:
                raise UserError(
                    f"{folder.url}: {entry} is in the lists of {split_of[paths[0]]} and {split}: remove one"
                )
            else:
                yield split, paths[0].split("/")[-2], paths[0]
    for name in found.names if listed else ():
        if "/" in name and name not in split_of and name.lower().endswith(OBJECTS):
            found.ignore("objects in no list", name)


source = ModelNet40()
