"""Meshes: points drawn from their surface by area, as in point-cloud data sets."""

import io
import re
from codecs import BOM_UTF8
from typing import TYPE_CHECKING

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


def load_mesh(encoded: bytes, kind: str) -> "Trimesh":
    """Read a mesh file of the format `off` or `obj`.

    Raises:
        BadSample: 0 bytes, not a mesh, too large, without faces or area, with NaN or infinite vertices, or with
            faces of missing vertices.
    """
    encoded = encoded.removeprefix(BOM_UTF8)
    _check_header(encoded, kind)
    import trimesh

    try:
        mesh = trimesh.load_mesh(io.BytesIO(encoded), file_type=kind, process=False)
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


def surface_points(mesh: "Trimesh", count: int, seed: int) -> Points:
    """Return points (count, 3) on the surface of a mesh, uniform over its area and determined by the seed."""
    from trimesh.sample import sample_surface

    return np.asarray(sample_surface(mesh, count, seed=seed)[0], "<f4")


def _check_header(encoded: bytes, kind: str) -> None:
    if not encoded:
        raise BadSample("0 bytes")
    if len(encoded) > MAX_MESH_BYTES:
        raise BadSample(f"{len(encoded)} bytes are more than {MAX_MESH_BYTES}")
    if kind == "off":
        counts = COUNTS.match(encoded[:4096])
        if not counts:
            raise BadSample("not an OFF mesh: no header OFF with the numbers of vertices and faces")
        if max(int(counts[1]), int(counts[2])) > MAX_VERTICES:
            raise BadSample(f"more than {MAX_VERTICES} vertices or faces in the header")
