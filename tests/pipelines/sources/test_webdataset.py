"""WebDataset tars: samples of every kind are read, and nothing unsafe is ever opened."""

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import Manifest
from tests.pipelines.raw import link, tar, write
from tests.pipelines.test_prepare import rows_of
from tests.pipelines.toys import png

IMAGE = [png(np.full((4, 4, 3), i, np.uint8), "JPEG") for i in range(20)]


def prepared(root: Path, tars: dict[str, bytes], **options: str) -> tuple[Manifest, dict[str, dict], list[dict]]:
    """Return manifest, samples by key, and rejected items."""
    src = write(root / "src", tars)
    manifest = prepare(
        "webdataset", str(src), str(root / "out"), PrepareConfig(parallel="off", max_bad_fraction=0.9, options=options)
    )
    rows = {row["key"]: row for split in manifest.splits for row in rows_of(root / "out", manifest, split)}
    listed = root / "out" / "quarantine.parquet"
    return manifest, rows, pq.read_table(listed).to_pylist() if listed.exists() else []


def numbered(start: int, stop: int) -> dict[str, bytes | tarfile.TarInfo]:
    """Return images with classes by number."""
    return {
        f"{i:06d}{suffix}": content
        for i in range(start, stop)
        for suffix, content in ((".jpg", IMAGE[i]), (".cls", str(i % 3).encode()), (".meta.bin", b"unused"))
    }


def test_images_with_classes(tmp_path: Path) -> None:
    manifest, rows, problems = prepared(
        tmp_path,
        {
            "train-000000.tar": tar(numbered(0, 5)),
            "train-000001.tar": tar(numbered(5, 9)),
            "val-0.tar": tar(numbered(9, 11)),
        },
    )
    assert manifest.classes == ("0", "1", "2") and not problems
    assert {split: found.samples for split, found in manifest.splits.items()} == {"train": 9, "val": 2}
    assert rows["train-000001.tar/000007"]["image"] == IMAGE[7] and rows["train-000001.tar/000007"]["label"] == 1


def test_sound_with_labels_by_name_in_json(tmp_path: Path) -> None:
    members = {
        f"clips/{name}/a.b{suffix}": content
        for name in ("rain", "dog")
        for suffix, content in (
            (".flac", name.encode()),
            (".json", json.dumps({"sound": name, "seconds": 10}).encode()),
        )
    }
    manifest, rows, _ = prepared(tmp_path, {"train.tar": tar(members)}, label="sound")
    assert manifest.classes == ("dog", "rain") and manifest.features["audio"].kind == "audio"
    assert rows["train.tar/clips/rain/a"] == {"key": "train.tar/clips/rain/a", "audio": b"rain", "label": 1}


def test_pictures_with_captions_and_facts_without_a_label(tmp_path: Path) -> None:
    members = {"0.png": IMAGE[0], "0.txt": b" ein Bild ", "0.json": b'{"width": 4}'}
    manifest, rows, _ = prepared(tmp_path, {"a.tar": tar(members)})
    assert set(manifest.features) == {"image", "text"} and rows["a.tar/0"]["text"] == "ein Bild"


class Trap:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return open, ("/tmp/trap-was-sprung", "w")


def test_unsafe_members_are_named_and_their_samples_kept(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap())
    device = tarfile.TarInfo("000004.dev")
    device.type = tarfile.CHRTYPE
    members = numbered(0, 8)
    spoilt: dict[str, bytes | tarfile.TarInfo] = {}
    for name, content in members.items():
        spoilt[name] = content
        if name == "000002.jpg":
            spoilt |= {f"000002.{suffix}": trap for suffix in ("pkl", "pyd", "pth", "pt")}
    spoilt |= {
        "../000003.png": IMAGE[0],
        "/etc/000003.cls": b"1",
        "C:\\000003.cls": b"1",
        "000003.png": link("000003.png", "/etc/passwd"),
        "000004.dev": device,
        "000004.webp": link("000004.webp", "0", tarfile.LNKTYPE),
    }
    manifest, rows, problems = prepared(tmp_path, {"train.tar": tar(spoilt)})
    assert sorted(rows) == [f"train.tar/{i:06d}" for i in range(8)]
    assert all(row["image"] == IMAGE[int(key[-6:])] for key, row in rows.items())
    assert {row["key"]: row["reason"] for row in problems} == {
        **{f"train.tar/000002.{suffix}": "a pickle" for suffix in ("pkl", "pyd", "pth", "pt")},
        "train.tar/../000003.png": "a member with .. in its path",
        "train.tar//etc/000003.cls": "a member with an absolute path",
        "train.tar/C:\\000003.cls": "a member with an absolute path",
        "train.tar/000003.png": "a link",
        "train.tar/000004.webp": "a link",
        "train.tar/000004.dev": "a device or another special file",
    }
    assert manifest.rejected == 10 and not Path("/tmp/trap-was-sprung").exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"000001.cls": b"x"}, "an unknown label"),
        ({"000001.cls": b"7"}, "label 7 is not one of 3 classes"),
        ({"000001.cls": b"\xff"}, "invalid UTF-8: invalid start byte"),
        ({"000001.cls": None}, "a sample without label"),
        ({"000001.jpg": None}, "a sample without image"),
    ],
)
def test_samples_that_lack_something_are_named(tmp_path: Path, change: dict, reason: str) -> None:
    members = {name: content for name, content in (numbered(0, 4) | change).items() if content is not None}
    _, rows, problems = prepared(tmp_path, {"train.tar": tar(members)}, classes="a,b,c")
    assert len(rows) == 3 and [(row["key"], row["reason"]) for row in problems] == [("train.tar/000001", reason)]


@pytest.mark.parametrize("end", [2 * 2048, 2 * 2048 + 100, 2 * 2048 + 1100, 2 * 2048 + 1400])
def test_a_truncated_tar_gives_its_complete_samples(tmp_path: Path, end: int) -> None:
    """A class takes 1,024 bytes in the tar, and so does an image: truncate between them, in a header, in an image."""
    raw = tar(
        {f"{i}{suffix}": content for i in range(6) for suffix, content in ((".cls", b"0"), (".jpg", IMAGE[i][:500]))}
    )
    _, rows, problems = prepared(tmp_path, {"train-0.tar": tar(numbered(0, 3)), "train-1.tar": raw[:end]})
    assert {key for key in rows if key.startswith("train-0")} == {f"train-0.tar/{i:06d}" for i in range(3)}
    assert {key for key in rows if key.startswith("train-1")} == {"train-1.tar/0", "train-1.tar/1"}
    assert any(row["key"] == "train-1.tar" and row["reason"].startswith("a damaged tar") for row in problems)


def test_folders_without_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.tar"):
        prepared(tmp_path / "a", {"x.txt": b""})
    with pytest.raises(UserError, match="no images, sound, video or texts"):
        prepared(tmp_path / "b", {"x.tar": tar({"a.bin": b""})})
    with pytest.raises(UserError, match="no images"):
        prepared(tmp_path / "c", {"x.tar": b"no tar"})
