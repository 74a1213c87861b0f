"""Raw data from outside: special files, bombs and disguised programs are refused or quarantined, quickly."""

import gzip
import io
import os
import socket
import struct
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from perceiver.cli import inspect as inspect_verb
from perceiver.config import UserError
from pipelines.prepare import PrepareConfig, prepare
from pipelines.sources._common import MAX_CLASSES, MAX_FILE
from pipelines.sources.text import documents
from pipelines.transforms import BadSample
from pipelines.transforms.cloud import read_points
from tests.pipelines.raw import tar, write
from tests.pipelines.toys import png

OFF = PrepareConfig(parallel="off", max_bad_fraction=0.9)
FINE = png(np.zeros((4, 4, 3), np.uint8), "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def images(root: Path) -> Path:
    return write(root / "src", {f"{name}/{i}.jpg": FINE for name in "ab" for i in range(5)})


def problems(root: Path) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in pq.read_table(root / "out" / "quarantine.parquet").to_pylist()}


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "link to a FIFO"])
def test_a_special_file_is_refused_in_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = images(tmp_path) / "a" / "x.jpg"
    monkeypatch.chdir(place.parent)
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "socket":
            server.bind("x.jpg")
        elif kind == "device":
            place.symlink_to("/dev/zero")
        elif kind == "FIFO":
            os.mkfifo(place)
        else:
            os.mkfifo(tmp_path / "pipe")
            place.symlink_to(tmp_path / "pipe")
        with pytest.raises(UserError, match=rf"a/x\.jpg is a {kind.rsplit(' ', 1)[-1]}"):
            prepare("image_folder", str(tmp_path / "src"), str(tmp_path / "out"), OFF)


def test_a_dangling_link_is_quarantined_and_links_to_files_are_read(tmp_path: Path) -> None:
    src = images(tmp_path)
    (src / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (src / "a" / "linked.jpg").symlink_to(src / "b" / "0.jpg")
    manifest = prepare("image_folder", str(src), str(tmp_path / "out"), OFF)
    assert sum(split.samples for split in manifest.splits.values()) == 11
    assert list(problems(tmp_path)) == ["a/gone.jpg"]


def test_a_file_that_is_too_large_to_be_a_sample_is_refused(tmp_path: Path) -> None:
    with (images(tmp_path) / "a" / "x.jpg").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(UserError, match=r"a/x\.jpg has .* bytes, more than"):
        prepare("image_folder", str(tmp_path / "src"), str(tmp_path / "out"), OFF)


def test_an_eps_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, programs = tmp_path / "started", tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    write(images(tmp_path) / "a", {"eps.jpg": EPS})
    prepare("image_folder", str(tmp_path / "src"), str(tmp_path / "out"), OFF)
    done = CliRunner().invoke(inspect_verb.command, [str(tmp_path / "out")])
    assert "a/eps.jpg" in done.output and "cannot identify image file" in done.output and not started.exists()


def long_name(size: int, *, compress: bool) -> bytes:
    """Return a tar whose first header announces a file name of `size` bytes, which follow as zeros."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    head = header.tobuf(tarfile.GNU_FORMAT)
    if not compress:
        return head + bytes(4096)
    sink = io.BytesIO()
    with gzip.GzipFile(fileobj=sink, mode="wb", compresslevel=1) as stream:
        stream.write(head)
        for _ in range(size >> 20):
            stream.write(bytes(1 << 20))
    return sink.getvalue()


@pytest.mark.parametrize("compress", [True, False])
def test_a_header_of_a_tar_that_would_fill_the_memory_is_damage(compress: bool, tmp_path: Path) -> None:
    size, ending = (64 << 20, ".tar.gz") if compress else (1 << 40, ".tar")
    fine = tar({f"{i}{suffix}": content for i in range(5) for suffix, content in ((".jpg", FINE), (".cls", b"0"))})
    write(tmp_path / "src", {"train-0.tar": fine, f"train-1{ending}": long_name(size, compress=compress)})
    manifest = prepare("webdataset", str(tmp_path / "src"), str(tmp_path / "out"), OFF)
    assert manifest.splits["train"].samples == 5
    assert "a damaged tar" in problems(tmp_path)[f"train-1{ending}"]


def test_a_compressed_tar_is_read(tmp_path: Path) -> None:
    members: dict[str, bytes | tarfile.TarInfo] = {
        f"{i}{suffix}": text for i in range(3) for suffix, text in ((".jpg", FINE), (".cls", str(i).encode()))
    }
    write(tmp_path / "src", {"train-0.tar.gz": gzip.compress(tar(members))})
    manifest = prepare("webdataset", str(tmp_path / "src"), str(tmp_path / "out"), OFF)
    assert manifest.splits["train"].samples == 3 and manifest.classes == ("0", "1", "2")


def test_a_huge_label_makes_no_class_names(tmp_path: Path) -> None:
    label = 2**34
    write(tmp_path / "tars", {"train-0.tar": tar({"0.jpg": FINE, "0.cls": str(label).encode()})})
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"image": [FINE], "label": [label]}), tmp_path / "tables" / "train-0.parquet")
    (tmp_path / "clouds").mkdir()
    with h5py.File(tmp_path / "clouds" / "train.h5", "w") as file:
        file["data"], file["label"] = np.zeros((1, 4, 3), np.float32), np.array([[label]])
    for source, src in (("webdataset", "tars"), ("table", "tables"), ("modelnet40", "clouds")):
        with pytest.raises(UserError, match=rf"label {label}, wanted class numbers below {MAX_CLASSES}"):
            prepare(source, str(tmp_path / src), str(tmp_path / "out"), OFF)


def test_an_hdf5_array_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file.create_dataset("data", (1, 10**9, 3), "f4", chunks=(1, 10**6, 3), compression="gzip")
        file["label"] = np.zeros((1, 1), np.int64)
    with pytest.raises(UserError, match=r"train\.h5: a row of data has .* bytes"):
        prepare("modelnet40", str(tmp_path), str(tmp_path / "out"), OFF)


def npy(shape: tuple[int, ...], kind: str = "<f4", content: bytes = b"") -> bytes:
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize(
    "encoded",
    [
        npy((10**15, 3)),
        npy((-1, 3)),
        npy((2**62, 2**62)),
        npy((3, 3), "<f4", bytes(35)),
        npy((1,), "|O"),
        npy((1, 3), "<U3", bytes(36)),
        npy((12,), "<f4", bytes(48)),
        b"\x93NUMPY\x03\x00" + bytes(100),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"PK\x03\x04" + bytes(100),
        b"\x93NUMPY",
    ],
)
def test_an_array_whose_header_does_not_match_is_a_bad_sample(encoded: bytes) -> None:
    with pytest.raises(BadSample, match="no rows of x, y, z"):
        read_points("a.npy", encoded, 8, 0)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_in_either_order(order: str) -> None:
    sink, values = io.BytesIO(), np.arange(12.0).reshape(4, 3)
    np.save(sink, np.asarray(values, order=order))  # type: ignore[call-overload]
    assert np.array_equal(read_points("a.npy", sink.getvalue(), 8, 0), values)


@pytest.mark.parametrize("start", [0, 3, 5, 20])
def test_a_range_that_begins_within_a_long_line_skips_it(start: int) -> None:
    found = list(documents(io.BytesIO(b"x" * 10 + b"\n\nnext\n"), start, 100, "blank"))
    assert [text for _, text in found][-1:] == ([] if start == 20 else [b"next\n"])


def test_frames_of_a_gif_after_the_first_are_not_read(tmp_path: Path) -> None:
    sink = io.BytesIO()
    frames = [Image.new("P", (16, 16), i) for i in range(4)]
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    write(images(tmp_path) / "a", {"moving.gif": sink.getvalue()})
    manifest = prepare("image_folder", str(tmp_path / "src"), str(tmp_path / "out"), OFF)
    assert sum(split.samples for split in manifest.splits.values()) == 11
