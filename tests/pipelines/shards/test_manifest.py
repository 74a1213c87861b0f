"""Shards and the manifest: what is written is read back, what is not ready is refused in one line."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from pipelines.features import ImageFeature, LabelFeature
from pipelines.shards.io import open_folder
from pipelines.shards.manifest import ShardWriter, arrow_schema, load_manifest
from tests.pipelines.toys import write_images

SCHEMA = arrow_schema({"image": ImageFeature(channels=1), "label": LabelFeature()})


def test_a_shard_is_what_the_manifest_says(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [23, 7]}, rows_per_group=10)
    assert load_manifest(str(tmp_path)) == manifest
    shard = manifest.splits["train"].shards[0]
    raw = (tmp_path / shard.name).read_bytes()
    assert (shard.bytes, shard.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    file = pq.ParquetFile(tmp_path / shard.name)
    assert [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)] == [10, 10, 3]
    assert file.read().column("key").to_pylist() == [f"train/{i}" for i in range(23)]
    assert manifest.split("train").samples == 30


def test_a_shard_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(open_folder(str(tmp_path)), "a.parquet", SCHEMA, 2)
    writer.write([{"key": "k", "image": b"x", "label": 1}] * 5)
    assert not (tmp_path / "a.parquet").exists()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_failed_or_empty_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(open_folder(str(tmp_path)), "a.parquet", SCHEMA, 2) as writer:
        writer.write([{"key": "k", "image": b"x", "label": 1}] * 3)
        raise KeyError("the source failed")
    assert ShardWriter(open_folder(str(tmp_path)), "b.parquet", SCHEMA, 2).close() is None
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_data_set_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent does not exist: make it with `perceiver prepare"):
        load_manifest(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"has no manifest.json .* `perceiver prepare"):
        load_manifest(str(tmp_path))
    with pytest.raises(UserError, match="nosuch://x"):
        load_manifest("nosuch://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        load_manifest(str(tmp_path / "file"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw[:-20], "cannot read"),
        (lambda raw: "[1]", "not a manifest"),
        (lambda raw: raw.replace('"format_version": 1', '"format_version": 99'), "version 99.* reads up to 1"),
        (lambda raw: raw.replace('"licence"', '"license"'), "licence"),
        (lambda raw: raw.replace('"rows": 6', '"rows": "many"'), r"splits.train.shards.0.rows"),
    ],
)
def test_broken_manifests_are_refused_in_one_line(tmp_path: Path, change, message: str) -> None:
    write_images(tmp_path, {"train": [6]})
    path = tmp_path / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        load_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_split_names_the_known_ones(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [2], "test": [2]})
    with pytest.raises(UserError, match="no split 'val': it has train, test"):
        manifest.split("val")


def test_storage_options_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"train": [2]})
    with pytest.raises(UserError, match="no variable NOT_SET_ANYWHERE"):
        load_manifest(str(tmp_path), {"key": "$NOT_SET_ANYWHERE"})
    monkeypatch.setenv("MKDIR", "yes")
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["name"]
        == load_manifest(str(tmp_path), {"auto_mkdir": "$MKDIR"}).name
    )
