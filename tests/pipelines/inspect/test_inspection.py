"""Inspecting: counts are right, damage of files and samples is named."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.feed.ingest import DataConfig, TrainShare, load_data, train_batches
from pipelines.inspect.inspection import describe, inspect
from pipelines.shards.parquet import read_footer
from pipelines.shards.quarantine import Quarantine
from pipelines.shards.reader import CACHE, RowGroup
from tests.pipelines.toys import flip, read_shard, to_format_1, write_images


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
    """Both splits contain the images 0, 1, 2, ...: those of the second are duplicates, except those of damaged ones."""
    write_images(tmp_path, {"train": [6], "test": [3]}, bad=(4,))
    found = inspect(str(tmp_path))
    assert not found.sound and not found.faults
    assert found.splits["train"].unreadable_samples == ["train: train/4: undecodable image: cannot identify image file"]
    assert found.splits["train"].reasons == {"undecodable image: cannot identify image file": 1}
    assert found.splits["test"].double_samples == [f"test: test/{i} = train: train/{i}" for i in range(3)]
    assert any("1 samples cannot be used" in line for line in describe(found))


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_files_that_differ_from_the_manifest_are_named(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, {"train": [5, 5, 5, 5, 5]}, rows_per_group=3)
    if suffix == ".parquet":
        to_format_1(tmp_path)
    files = [tmp_path / f"train-{i}{suffix}" for i in range(5)]
    files[0].unlink()
    flip(files[1])
    files[2].write_bytes(files[2].read_bytes()[:-10])
    table = read_shard(files[3]) if suffix == ".arrow" else pq.read_table(files[3])
    table = table.replace_schema_metadata({"note": "x" * 2000})
    for path, rows in ((files[3], table.set_column(2, "label", pa.array(["x"] * 5))), (files[4], table.slice(0, 3))):
        if suffix == ".arrow":
            with pa.ipc.new_file(path, rows.schema) as writer:
                writer.write_table(rows, max_chunksize=3)
        else:
            pq.write_table(rows, path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for shard, file in zip(manifest["splits"]["train"]["shards"], files, strict=True):
        if file in files[3:]:
            more = file.stat().st_size - shard["bytes"]
            shard["bytes"] += more
            if suffix == ".arrow":
                shard["batches"][-1][1] += more
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    faults = inspect(str(tmp_path), samples=False).faults
    assert [fault.split(":")[0] for fault in faults] == [f"train-{i}{suffix}" for i in (0, 2, 3, 4)]
    counted = "1 record batches, wanted 2" if suffix == ".arrow" else "3 rows, wanted 5"
    for fault, word in zip(faults, ("missing", "bytes, wanted", "columns", counted), strict=True):
        assert word in fault
    assert "checksum" in inspect(str(tmp_path), samples=False, verify=True).faults[1]
    found = inspect(str(tmp_path)).splits["train"]
    assert found.unreadable == 3 and f"train-1{suffix}" in found.unreadable_samples[0]


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_flipped_bits_are_named_with_their_file_and_the_other_files_are_read(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, {"train": [5, 5], "test": [2]}, rows_per_group=3)
    if suffix == ".parquet":
        to_format_1(tmp_path)
    path = tmp_path / f"train-0{suffix}"
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    data = DataConfig(url=str(tmp_path), executor="inline", max_bad_fraction=0.0)
    for place in [len(raw) - 3, *rng.integers(0, 8 * len(raw), 80).tolist()]:
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << (place % 8)
        path.write_bytes(changed)
        forget()
        found = inspect(str(tmp_path))
        assert all(path.name in line for line in found.faults)
        assert all(path.name in line or "train/" in line for line in found.splits["train"].unreadable_samples)
        assert found.splits["test"].sizes and not found.splits["test"].unreadable
        forget()
        if found.sound:
            batches = list(train_batches(data, load_data(data), TrainShare(0, 5, 5, 0, 2), "cpu", Quarantine(0.0)))
            assert len(batches) == 2


def forget() -> None:
    """Clear the caches of read files."""
    read_footer.cache_clear()
    CACHE.put(("", "", (), 0), RowGroup({}, 0, 0), -1)


@pytest.mark.parametrize("content", [b"", b"no table", None])
def test_a_damaged_list_of_rejected_items_is_a_fault(tmp_path: Path, content: bytes | None) -> None:
    write_images(tmp_path, {"train": [5]})
    tree = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**tree, "rejected": 2}))
    if content is not None:
        (tmp_path / "quarantine.parquet").write_bytes(content)
    found = inspect(str(tmp_path))
    assert [fault.split(":")[0] for fault in found.faults] == ["quarantine.parquet"]
    assert found.splits["train"].sizes and not found.sound
