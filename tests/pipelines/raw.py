"""Raw files of the public formats, written by hand: meshes, flows, tars. Nothing of the code under test is used."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
SIDES = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def off(corners: np.ndarray = CORNERS, joined: bool = False) -> bytes:
    """Return a box as an OFF mesh of four-cornered faces; `joined` gives it the header of many files of ModelNet40."""
    lines = [f"OFF{'' if joined else chr(10)}{len(corners)} {len(SIDES)} 0"]
    lines += [" ".join(map(str, corner)) for corner in corners]
    lines += ["4 " + " ".join(map(str, side)) for side in SIDES]
    return ("\n".join(lines) + "\n").encode()


def flo(flow: np.ndarray) -> bytes:
    """Encode flow (H, W, 2) as a Middlebury .flo file."""
    height, width = flow.shape[:2]
    return struct.pack("<fii", 202021.25, width, height) + flow.astype("<f4").tobytes()


def png16(pixels: np.ndarray, claimed: tuple[int, int] | None = None) -> bytes:
    """Encode 16-bit RGB (H, W, 3) as a PNG, whose header may claim another (height, width)."""
    height, width = claimed or pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def kitti(flow: np.ndarray, valid: np.ndarray) -> bytes:
    """Encode flow (H, W, 2) and validity (H, W) as KITTI stores them."""
    scaled = np.round(flow * 64 + 2**15)
    return png16(np.concatenate([scaled, valid[..., None]], axis=2).astype(np.uint16))


def tar(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """Return a tar of plain files, in order; a `TarInfo` is added as it is."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            info.size = len(content) if isinstance(content, bytes) else 0
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return stream.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """Return a link as a member of a tar."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder and return it."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make_irregular(path: Path, kind: str, elsewhere: Path) -> None:
    """Move a file elsewhere, and leave a `link` to it, a `fifo` or a `folder` in its place."""
    path.rename(elsewhere)
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
