"""Meshes: points drawn from their surface by area, as in point-cloud data sets."""

import io
import re
from codecs import BOM_UTF8
from typing import TYPE_CHECKING, Any

import numpy as np

from perceiver.storage import first_line
from pipelines.transforms import BadSample
from pipelines.transforms.points import Points

if TYPE_CHECKING:
    from trimesh import Trimesh

MAX_MESH_BYTES = 64 << 20
"""Larger files are refused; reading one takes about thirty times as much memory."""
MAX_VERTICES = 5_000_000
"""Larger meshes are refused by their header, where the format has one."""
COUNTS = re.compile(rb"\s*C?OFF\s*(?:#[^\n]*\n\s*)*(\d+)\s+(\d+)")

ELEMENTS = re.compile(rb"element[ \t]+(vertex|face)[ \t]+(\d+)")
HEADER = 4096
"""Bytes of a file in which its header is looked for."""


def load_mesh(encoded: bytes, kind: str) -> "Trimesh":
    """Read a mesh file of the format `off`, `obj`, `stl` or `ply`.

    Raises:
        BadSample: 0 bytes, not a mesh, too large, without faces or area, with NaN or infinite vertices, or with
            faces of missing vertices.
    """
    encoded = encoded.removeprefix(BOM_UTF8)
    _check_header(encoded, kind)
    import trimesh

    try:
        mesh = trimesh.load_mesh(io.BytesIO(encoded), file_type=kind, process=False, skip_materials=True)
        assert isinstance(mesh, trimesh.Trimesh), "load_mesh joins the parts of a scene"
        vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    except Exception as error:  # noqa: BLE001  the readers raise many types on damaged lines
        raise BadSample(f"unreadable {kind} mesh: {first_line(error, 80)}") from error
    if not len(vertices) or not len(faces):
        raise BadSample("a mesh without faces")
    if not np.isfinite(vertices).all():
        raise BadSample("NaN or infinite vertices")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise BadSample(f"a face with a vertex outside the range of {len(vertices)} vertices")
    if not mesh.area > 0:
        raise BadSample("a mesh without area")
    return mesh


def is_cloud(encoded: bytes) -> bool:
    """Return whether a PLY file has no faces."""
    return not any(int(count) for what, count in ELEMENTS.findall(encoded[:HEADER]) if what == b"face")


def load_cloud(encoded: bytes) -> Points:
    """Read the vertices (n, 3) of a PLY file without faces; raise `BadSample` if it is damaged or too large."""
    encoded = encoded.removeprefix(BOM_UTF8)
    _check_header(encoded, "ply")
    import trimesh

    try:
        cloud: Any = trimesh.load(io.BytesIO(encoded), file_type="ply", process=False, skip_materials=True)
        return np.asarray(cloud.vertices, "<f4")
    except Exception as error:  # noqa: BLE001  as in `load_mesh`
        raise BadSample(f"unreadable ply cloud: {first_line(error, 80)}") from error


def surface_points(mesh: "Trimesh", count: int, seed: int, *, normals: bool = False) -> Points:
    """Return points on the surface of a mesh, uniform over its area and determined by the seed.

    Returns:
        float32 (count, 3), or (count, 6) with the normals of their faces.
    """
    from trimesh.sample import sample_surface

    points, faces = sample_surface(mesh, count, seed=seed)[:2]
    return np.asarray(np.hstack([points, mesh.face_normals[faces]]) if normals else points, "<f4")


def _check_header(encoded: bytes, kind: str) -> None:
    if not encoded:
        raise BadSample("0 bytes")
    if len(encoded) > MAX_MESH_BYTES:
        raise BadSample(f"{len(encoded)} bytes are more than {MAX_MESH_BYTES}")
    if kind == "off":
        counts = COUNTS.match(encoded[:HEADER])
        if not counts:
            raise BadSample("not an OFF mesh: no header OFF with the numbers of vertices and faces")
        _check_counts(counts[1], counts[2])
    if kind == "ply":
        _check_counts(*(count for _, count in ELEMENTS.findall(encoded[:HEADER])))


def _check_counts(*counts: bytes) -> None:
    if any(len(count) > 20 or int(count) > MAX_VERTICES for count in counts):
        raise BadSample(f"more than {MAX_VERTICES} vertices or faces in the header")
