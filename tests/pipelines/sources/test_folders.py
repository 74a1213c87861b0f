"""Folders of recordings, videos and point clouds, and tables of labels next to the files."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from perceiver.config import UserError
from pipelines.features import AudioFeature, MediaFeature, PointsFeature, VideoFeature
from pipelines.features.base import ViewConfig
from pipelines.transforms import BadSample
from pipelines.transforms.cloud import read_points
from pipelines.transforms.points import PointsViewConfig, evaluation_view, training_view
from tests.pipelines.raw import off, write
from tests.pipelines.recordings import sound_file, tone
from tests.pipelines.sources.test_layouts import PICTURES, prepared

CLOUD = np.arange(30, dtype=np.float32).reshape(5, 6)


def test_folders_of_recordings_and_videos(tmp_path: Path) -> None:
    sounds = {
        f"{c}/{i}.{end}": b"%d" % i
        for c in ("dog", "cat")
        for i, end in enumerate(["wav", "FLAC", "m4a", "ogg", "mp3"])
    }
    write(tmp_path / "src", sounds)
    found = prepared(tmp_path, "audio_folder")
    assert found.manifest.features["audio"] == AudioFeature() and found.manifest.classes == ("cat", "dog")
    assert (
        found.samples == {"train": 8, "test": 2}
        and found.rows["train"].keys() | found.rows["test"].keys() == sounds.keys()
    )
    write(tmp_path / "v" / "src", {f"{s}/{c}/0.mp4": b"x" for s in ("train", "val") for c in "ab"})
    assert prepared(tmp_path / "v", "video_folder").manifest.features["video"] == VideoFeature()
    write(tmp_path / "w" / "src", {f"{c}/0.mp4": b"x" for c in "ab"})
    assert prepared(tmp_path / "w", "video_folder", media="both").manifest.features["media"] == MediaFeature()


def test_a_recording_of_a_folder_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "src", {f"{c}/0.wav": sound_file(tone(440, 0.1, 8000), 8000, "WAV") for c in "ab"})
    found = prepared(tmp_path, "audio_folder", held_out="none")
    feature, view = AudioFeature(), ViewConfig.model_validate({"audio": {"rate": 8000, "samples": 400}})
    sound = feature.decode(found.rows["train"]["a/0.wav"]["audio"], view, 2)
    assert feature.show("audio", sound, view, False, np.random.default_rng)["audio"].shape == (400,)


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def text(delimiter: str, first: str = "") -> bytes:
    return (first + "\n".join(delimiter.join(f"{value:g}" for value in row) for row in CLOUD)).encode()


CLOUDS: dict[str, bytes] = {
    "a.npy": npy(CLOUD),
    "a.npz": npz(points=CLOUD, other=CLOUD[:2]),
    "b.npz": npz(anything=CLOUD),
    "a.txt": text(" "),
    "a.csv": text(",", "x,y,z,nx,ny,nz\n"),
    "a.xyz": text("\t"),
    "a.pts": text(" ", "5\n"),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_of_every_format(name: str) -> None:
    assert np.array_equal(read_points(name, CLOUDS[name], 8, 0), CLOUD[:, :3])
    assert np.array_equal(read_points(name, CLOUDS[name], 8, 0, features=3), CLOUD)
    with pytest.raises(BadSample, match="6 columns, wanted x, y, z and 4 features"):
        read_points(name, CLOUDS[name], 8, 0, features=4)


@pytest.mark.parametrize("kind", ["ply", "obj", "stl", "off"])
def test_meshes_of_every_format_with_normals(kind: str) -> None:
    mesh = trimesh.creation.box()
    content: Any = mesh.export(file_type=kind)
    points = read_points(f"a.{kind}", content if isinstance(content, bytes) else content.encode(), 50, 0, features=3)
    assert points.shape == (50, 6)
    assert np.allclose(np.abs(points[:, :3]).max(1), 0.5, atol=1e-5)
    assert np.allclose((points[:, :3] * points[:, 3:]).sum(1), 0.5, atol=1e-5)  # the side's normal points outwards


def test_a_cloud_in_ply() -> None:
    content: Any = trimesh.PointCloud(CLOUD[:, :3]).export(file_type="ply")
    assert np.array_equal(read_points("a.ply", content, 8, 0), CLOUD[:, :3])


BOMB = io.BytesIO()
with zipfile.ZipFile(BOMB, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("points.npy", bytes(600 << 20))

LZMA = io.BytesIO()
with zipfile.ZipFile(LZMA, "w", zipfile.ZIP_LZMA) as archive:
    archive.writestr("points.npy", npy(CLOUD))

DAMAGED = {
    "a.npz": b"PK\x03\x04 no archive",
    "b.npz": npz(a=CLOUD, b=CLOUD),
    "c.npz": BOMB.getvalue(),
    "a.npy": npy(np.array([[None]], object)),
    "b.npy": npy(CLOUD).replace(b"{", b"\\", 1),
    "c.npy": npy(CLOUD).replace(b"(5, 6)", b"((((((", 1),
    "d.npz": LZMA.getvalue(),
    "a.ply": b"ply\nformat ascii 1.0\nelement vertex 99999999999\nproperty float x\nend_header\n",
    "b.ply": b"ply\nformat ascii 1.0\nelement vertex 4\nelement face 99999999999999999999999\nend_header\n",
    "c.ply": b"",
    "a.stl": b"solid nothing",
    "a.obj": b"v 0 0",
    "a.txt": b"x y\n1 2\n",
    "a.csv": b"\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_clouds_and_meshes_are_quarantined(name: str) -> None:
    with pytest.raises(BadSample):
        read_points(name, DAMAGED[name], 8, 0)


def test_a_folder_of_clouds_with_features(tmp_path: Path) -> None:
    write(tmp_path / "src", {f"{c}/{i}.npy": npy(CLOUD + i) for c in "ab" for i in range(5)} | {"a/5.off": off()})
    found = prepared(tmp_path, "points_folder", features="3", points="7")
    assert found.manifest.features["points"] == PointsFeature(features=3) and found.manifest.rejected == 0
    rows = found.rows["train"] | found.rows["test"]
    assert np.frombuffer(rows["b/2.npy"]["points"], "<f4").reshape(5, 6).tolist() == (CLOUD + 2).tolist()
    assert len(rows["a/5.off"]["points"]) == 7 * 6 * 4


def test_features_of_points_are_not_normalised() -> None:
    points = np.hstack([CLOUD[:, :3], CLOUD[:, 3:] + 100])
    config = PointsViewConfig(count=5, scale=(1.0, 1.0))
    shown = evaluation_view(points, config)
    assert np.abs(shown[:, :3]).max() == 1 and np.array_equal(shown[:, 3:], points[:, 3:])
    trained = training_view(points, config, np.random.default_rng(0))
    assert trained.shape == (5, 6) and sorted(trained[:, 3]) == sorted(points[:, 3])


def csv_of(*lines: str) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def test_tables_of_labels(tmp_path: Path) -> None:
    files = {f"train/{i}.png": PICTURES[i] for i in range(4)} | {"test/deep/9.png": PICTURES[9]}
    files["train/metadata.csv"] = csv_of(
        "\ufefffile_name,breed", '0.png,"dog, large"', "1.png,cat", "./2.png,cat", "3.png,"
    )
    files["test/metadata.jsonl"] = json.dumps({"file_name": "deep/9.png", "breed": "cat"}).encode()
    write(tmp_path / "src", files)
    found = prepared(tmp_path, "image_folder", label="breed")
    assert found.manifest.classes == ("cat", "dog, large") and found.samples == {"train": 3, "test": 1}
    assert found.rejected == {"train/3.png": "no label"}


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    files = {f"{i}.png": PICTURES[i] for i in range(12)}
    files["metadata.csv"] = csv_of("file_name,label", *(f"{i}.png,{i}" for i in range(12)))
    write(tmp_path / "src", files)
    assert prepared(tmp_path, "image_folder", held_out="none").manifest.classes == tuple(map(str, range(12)))


def test_files_and_rows_without_each_other_are_rejected(tmp_path: Path) -> None:
    table = csv_of("file_name,label", "0.png,a", "gone.png,b", "1.png,b")
    write(tmp_path / "src", {"0.png": PICTURES[0], "1.png": PICTURES[1], "2.png": PICTURES[2], "metadata.csv": table})
    found = prepared(tmp_path, "image_folder", held_out="none")
    assert found.samples == {"train": 2} and found.rejected.keys() == {"gone.png", "2.png"}


@pytest.mark.parametrize(
    "table, message",
    [
        (csv_of("file_name,kind", "0.png,a"), "no column label"),
        (csv_of("name,label", "0.png,a"), "column file_name"),
        (csv_of("file_name,label", "../0.png,a"), "below the table"),
        (csv_of("file_name,label", "/etc/passwd,a"), "below the table"),
        (csv_of("file_name,label", "0.png,a", "0.png,b"), "second time"),
        (csv_of("file_name,label,label", "0.png,a,b"), "different names"),
        (csv_of("file_name,label", "0.png,a,b"), "line 2 has 3 cells"),
        ("file_name,label\n0.png,a\n".encode("utf-16"), "UTF-16"),
        (b"", "different names"),
    ],
)
def test_unusable_tables_of_labels_are_refused(tmp_path: Path, table: bytes, message: str) -> None:
    write(tmp_path / "src", {"0.png": PICTURES[0], "metadata.csv": table})
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "image_folder")
