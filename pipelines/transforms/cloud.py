"""Files of point clouds and meshes to points: text, NumPy arrays, PLY, OFF, OBJ, STL."""

import io
import math
import zipfile
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection
from typing import Any

import numpy as np

from perceiver.storage import first_line
from pipelines.transforms import BadSample
from pipelines.transforms.mesh import is_cloud, load_cloud, load_mesh, surface_points
from pipelines.transforms.points import Points, decode_points

MESHES = (".off", ".obj", ".stl", ".ply")
ARRAYS = (".npy", ".npz")
TEXTS = (".txt", ".xyz", ".pts", ".csv")
MAX_ARRAY = 512 << 20
"""Bytes of an array in a .npz after decompression."""


def read_points(name: str, encoded: bytes, count: int, seed: int, features: int = 0) -> Points:
    """Return the points of a file.

    Args:
        name: its name; the ending is the format.
        encoded: its bytes.
        count: points drawn from the surface of a mesh.
        seed: of these.
        features: columns after x, y, z. Of a mesh there are three, the normals of its faces.

    Returns:
        float32 (n, 3 + features): those drawn from a mesh, or all that are stored.

    Raises:
        BadSample: the file is damaged, too large, or has too few columns.
    """
    kind = "." + name.rsplit(".", 1)[-1].lower()
    if kind not in ARRAYS and encoded.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise BadSample("UTF-16, wanted UTF-8")
    if kind in MESHES and not (kind == ".ply" and is_cloud(encoded)):
        if features not in (0, 3):
            raise BadSample(f"a mesh, which has 0 or 3 features (normals), wanted {features}")
        return surface_points(load_mesh(encoded, kind[1:]), count, seed, normals=features == 3)
    if not encoded:
        raise BadSample("0 bytes")
    try:
        values = _read_rows(kind, encoded)
        if values.shape[1] < 3 + features:
            raise BadSample(f"{values.shape[1]} columns, wanted x, y, z" + f" and {features} features" * bool(features))
        points = np.ascontiguousarray(values[:, : 3 + features], "<f4")
    except (ValueError, IndexError, TypeError, OverflowError) as error:
        raise BadSample(f"no rows of x, y, z: {first_line(error, 80)}") from error
    return decode_points(points.tobytes(), 3 + features)


def _read_rows(kind: str, encoded: bytes) -> Any:
    """Return an array (n, columns), or raise `ValueError`."""
    match kind:
        case ".npy":
            return read_npy(encoded)
        case ".npz":
            return _read_npz(encoded)
        case ".ply":
            return load_cloud(encoded)
    text = encoded.removeprefix(BOM_UTF8)
    lines = text.splitlines()
    first = lines[0].replace(b",", b" ").split() if lines else []
    # The first line of a CSV names the columns; that of a .pts or .xyz may be the number of points.
    skipped = int(len(first) == 1 or not all(map(_is_number, first)))
    if not any(line.strip() for line in lines[skipped:]):
        raise ValueError("no rows")
    return np.loadtxt(io.BytesIO(text), delimiter="," if b"," in text[:256] else None, ndmin=2, skiprows=skipped)


def _is_number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_npy(encoded: bytes, dimensions: Collection[int] = (2,)) -> Any:
    """Return the array of numbers in a .npy file; memory is allocated for what is there only.

    Raises:
        ValueError: the file is damaged, or has objects or another number of dimensions.
    """
    stream = io.BytesIO(encoded)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the .npy format")
        shape, columns_first, kind = readers[version](stream)
    except Exception as error:  # the header is parsed as Python literals, which raises a dozen types
        raise ValueError(f"a damaged header: {first_line(error, 80)}") from error
    content = memoryview(encoded)[stream.tell() :]
    if kind.kind not in "fiu" or len(shape) not in dimensions or math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(f"{shape} x {kind} in the header, {len(content)} bytes follow")
    return np.frombuffer(content, kind).reshape(shape, order="F" if columns_first else "C")


def _read_npz(encoded: bytes) -> Any:
    """Return the array `points` of a .npz, or the only one, or raise `ValueError`."""
    try:
        with zipfile.ZipFile(io.BytesIO(encoded)) as archive:
            names = archive.namelist()
            name = "points.npy" if "points.npy" in names else names[0] if len(names) == 1 else ""
            if not name:
                raise ValueError(f"arrays {', '.join(names[:8])}, wanted one, or one called points")
            if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("a compression that NumPy does not write")
            with archive.open(name) as member:
                content = member.read(MAX_ARRAY + 1)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"not a .npz: {first_line(error, 80)}") from error
    if len(content) > MAX_ARRAY:
        raise ValueError(f"an array of more than {MAX_ARRAY} bytes")
    return read_npy(content)
