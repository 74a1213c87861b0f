"""Sources of point clouds: meshes are sampled by area, deterministically; bad ones are named and left out."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from pipelines.features import PointsFeature
from pipelines.features.base import ViewConfig
from pipelines.packages import Package
from pipelines.prepare import PrepareConfig, prepare
from pipelines.sources import furniture
from pipelines.transforms import BadSample
from pipelines.transforms.mesh import MAX_VERTICES, load_mesh, surface_points
from tests.pipelines.raw import CORNERS, off, write
from tests.pipelines.test_prepare import rows_of

OFF = PrepareConfig(parallel="off", shard_rows=3)


def cloud(row: dict) -> np.ndarray:
    """Return the stored points of a row."""
    return np.frombuffer(row["points"], "<f4").reshape(-1, 3)


def test_points_are_spread_by_area_on_the_surface() -> None:
    """A box of 1 x 1 x 8: each long side gets 8 / 34 of the points, each end 1 / 34; all are on the surface."""
    box = CORNERS * [1, 1, 8]
    points = surface_points(load_mesh(off(box, joined=True), "off"), 20_000, 3)
    assert points.shape == (20_000, 3) and points.dtype == np.float32
    on_side = [
        np.isclose(points[:, axis], box[:, axis].max() * side, atol=1e-6) for axis in range(3) for side in (0, 1)
    ]
    assert np.any(on_side, axis=0).all()
    shares = [side.mean() for side in on_side]
    assert np.allclose(shares[:4], 8 / 34, atol=0.01) and np.allclose(shares[4:], 1 / 34, atol=0.005)
    assert np.allclose(points[on_side[0]].mean(axis=0), [0, 0.5, 4], atol=0.1)


def hdf5(path: Path, **arrays: np.ndarray) -> Path:
    """Write an HDF5 file."""
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


def test_modelnet_in_hdf5_keeps_each_row_but_nan_and_infinite_ones(tmp_path: Path) -> None:
    src, rng = tmp_path / "hdf5", np.random.default_rng(0)
    clouds = rng.normal(size=(7, 16, 3)).astype(np.float32)
    clouds[6, 2, 1] = np.nan
    labels = np.array([[0], [2], [1], [1], [0], [2], [1]], np.uint8)
    for name, part in (
        ("ply_data_train0.h5", slice(0, 3)),
        ("ply_data_train1.h5", slice(3, 5)),
        ("ply_data_test0.h5", slice(5, 7)),
    ):
        hdf5(src / name, data=clouds[part], label=labels[part])
    (src / "shape_names.txt").write_text("airplane\nbathtub\nbed\n")
    manifest = prepare("modelnet40", str(src), str(tmp_path / "out"), OFF)
    assert manifest.classes == ("airplane", "bathtub", "bed")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 5, "test": 1}
    rows = {row["key"]: row for split in manifest.splits for row in rows_of(tmp_path / "out", manifest, split)}
    assert (cloud(rows["ply_data_train1.h5#1"]) == clouds[4]).all() and rows["ply_data_train1.h5#1"]["label"] == 0
    assert {key: row["label"] for key, row in rows.items()} == {
        "ply_data_train0.h5#0": 0,
        "ply_data_train0.h5#1": 2,
        "ply_data_train0.h5#2": 1,
        "ply_data_train1.h5#0": 1,
        "ply_data_train1.h5#1": 0,
        "ply_data_test0.h5#0": 2,
    }


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"data": np.zeros((2, 4, 3))}, "has the arrays data: wanted data and label"),
        ({"data": np.zeros((2, 4, 3)), "label": np.zeros(3, int)}, "data is .2, 4, 3., label 3 x int64"),
        ({"data": np.zeros((2, 4, 3)), "label": np.array([0, 7])}, "1 classes.*0 to 7"),
    ],
)
def test_hdf5_of_another_make_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], line: str) -> None:
    src = hdf5(tmp_path / "src" / "train.h5", **arrays).parent
    (src / "shape_names.txt").write_text("airplane\n")
    with pytest.raises(UserError, match=line):
        prepare("modelnet40", str(src), str(tmp_path / "out"), OFF)


def test_modelnet_meshes_become_points_that_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    src = write(
        tmp_path / "ModelNet40",
        {
            f"{name}/{split}/{name}_{i:04d}.off": off(CORNERS * size, joined=bool(i % 2))
            for name, size in (("chair", 1), ("night_stand", 2))
            for split, count in (("train", 4), ("test", 2))
            for i in range(count)
        },
    )
    manifest = prepare("modelnet40", str(src), str(tmp_path / "out"), OFF)
    assert manifest.classes == ("chair", "night_stand")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 8, "test": 4}
    rows = {row["key"]: row for split in manifest.splits for row in rows_of(tmp_path / "out", manifest, split)}
    for key, row in rows.items():
        assert cloud(row).shape == (2048, 3) and cloud(row).max() == pytest.approx(1 + row["label"], abs=0.05)
        assert key.startswith(manifest.classes[row["label"]])
    assert not np.array_equal(cloud(rows["chair/train/chair_0000.off"]), cloud(rows["chair/train/chair_0002.off"]))
    again = prepare("modelnet40", str(src), str(tmp_path / "again"), OFF.model_copy(update={"shard_rows": 5}))
    assert {row["key"]: row for row in rows_of(tmp_path / "again", again, "train")}.items() <= rows.items()
    other = prepare("modelnet40", str(src), str(tmp_path / "other"), OFF.model_copy(update={"seed": 1}))
    assert all(row != rows[row["key"]] for row in rows_of(tmp_path / "other", other, "test"))


def test_ready_points_are_read_with_their_lists(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(5, 30, 6))
    text = ["\n".join(",".join(f"{v:.6f}" for v in row) for row in sample).encode() for sample in points]
    array = io.BytesIO()
    np.save(array, points[4])
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    src = write(
        tmp_path / "resampled",
        {
            "airplane/airplane_0001.txt": text[0],
            "airplane/airplane_0002.txt": text[1],
            "bed/bed_0001.txt": text[2],
            "bed/bed_0002.npy": array.getvalue(),
            "bed/bed_0003.npy": pickled.getvalue(),
            "modelnet40_train.txt": b"airplane_0001\nbed_0001\nbed_0002\nbed_0003\n",
            "modelnet10_train.txt": b"bed_0001\n",
            "modelnet40_test.txt": b"airplane_0002\n",
            "modelnet40_shape_names.txt": b"airplane\nbed\n",
        },
    )
    manifest = prepare("modelnet40", str(src), str(tmp_path / "out"), OFF.model_copy(update={"max_bad_fraction": 0.2}))
    rows = {row["key"]: row for split in manifest.splits for row in rows_of(tmp_path / "out", manifest, split)}
    assert {split: found.samples for split, found in manifest.splits.items()} == {"train": 3, "test": 1}
    assert np.allclose(cloud(rows["airplane/airplane_0001.txt"]), points[0, :, :3], atol=1e-5)
    assert np.allclose(cloud(rows["bed/bed_0002.npy"]), points[4, :, :3], atol=1e-5)
    problems = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [row["key"] for row in problems] == ["bed/bed_0003.npy"] and "object" in problems[0]["reason"]


@pytest.mark.parametrize(
    "mesh, reason",
    [
        (b"", "0 bytes"),
        (b"solid cube", "not an OFF mesh"),
        (off()[:60], "unreadable off mesh"),
        (b"OFF\n8 0 0\n" + off().split(b"\n", 2)[2], "a mesh without faces"),
        (off(CORNERS * np.nan), "NaN or infinite"),
        (off(CORNERS * 0), "without area"),
        (off().replace(b"4 0 1 3 2", b"4 0 1 3 99"), "outside the range"),
        (f"OFF\n{MAX_VERTICES + 1} 1 0\n".encode(), "5000000 vertices"),
    ],
)
def test_bad_meshes_are_named(mesh: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        load_mesh(mesh, "off")


def test_a_few_bad_meshes_are_left_out_and_many_stop_the_preparation(tmp_path: Path) -> None:
    files = {f"cup/train/{i}.off": off() for i in range(9)} | {"cup/test/0.off": off()}
    src = write(tmp_path / "src", files | {"cup/train/3.off": b"", "cup/train/5.off": b"OFF\n1 1 0\n"})
    with pytest.raises(UserError, match=r"2 of 10 .*budget of 0\.1 .*1 x .*quarantine\.parquet"):
        prepare("modelnet40", str(src), str(tmp_path / "out"), OFF.model_copy(update={"max_bad_fraction": 0.1}))
    manifest = prepare("modelnet40", str(src), str(tmp_path / "out"), OFF.model_copy(update={"max_bad_fraction": 0.2}))
    assert manifest.rejected == 2 and manifest.splits["train"].samples == 7
    found = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert {(row["split"], row["key"]) for row in found} == {("train", "cup/train/3.off"), ("train", "cup/train/5.off")}


def test_repaired_items_are_read_when_a_preparation_continues(tmp_path: Path) -> None:
    src = write(
        tmp_path / "src",
        {f"cup/{split}/{i}.off": off() for split in ("train", "test") for i in range(4)} | {"cup/train/1.off": b""},
    )
    with pytest.raises(UserError, match="0 bytes"):
        prepare("modelnet40", str(src), str(tmp_path / "out"), OFF.model_copy(update={"max_bad_fraction": 0}))
    (src / "cup/train/1.off").write_bytes(off())
    manifest = prepare("modelnet40", str(src), str(tmp_path / "out"), OFF.model_copy(update={"max_bad_fraction": 0}))
    assert manifest.rejected == 0 and manifest.splits["train"].samples == 4
    assert not (tmp_path / "out" / "quarantine.parquet").exists()


def obj(corners: np.ndarray) -> bytes:
    """Return a box as an OBJ mesh."""
    return "\n".join(
        ["o box"]
        + ["v " + " ".join(map(str, corner)) for corner in corners]
        + [
            "f " + " ".join(str(i + 1) for i in side[:3])
            for side in [(0, 1, 3), (4, 6, 7), (0, 4, 5), (2, 3, 7), (0, 2, 6), (1, 5, 7)]
        ]
    ).encode()


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a package laid out like that of the furniture: ten boxes of two categories, and a light."""
    path = tmp_path / "furniture.tar.gz"
    facts: dict[str, str] = {}
    with tarfile.open(path, "w:gz") as package:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(f"pkg-0.0.6/{name}")
            info.size = len(content)
            package.addfile(info, io.BytesIO(content))

        for number in range(1, 12):
            file = f"lib/resources/models/box{number}.zip"
            facts |= {
                f"model#{number}": f"{file}!/box{number}.obj",
                f"name#{number}": "Box",
                f"category#{number}": "Bedroom" if number % 2 else "Kitchen",
                **{f"{side}#{number}": str(number * 10 + place) for place, side in enumerate(furniture.SIDES)},
            }
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as archive:
                archive.writestr(f"box{number}.obj", obj(CORNERS * [1, number, 1]) if number < 11 else b"v 0 0 0\n")
            add(furniture.RESOURCES + file, inner.getvalue())
        facts |= {"model#12": facts["model#1"], "name#12": "The same again", "category#12": "Bedroom"}
        add(furniture.CATALOGUE, json.dumps(facts).encode())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(furniture, "PACKAGE", Package("x==1", path.name, digest))
    return str(path)


def test_furniture_is_seen_from_many_sides(tmp_path: Path, catalogue: str) -> None:
    config = PrepareConfig(parallel="off", options={"clouds": "3", "held_out": "2"})
    manifest = prepare("furniture", catalogue, str(tmp_path / "out"), config)
    assert manifest.classes == tuple(f"box{i}" for i in range(1, 11))
    rows = {split: rows_of(tmp_path / "out", manifest, split) for split in ("train", "test")}
    assert [len(rows[split]) for split in rows] == [30, 20]
    box = [cloud(row) for row in rows["train"] + rows["test"] if row["label"] == 9]
    assert all(points[:, 1].max() == pytest.approx(10, abs=0.1) for points in box)
    assert len({round(float(points[:, 0].max()), 4) for points in box}) == 5


def test_furniture_by_category_holds_out_whole_objects(tmp_path: Path, catalogue: str) -> None:
    config = PrepareConfig(parallel="off", options={"label": "category", "clouds": "2", "held_out": "2"})
    manifest = prepare("furniture", catalogue, str(tmp_path / "out"), config)
    assert manifest.classes == ("Bedroom", "Kitchen")
    objects = {
        split: {row["key"].split("/")[0] for row in rows_of(tmp_path / "out", manifest, split)}
        for split in manifest.splits
    }
    assert len(objects["train"]) == 8 and len(objects["test"]) == 2 and not objects["train"] & objects["test"]


def test_furniture_sizes_are_those_of_whole_objects_held_out(tmp_path: Path, catalogue: str) -> None:
    config = PrepareConfig(parallel="off", options={"label": "size", "clouds": "2", "held_out": "2"})
    manifest = prepare("furniture", catalogue, str(tmp_path / "out"), config)
    feature: Any = manifest.features["target"]
    assert manifest.classes == () and feature.names == ("width", "depth", "height") and len(feature.std) == 3
    for row in rows_of(tmp_path / "out", manifest, "test"):
        number = int(row["key"].split("/")[0].removeprefix("box"))
        assert row["target"] == [number * 10.0, number * 10 + 1.0, number * 10 + 2.0]


def test_the_view_repeats_points_if_too_few_are_stored() -> None:
    feature, view = PointsFeature(), ViewConfig.model_validate({"points": {"count": 10}})
    decoded = feature.decode(np.arange(12, dtype="<f4").tobytes(), view, 0)
    assert feature.show("points", decoded, view, False, lambda: np.random.default_rng(0))["points"].shape == (10, 3)
