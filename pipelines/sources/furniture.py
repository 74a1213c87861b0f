"""Point clouds of furniture: 92 meshes from the streamlit_sweethome3d package, each turned to many angles.

A cloud is 1,024 points drawn from the surface of an object that is turned about the vertical by a random angle. By
default each object is a class, and its held-out clouds are other points at other angles; with the option
`label=category` the class is one of the catalogue's 8 categories, and whole objects are held out. With `label=size`
there are no classes but three targets, the catalogue's width, depth and height in centimetres, and whole objects are
held out, too: what a model sees has lost its scale, so a size is a guess from the shape.
"""

import functools
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from perceiver.config import UserError
from pipelines.features import Feature, LabelFeature, PointsFeature, TargetFeature
from pipelines.packages import Package, fetch, read_once
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import choice, hold_out, item_seed, number, shuffled_units
from pipelines.transforms import BadSample
from pipelines.transforms.mesh import load_mesh, surface_points
from pipelines.transforms.points import Points

PACKAGE = Package(
    "streamlit_sweethome3d==0.0.6",
    "streamlit_sweethome3d-0.0.6.tar.gz",
    "76fb3aebbf6ed7a57d50fb0f2bba81440f6ed82dacda825685ec6636ea3d72ee",
)
RESOURCES = "streamlit_sweethome3d/frontend/dist/"
CATALOGUE = f"{RESOURCES}lib/resources/DefaultFurnitureCatalog.json"
POINTS = 1024
SIDES = ("width", "depth", "height")
LICENCE = "models by eTeks, Scopia and others: CC-BY 3.0 or GPL, see the header of each file"


class FurnitureMesh(NamedTuple):
    """One object: file name, category and size (width, depth, height in cm) in the catalogue, and mesh."""

    name: str
    category: str
    size: tuple[float, ...]
    mesh: bytes


@read_once
def read_archive(path: str) -> list[FurnitureMesh]:
    """Return the objects with a mesh, each mesh once, in the catalogue's order."""
    try:
        with tarfile.open(path) as archive:
            files = {member.name.split("/", 1)[-1]: member for member in archive.getmembers() if member.isfile()}
            catalogue = json.loads(_content(archive, files[CATALOGUE]))
            pieces: dict[str, FurnitureMesh] = {}
            for entry in sorted(int(key.split("#")[1]) for key in catalogue if key.startswith("model#")):
                place = catalogue[f"model#{entry}"].split("!/")
                member = files.get(RESOURCES + place[0])
                if member and len(place) == 2 and place[1].endswith(".obj") and place[0] not in pieces:
                    with zipfile.ZipFile(io.BytesIO(_content(archive, member))) as inner:
                        mesh = inner.read(place[1])
                    if b"\nf " in mesh:  # Light sources have no faces.
                        size = tuple(float(catalogue[f"{side}#{entry}"]) for side in SIDES)
                        name, category = place[1].removesuffix(".obj"), catalogue[f"category#{entry}"]
                        pieces[place[0]] = FurnitureMesh(name, category, size, mesh)
    except (tarfile.TarError, zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{path} does not contain the furniture catalogue ({error}): wanted the file {PACKAGE.file}"
        ) from error
    return list(pieces.values())


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None, "a plain file"
    return stream.read()


@functools.lru_cache(maxsize=128)
def _mesh(encoded: bytes) -> Any:
    return load_mesh(encoded, "obj")


def cloud(mesh: bytes, seed: int) -> Points:
    """Return points (1024, 3) on a mesh turned about the vertical (y) by a random angle, or raise `BadSample`."""
    points = surface_points(_mesh(mesh), POINTS, seed)
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    return np.asarray(points @ turn.T, "<f4")


class Furniture:
    """The source.

    Options: `label` (object, category or size), `clouds` and `held_out` (clouds per object, 40 and 10).
    """

    title = "92 pieces of furniture as clouds of 1,024 points (meshes in the streamlit_sweethome3d package)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the clouds to draw; `src` is a copy of the package's file, downloaded if None."""
        refuse_options(options, ("label", "clouds", "held_out"))
        pieces = read_archive(str(fetch(PACKAGE, src)))
        kind = choice(options, "label", ("object", "category", "size"), "object")
        clouds, held_out = number(options, "clouds", 40), number(options, "held_out", 10)
        if kind == "object":
            classes = tuple(piece.name for piece in pieces)
            splits = {
                "train": [(row, row, view) for row in range(len(pieces)) for view in range(clouds)],
                "test": [(row, row, clouds + view) for row in range(len(pieces)) for view in range(held_out)],
            }
        else:
            classes = tuple(sorted({piece.category for piece in pieces}))
            splits = _by_category(pieces, classes, {"train": clouds, "test": held_out}, seed)
        what: Mapping[str, Feature] = {"label": LabelFeature()}
        if kind == "size":
            classes, what = (), {"target": TargetFeature(names=SIDES)}
        units = shuffled_units(splits, random.Random(seed), shard_rows, path=src, seed=seed, kind=kind)
        features = {"points": PointsFeature(), **what}
        origin = f"{PACKAGE.requirement}, {CATALOGUE}"
        return Listing(f"furniture_{kind}", features, classes, LICENCE, origin, units)

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Draw the unit's clouds."""
        pieces = read_archive(str(fetch(PACKAGE, unit.content["path"])))
        for row, label, view in unit.content["items"]:
            key = f"{pieces[row].name}/{view}"
            try:
                points = cloud(pieces[row].mesh, item_seed(unit.content["seed"], key))
                known = {"target": list(pieces[row].size)} if unit.content.get("kind") == "size" else {"label": label}
                yield {"key": key, "points": points.tobytes(), **known}
            except BadSample as error:
                yield Rejected(key, str(error))


def _by_category(
    pieces: list[FurnitureMesh], classes: tuple[str, ...], views: Mapping[str, int], seed: int
) -> dict[str, list[tuple[int, int, int]]]:
    """Hold out a fifth of the objects of each category, with all their clouds."""
    rng = random.Random(seed)
    splits: dict[str, list[tuple[int, int, int]]] = {split: [] for split in views}
    for label, category in enumerate(classes):
        rows = [row for row, piece in enumerate(pieces) if piece.category == category]
        for split, members in hold_out(rows, 0.2, rng).items():
            splits[split] += [(row, label, view) for row in members for view in range(views[split])]
    return splits


source = Furniture()
