"""Parquet files read in place: the same samples as if they had been prepared, from a manifest alone."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from perceiver.cli.prepare import command
from perceiver.config import UserError
from pipelines.feed.ingest import DataConfig, EvalShare, TrainShare, check_files, eval_batches, load_data, train_batches
from pipelines.index import group_runs, index
from pipelines.inspect.inspection import inspect
from pipelines.inspect.page import write_page
from pipelines.order.plan import RowGroups
from pipelines.prepare import PrepareConfig
from pipelines.shards.manifest import Manifest, ShardInfo, Split, load_manifest
from pipelines.shards.quarantine import Quarantine
from pipelines.shards.reader import Reader
from tests.pipelines.feed.test_ingest import joined
from tests.pipelines.toys import numbered_image, png

NAMES = ("cat", "dog", "owl")


def hub_table(path: Path, first: int, count: int, groups: int = 7, strings: bool = False, **damage: bytes) -> None:
    """Write a file as hubs have them: images as structs of bytes and path, with other columns."""
    numbers = range(first, first + count)
    images = [{"bytes": damage.get(f"row{n}", png(numbered_image(n))), "path": f"{n}.png"} for n in numbers]
    labels = pa.array([NAMES[n % 3] if strings else n % 3 for n in numbers], pa.string() if strings else pa.int32())
    table = pa.table({"note": ["x" * 50] * count, "image": images, "label": labels})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=groups)


def config(**options: str) -> PrepareConfig:
    """Return the config with these options of the source."""
    return PrepareConfig(options={"channels": "1", **options})


@pytest.mark.parametrize("strings", [False, True])
def test_files_are_trained_on_where_they_lie(tmp_path: Path, strings: bool) -> None:
    source, dst = tmp_path / "hub", tmp_path / "index"
    hub_table(source / "train-0.parquet", 0, 40, strings=strings)
    hub_table(source / "train-1.parquet", 40, 23, groups=5, strings=strings)
    hub_table(source / "test-0.parquet", 0, 9, strings=strings)
    options = {} if strings else {"classes": ",".join(NAMES)}
    manifest = index("table", str(source), str(dst), config(**options))
    assert [path.name for path in dst.iterdir()] == ["manifest.json"]
    assert index("table", str(source), str(dst), config(**options)) == manifest
    assert manifest.split("train").columns == {"image": "image.bytes", "label": "label"}
    data = DataConfig(url=str(dst), executor="inline", image_size=(8, 8))
    assert load_data(data) == manifest
    check_files(data, manifest)
    rows = joined(list(train_batches(data, manifest, TrainShare(0, 21, 21, 0, 3), "cpu")))
    assert sorted(rows["sample_id"].tolist()) == list(range(63))
    for image, label, number in zip(rows["image"], rows["label"], rows["sample_id"], strict=True):
        assert (image[0].numpy() == numbered_image(int(number))).all() and int(label) == int(number) % 3
    found = joined(list(eval_batches(data, manifest, EvalShare("test", 9), "cpu")))
    assert found["label"].tolist() == [n % 3 for n in range(9)]


def test_row_groups_of_any_sizes_are_found(tmp_path: Path) -> None:
    assert group_runs([5, 5, 5, 2]) == ((17, 5),)
    assert group_runs([5, 2, 5, 5, 9]) == ((7, 5), (10, 5), (9, 9))
    sizes = [5, 2, 5, 5, 9, 1, 1, 4]
    shards = (
        ShardInfo(name="a", rows=3, rows_per_group=2, bytes=9),
        ShardInfo(name="b", rows=sum(sizes), rows_per_group=9, bytes=9, groups=group_runs(sizes)),
    )
    groups = RowGroups.of(Split(shards=shards))
    places = list(zip(*(part.tolist() for part in groups.locate(np.arange(3 + sum(sizes)))), strict=True))
    assert places == [(0, 0, 0), (0, 0, 1), (0, 1, 0)] + [
        (1, group, row) for group, size in enumerate(sizes) for row in range(size)
    ]
    table = pa.table({"image": [png(numbered_image(n)) for n in range(sum(sizes))]})
    (tmp_path / "hub").mkdir()
    with pq.ParquetWriter(tmp_path / "hub" / "train.parquet", table.schema) as writer:
        for number, size in enumerate(sizes):
            writer.write_table(table.slice(sum(sizes[:number]), size))
    manifest = index("table", str(tmp_path / "hub"), str(tmp_path / "out"), config())
    data = DataConfig(url=str(tmp_path / "out"), executor="inline", image_size=(8, 8))
    rows = joined(list(train_batches(data, manifest, TrainShare(0, 8, 8, 0, 4), "cpu")))
    assert sorted(rows["sample_id"].tolist()) == list(range(32))
    for image, number in zip(rows["image"], rows["sample_id"], strict=True):
        assert (image[0].numpy() == numbered_image(int(number))).all()


def test_a_file_that_changed_since_is_refused_by_name(tmp_path: Path) -> None:
    hub_table(tmp_path / "hub" / "train-0.parquet", 0, 20)
    hub_table(tmp_path / "hub" / "test-0.parquet", 0, 5)
    manifest = index("table", str(tmp_path / "hub"), str(tmp_path / "out"), config())
    data = DataConfig(url=str(tmp_path / "out"), image_size=(8, 8))
    path = tmp_path / "hub" / "train-0.parquet"
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=r"hub/train-0\.parquet: changed since it was indexed"):
        check_files(data, manifest)
    hub_table(path, 0, 21)
    with pytest.raises(UserError, match=r"train-0.parquet: \d+ bytes, wanted \d+"):
        check_files(data, manifest)
    path.unlink()
    with pytest.raises(UserError, match="train-0.parquet: missing"):
        check_files(data, manifest)


def test_bad_samples_of_indexed_files_are_quarantined_under_their_place(tmp_path: Path) -> None:
    hub_table(tmp_path / "hub" / "train-0.parquet", 0, 20, row3=b"no image")
    manifest = index("table", str(tmp_path / "hub"), str(tmp_path / "out"), config())
    data = DataConfig(url=str(tmp_path / "out"), image_size=(8, 8), executor="inline", max_bad_fraction=1)
    quarantine = Quarantine()
    list(train_batches(data, manifest, TrainShare(0, 20, 20, 0, 1), "cpu", quarantine))
    assert [problem.key for problem in quarantine.problems.values()] == ["train-0.parquet#0.3"]


def test_files_that_cannot_be_indexed_are_refused(tmp_path: Path) -> None:
    hub_table(tmp_path / "hub" / "train-0.parquet", 0, 20)
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="digits .*--index"):
        index("digits", None, out)
    for number, table in enumerate(
        (
            pa.table({"image": pa.array([b"x"]), "label": [1]}),
            pa.table({"image": [{"bytes": b"x", "path": ""}], "label": [1.5]}),
            pa.table({"image": [{"bytes": b"x", "path": ""}]}),
        )
    ):
        pq.write_table(table, tmp_path / "hub" / "train-1.parquet")
        with pytest.raises(UserError, match=r"train-1\.parquet.*--index") as caught:
            index("table", str(tmp_path / "hub"), out + str(number), config(classes="a,b,c"))
        assert "\n" not in str(caught.value)
    (tmp_path / "hub" / "train-1.parquet").unlink()
    index("table", str(tmp_path / "hub"), out, config(classes="a,b,c"))
    with pytest.raises(UserError, match="data set hub"):
        index("table", str(tmp_path / "hub"), out, config(classes="a,b,d"))


def test_indexed_files_are_inspected_in_place(tmp_path: Path) -> None:
    for number in range(2):
        hub_table(tmp_path / "hub" / f"train-{number}.parquet", 20 * number, 20)
    out = str(tmp_path / "out")
    index("table", str(tmp_path / "hub"), out, config(classes="a,b,c"))
    found = inspect(out, verify=True)
    assert found.sound and sum(found.splits["train"].classes.values()) == 40
    page = write_page(found, tmp_path / "page.html").read_text()
    assert "train-1.parquet#" in page
    manifest = load_manifest(out)
    reader = Reader.of(out, manifest, manifest.split("train"))
    places = reader.locate(np.arange(40))
    keys = [reader.row_groups({place[:2]})[place[:2]].value("key", place[2]) for place in places]
    assert reader.keys(np.arange(40)) == keys and len(set(keys)) == 40
    hub_table(tmp_path / "hub" / "train-0.parquet", 0, 21)
    (tmp_path / "hub" / "train-1.parquet").unlink()
    faults = inspect(out).faults
    assert "bytes, wanted" in faults[0] and faults[1].endswith("train-1.parquet: missing")


def test_the_command_writes_an_index(tmp_path: Path) -> None:
    hub_table(tmp_path / "hub" / "train-0.parquet", 0, 20)
    arguments = ["table", str(tmp_path / "hub"), str(tmp_path / "out"), "--index", "--option", "classes=a,b,c"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "hub, 20 train, 3 classes" in result.output
    assert Manifest.model_validate_json((tmp_path / "out" / "manifest.json").read_text()).split("train").samples == 20
