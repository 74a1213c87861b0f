"""Folders of point clouds or meshes with a folder per class, or with a table of labels.

Stored are the points: all of a cloud, or some that are drawn from the surface of a mesh by area.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from perceiver.storage import Folder
from pipelines.features import Feature, PointsFeature
from pipelines.sources._class_folder import ClassFolder
from pipelines.sources._common import number
from pipelines.transforms.cloud import ARRAYS, MESHES, TEXTS, read_points


def _probe(folder: Folder, names: Sequence[str], options: Mapping[str, str]) -> tuple[str, Feature]:
    number(options, "points", 2048)
    return "points", PointsFeature(features=number(options, "features", 0, least=0))


def _read(name: str, encoded: bytes, options: Mapping[str, str], seed: int) -> Any:
    count, features = number(options, "points", 2048), number(options, "features", 0, least=0)
    return read_points(name, encoded, count, seed, features).tobytes()


source = ClassFolder(
    name="points_folder",
    title="folders of point clouds or meshes, one folder per class (SRC/CLASS/*.ply, obj, stl, npy, txt, ...)",
    suffixes=(*MESHES, *ARRAYS, *TEXTS),
    options=("points", "features"),
    probe=_probe,
    read=_read,
)
"""Further options: `points` (drawn from a mesh, 2,048), `features` (columns after x, y, z, 0; of a mesh 3: normals)."""
