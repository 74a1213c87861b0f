"""Shards and the manifest: both are read as written, and an incomplete folder is refused in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from perceiver.config import UserError
from pipelines.shards.manifest import load_manifest
from tests.pipelines.toys import write_images


def test_a_saved_manifest_is_loaded(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [23, 7]}, rows_per_group=10)
    assert load_manifest(str(tmp_path)) == manifest
    assert manifest.split("train").samples == 30
    lines = (tmp_path / "manifest.json").read_text().splitlines()
    shown = [json.loads(line.strip().rstrip(",")) for line in lines if re.fullmatch(r" *\[\d.*\],?", line)]
    assert shown == [list(batch) for shard in manifest.split("train").shards for batch in shard.batches]


def test_folders_that_are_no_data_set_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent .*`perceiver prepare"):
        load_manifest(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"manifest\.json .*`perceiver prepare"):
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
        (lambda raw: raw.replace('"format_version": 2', '"format_version": 99'), "version 99.* reads up to 2"),
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
    with pytest.raises(UserError, match="'val'.*train, test"):
        manifest.split("val")


def test_storage_options_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"train": [2]})
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE"):
        load_manifest(str(tmp_path), {"key": "$NOT_SET_ANYWHERE"})
    monkeypatch.setenv("MKDIR", "yes")
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["name"]
        == load_manifest(str(tmp_path), {"auto_mkdir": "$MKDIR"}).name
    )


BATCHES = [[232, 800, 3, 7], [1032, 800, 3, 8]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": [[-8, 800, 3, 7], BATCHES[1]]}, "batch 0 at"),
        ({"batches": [[0, 800, 3, 7], BATCHES[1]]}, "batch 0 at"),
        ({"batches": [BATCHES[0], [1024, 800, 3, 8]]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1033, 800, 3, 8]]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1032, -800, 3, 8]]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1032, 0, 3, 8]]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1032, 1 << 70, 3, 8]]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1032, 969, 3, 8]]}, "batch 1 at"),
        ({"batches": BATCHES[::-1]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1032, 800, 4, 8]]}, "batch 1 has 4 rows, wanted 3"),
        ({"batches": [BATCHES[0], [1032, 800, -3, 8]]}, "batch 1 has -3 rows"),
        ({"batches": [BATCHES[0], [1032, 800, 3, -1]]}, "batch 1 has CRC-32 -1"),
        ({"batches": [BATCHES[0], [1032, 800, 3, 1 << 32]]}, "batch 1 has CRC-32"),
        ({"batches": BATCHES[:1]}, "2 row groups .* and 1 batches"),
        ({"batches": [BATCHES[0], [1032, 800, 3]]}, "batches.1"),
        ({"rows": 7}, "3 row groups .* and 2 batches"),
        ({"rows": 5}, "batch 1 has 3 rows, wanted 2"),
        ({"rows": 1 << 60}, "rows"),
        ({"rows_per_group": 0}, "rows_per_group"),
        ({"rows_per_group": 1}, "6 row groups"),
        ({"groups": [[4, 3], [3, 3]]}, "do not add up to 6 rows"),
        ({"groups": [[7, 3], [-1, 3]]}, "groups.1.0"),
        ({"groups": [[6, 0]]}, "groups.0.1"),
        ({"rows_per_group": 1 << 70}, "rows_per_group"),
        ({"batches": [], "rows": 1 << 40, "rows_per_group": 1}, "1099511627776 row groups in 2000 bytes"),
        ({"bytes": 1000}, "batch 0 at|batch 1 at"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shard = {"name": "a.arrow", "rows": 6, "rows_per_group": 3, "bytes": 2000, "batches": BATCHES}
    manifest = {"format_version": 2, "name": "x", "features": {}, "licence": "", "source": ""}
    for shards in ([shard], [shard | change]):
        text = json.dumps(manifest | {"splits": {"train": {"shards": shards}}})
        (tmp_path / "manifest.json").write_text(text)
        if shards == [shard]:
            assert load_manifest(str(tmp_path)).split("train").samples == 6
    with pytest.raises(UserError, match=rf"manifest.json: splits.train.shards.0.*{message}") as caught:
        load_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)
