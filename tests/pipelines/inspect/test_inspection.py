"""Inspecting: counts are right, damage of files and samples is named."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.inspect.inspection import describe, inspect
from pipelines.shards.io import open_folder
from pipelines.shards.manifest import load_manifest, save_manifest
from tests.pipelines.toys import write_images


def test_a_sound_folder_is_described(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": [13, 7]})
    found = inspect(str(tmp_path), verify=True)
    assert found.sound
    split = found.splits["train"]
    assert (split.samples, split.shards, split.unreadable, split.doubles) == (20, 2, 0, 0)
    assert split.classes == {"a": 5, "b": 5, "c": 5, "d": 5}
    assert split.sizes["image height"].least == split.sizes["image height"].most == 8
    assert split.sizes["image height"].bins == [20] and sum(split.sizes["stored bytes"].bins) == 20
    assert any("20 samples in 2 shards" in line for line in describe(found))


def test_damaged_and_doubled_samples_are_named(tmp_path: Path) -> None:
    """Both splits hold the images 0, 1, 2, ...: those of the second are doubles, but for the damaged ones' equals."""
    write_images(tmp_path, {"train": [6], "test": [3]}, bad=(4,))
    found = inspect(str(tmp_path))
    assert not found.sound and not found.faults
    assert found.splits["train"].unreadable_samples == ["train: train/4: undecodable image: cannot identify image file"]
    assert found.splits["train"].reasons == {"undecodable image: cannot identify image file": 1}
    assert found.splits["test"].double_samples == [f"test: test/{i} = train: train/{i}" for i in range(3)]
    assert any("1 samples cannot be used" in line for line in describe(found))


def test_files_that_are_not_what_the_manifest_says_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": [5, 5, 5, 5, 5]})
    files = [tmp_path / f"train-{i}.parquet" for i in range(5)]
    files[0].unlink()
    raw = bytearray(files[1].read_bytes())
    raw[60] ^= 1
    files[1].write_bytes(raw)
    files[2].write_bytes(files[2].read_bytes()[:-10])
    table = pq.read_table(files[3])
    pq.write_table(table.set_column(2, "label", pa.array(["x"] * 5)), files[3])
    pq.write_table(table.slice(0, 4), files[4])
    manifest = load_manifest(str(tmp_path))
    shards = tuple(
        shard.model_copy(update={"bytes": file.stat().st_size}) if file.exists() and number > 2 else shard
        for number, (shard, file) in enumerate(zip(manifest.splits["train"].shards, files, strict=True))
    )
    split = manifest.splits["train"].model_copy(update={"shards": shards})
    save_manifest(manifest.model_copy(update={"splits": {"train": split}}), open_folder(str(tmp_path)))
    faults = inspect(str(tmp_path), samples=False).faults
    assert [fault.split(":")[0] for fault in faults] == [f"train-{i}.parquet" for i in (0, 2, 3, 4)]
    for fault, word in zip(faults, ("missing", "the manifest says", "columns", "4 rows"), strict=True):
        assert word in fault
    assert "checksum" in inspect(str(tmp_path), samples=False, verify=True).faults[1]
