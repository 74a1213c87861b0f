"""ModelNet40 (Wu et al. 2015) or any data set in its layouts: objects as meshes or as point clouds.

Meshes: `SRC/CLASS/train/*.off` with `SRC/CLASS/test/*.off`, as in the Princeton archive; points are drawn from the
surface by area. Point clouds: `SRC/CLASS/NAME.txt` (x, y, z and optional normals, with commas) and lists `*_train.txt`
and `*_test.txt` of names, as in `modelnet40_normal_resampled`; or `.npy` arrays (n, 3 or more) in either layout; or
HDF5 files `*train*.h5` and `*test*.h5`, as in `modelnet40_ply_hdf5_2048` (`_hdf5`).
"""

import io
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, raise_unanswered
from pipelines.features import LabelFeature, PointsFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, _hdf5, refuse_options
from pipelines.sources._common import base_name, find_files, item_seed, number, shuffled_units, source_folder
from pipelines.transforms import BadSample
from pipelines.transforms.mesh import load_mesh, surface_points
from pipelines.transforms.points import Points, decode_points

LISTS = {"train": "_train.txt", "test": "_test.txt"}
WANTED = "CLASS/train/*.off with CLASS/test/*.off, or CLASS/*.txt with lists *_train.txt and *_test.txt; or *train*.h5"

Labelled = tuple[str, int]
"""A file relative to the source folder and its class."""


class ModelNet40:
    """The source. Option `points`: the number of points drawn from each mesh (default 2,048)."""

    title = "ModelNet40 and similar data: OFF meshes (SRC/CLASS/train/*.off) or point clouds (.txt, .npy, .h5)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the objects below `src`."""
        refuse_options(options, ("points",))
        folder = source_folder("modelnet40", src, WANTED)
        classes, splits = _hdf5.find_rows(folder) or find_objects(folder)
        units = shuffled_units(
            splits, random.Random(seed), shard_rows, src=folder.url, seed=seed, points=number(options, "points", 2048)
        )
        features = {"points": PointsFeature(), "label": LabelFeature()}
        licence = "ModelNet: for academic research, copyright of the models with their authors"
        return Listing(base_name(folder.url), features, tuple(classes), licence, folder.url, units)

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


def read_points(name: str, encoded: bytes, count: int, seed: int) -> Points:
    """Return the points (n, 3) of one file, drawn from a mesh or all that are stored, or raise `BadSample`."""
    suffix = name.rsplit(".", 1)[-1].lower()
    if suffix == "off":
        return surface_points(load_mesh(encoded, "off"), count, seed)
    if not encoded:
        raise BadSample("0 bytes")
    try:
        if suffix == "npy":
            values = _read_npy(encoded)
        else:
            values = np.loadtxt(io.BytesIO(encoded), delimiter="," if b"," in encoded[:256] else None, ndmin=2)
        points = np.ascontiguousarray(values[:, :3], "<f4")
    except (ValueError, IndexError, TypeError, OverflowError) as error:
        raise BadSample(f"no rows of x, y, z: {first_line(error, 80)}") from error
    return decode_points(points.tobytes())


def _read_npy(encoded: bytes) -> Any:
    """Return the array of numbers in a .npy file, or raise `ValueError`; memory is allocated for what is there only."""
    stream = io.BytesIO(encoded)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, columns_first, kind = readers[version](stream)
    content = memoryview(encoded)[stream.tell() :]
    if kind.kind not in "fiu" or len(shape) != 2 or math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(f"{shape} x {kind} in the header, {len(content)} bytes follow")
    return np.frombuffer(content, kind).reshape(shape, order="F" if columns_first else "C")


def find_objects(folder: Folder) -> tuple[list[str], dict[str, list[Labelled]]]:
    """Return class names in order, and the files of each split."""
    names = find_files(folder, (".off", ".npy", ".txt"))
    inner = [name.split("/") for name in names if name.count("/") >= 1]
    by_folder = [parts for parts in inner if len(parts) >= 3 and parts[-2] in LISTS]
    if by_folder:
        found = [(parts[-2], parts[-3], "/".join(parts)) for parts in by_folder]
    else:
        found = list(_listed(folder, names))
    classes = sorted({label for _, label, _ in found})
    splits = {split: [(name, classes.index(label)) for part, label, name in found if part == split] for split in LISTS}
    if not splits["train"]:
        raise UserError(f"no objects below {folder.url}: wanted {WANTED}")
    return classes, {split: members for split, members in splits.items() if members}


def _listed(folder: Folder, names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (split, class, file) by the lists of names at the top; a name without a file is left out."""
    files = {name.rsplit("/", 1)[-1].rsplit(".", 1)[0]: name for name in names if "/" in name}
    for split, ending in LISTS.items():
        # There are lists for ModelNet10, too: the longest one has all classes.
        lists = [folder.read_text(name).split() for name in names if "/" not in name and name.endswith(ending)]
        for entry in max(lists, key=len, default=[]):
            if entry in files:
                yield split, files[entry].split("/")[-2], files[entry]


source = ModelNet40()
