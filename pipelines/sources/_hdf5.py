"""Point clouds in HDF5 files as in `modelnet40_ply_hdf5_2048`: `data` (n, points, 3) and `label` (n, 1)."""

from collections.abc import Mapping

import h5py
import numpy as np

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, raise_unanswered
from pipelines.sources._common import MAX_FILE, numbered_classes, read_list
from pipelines.sources._layout import splits_of_files
from pipelines.transforms import BadSample
from pipelines.transforms.points import Points, decode_points

SUFFIXES = (".h5", ".hdf5")
NAMES = "shape_names.txt"
ARRAYS = ("data", "label")

Row = tuple[str, int]
"""`FILE#ROW` relative to the folder, and the class."""


def find_rows(
    folder: Folder, found: list[str], options: Mapping[str, str]
) -> tuple[list[str], dict[str, list[Row]]] | None:
    """Return class names in order, and each split's rows, see `_layout.splits_of_files`; None without files.

    The class names are in `shape_names.txt`, one per line; without it they are numbers.

    Args:
        folder: the source folder.
        found: its files.
        options: of the source.

    Raises:
        UserError: a file is not HDF5, lacks an array, or its arrays do not match.
    """
    files = [name for name in found if name.lower().endswith(SUFFIXES)]
    if not files:
        return None
    splits: dict[str, list[Row]] = {
        split: [(f"{name}#{row}", label) for name in names for row, label in enumerate(_labels(folder, name))]
        for split, names in splits_of_files(folder, files, options).items()
    }
    labels = sorted({label for rows in splits.values() for _, label in rows})
    lists = [name for name in found if name.endswith(NAMES)]
    if not labels:
        raise UserError(f"{folder.url}: the HDF5 files have no rows")
    lines = read_list(folder, lists[0]).split("\n") if lists else []
    names = (
        [line.strip() for line in lines if line.strip()]
        if lists
        else numbered_classes(labels[-1], f"{folder.url}: {ARRAYS[1]}")
    )
    if not 0 <= labels[0] <= labels[-1] < len(names):
        raise UserError(
            f"{folder.url}/{lists[0]} names {len(names)} classes, the files have labels {labels[0]} to"
            f" {labels[-1]}: wanted one line per class"
        )
    return names, splits


def _labels(folder: Folder, name: str) -> list[int]:
    try:
        with folder.fs.open(folder.file(name), "rb") as stream, h5py.File(stream, "r") as file:
            data, label = (file.get(array) for array in ARRAYS)
            if not isinstance(data, h5py.Dataset) or not isinstance(label, h5py.Dataset):
                raise UserError(
                    f"{folder.url}/{name} has the arrays {', '.join(file) or 'none'}: wanted"
                    f" {' and '.join(ARRAYS)} of shapes (n, points, 3) and (n, 1)"
                )
            shape = data.shape
            sizes = {"label": label.nbytes, "a row of data": data.nbytes // max(1, shape[0] if shape else 1)}
            for what, size in sizes.items():
                if size > MAX_FILE:
                    raise UserError(f"{folder.url}/{name}: {what} has {size:,} bytes, more than {MAX_FILE:,}")
            labels = np.asarray(label[()]).ravel()
    except OSError as error:
        raise UserError(f"{folder.url}/{name} is not a readable HDF5 file: {first_line(error, 80)}") from error
    if len(shape) != 3 or shape[2] < 3 or shape[0] != labels.size or labels.dtype.kind not in "ui":
        raise UserError(
            f"{folder.url}/{name}: data is {shape}, label {labels.size} x {labels.dtype}: wanted"
            " (n, points, 3) and n whole numbers"
        )
    return labels.tolist()


class Hdf5Rows:
    """Reads rows of a folder's HDF5 files and keeps the files open."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._files: dict[str, h5py.File] = {}

    def __enter__(self) -> "Hdf5Rows":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, row: str) -> Points:
        """Return the points (n, 3) of one row, or raise `BadSample` if they are damaged or not finite."""
        name, number = row.rsplit("#", 1)
        try:
            if name not in self._files:
                self._files[name] = h5py.File(self.folder.fs.open(self.folder.file(name), "rb"), "r")
            data = self._files[name]["data"]
            assert isinstance(data, h5py.Dataset), "_labels() is called first"
            values = np.ascontiguousarray(data[int(number), :, :3], "<f4")
        except (OSError, ValueError, KeyError) as error:
            raise_unanswered(error)
            raise BadSample(f"unreadable: {first_line(error, 80)}") from error
        return decode_points(values.tobytes())


def is_row(name: str) -> bool:
    """Return whether an item is a row, `FILE.h5#ROW`."""
    return name.rsplit("#", 1)[0].lower().endswith(SUFFIXES) and "#" in name
