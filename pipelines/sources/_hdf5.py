"""Point clouds in HDF5 files, as `modelnet40_ply_hdf5_2048` holds them: `data` (n, points, 3) and `label` (n, 1)."""

import h5py
import numpy as np

from perceiver.config import UserError
from perceiver.storage import Folder, first_line
from pipelines.sources._common import find_files
from pipelines.transforms import BadSample
from pipelines.transforms.points import Points, decode

SUFFIXES = (".h5", ".hdf5")
NAMES = "shape_names.txt"
ARRAYS = ("data", "label")

Row = tuple[str, int]
"""`FILE#ROW` relative to the folder, and the class."""


def find_rows(folder: Folder) -> tuple[list[str], dict[str, list[Row]]] | None:
    """Class names in order, and the rows of each split (by `train` or `test` in the file's name); None without files.

    The class names stand in `shape_names.txt`, one a line; without it they are numbers.

    Raises:
        UserError: a file is no HDF5, lacks an array, or its arrays do not fit each other.
    """
    files = find_files(folder, SUFFIXES)
    if not files:
        return None
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for name in files:
        rows = [(f"{name}#{row}", label) for row, label in enumerate(_labels(folder, name))]
        splits["test" if "test" in name.rsplit("/", 1)[-1].lower() else "train"] += rows
    labels = sorted({label for rows in splits.values() for _, label in rows})
    lists = find_files(folder, (NAMES,))
    names = folder.read_text(lists[0]).split() if lists else [str(label) for label in range(labels[-1] + 1)]
    if not 0 <= labels[0] <= labels[-1] < len(names):
        raise UserError(
            f"{folder.url}/{lists[0]} names {len(names)} classes, the files hold labels {labels[0]} to"
            f" {labels[-1]}: wanted one line for each"
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
            shape, labels = data.shape, np.asarray(label[()]).ravel()
    except OSError as error:
        raise UserError(f"{folder.url}/{name} is no readable HDF5 file: {str(error).splitlines()[0][:80]}") from error
    if len(shape) != 3 or shape[2] < 3 or shape[0] != labels.size or labels.dtype.kind not in "ui":
        raise UserError(
            f"{folder.url}/{name}: data is {shape}, label {labels.size} x {labels.dtype}: wanted"
            " (n, points, 3) and n whole numbers"
        )
    return labels.tolist()


class Rows:
    """The rows of a folder's files, which stay open in between."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._files: dict[str, h5py.File] = {}

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, row: str) -> Points:
        """Points (n, 3) of one row.

        Raises:
            BadSample: the file is damaged there, or the points are not finite.
        """
        name, number = row.rsplit("#", 1)
        try:
            if name not in self._files:
                self._files[name] = h5py.File(self.folder.fs.open(self.folder.file(name), "rb"), "r")
            data = self._files[name]["data"]
            assert isinstance(data, h5py.Dataset), "_labels() was asked first"
            values = np.ascontiguousarray(data[int(number), :, :3], "<f4")
        except (OSError, ValueError, KeyError) as error:
            raise BadSample(f"unreadable: {first_line(error, 80)}") from error
        return decode(values.tobytes())


def is_row(name: str) -> bool:
    """Whether an item's name is that of a row, `FILE.h5#ROW`."""
    return name.rsplit("#", 1)[0].lower().endswith(SUFFIXES) and "#" in name
