"""One data set, a sample in a hundred damaged: all are named and replaced by the same ones everywhere, none is lost.

The kinds are in `damage.py`. What is damaged before a data set is prepared (members of tars, meshes, rows of tables)
is tested with the sources; damage of shards comes last here.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines.features import AudioFeature, ImageFeature, LabelFeature, PointsFeature, TextFeature
from pipelines.feed.ingest import DataConfig, EvalShare, TrainShare, eval_batches, train_batches
from pipelines.inspect.inspection import inspect
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, ShardInfo, Split, arrow_schema, load_manifest, save_manifest
from pipelines.shards.quarantine import Quarantine
from tests.pipelines.damage import BAD, ODD, POINTS, RATE, SAMPLES, SIDE, numbered
from tests.pipelines.toys import write_parquet_shard

TOTAL, SHARD, GROUP, BATCH = 2400, 600, 40, 48
FEATURES = {
    "image": ImageFeature(channels=3, size=(SIDE, SIDE)),
    "audio": AudioFeature(),
    "points": PointsFeature(),
    "text": TextFeature(),
    "label": LabelFeature(),
}
BAD_IDS = {37 + number * 97: kind for number, kind in enumerate(BAD)}
ODD_IDS = {5 + number * 151: kind for number, kind in enumerate(ODD)}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows of a shard; a text may be any bytes, as in files that other programs wrote."""
    columns = {}
    for name, kind in zip(arrow_schema(FEATURES).names, arrow_schema(FEATURES).types, strict=True):
        values = [row[name] for row in rows]
        if name == "text":
            raw = [value.encode() if isinstance(value, str) else value for value in values]
            columns[name] = pa.array(raw, pa.binary()).cast(pa.string(), safe=False)
        else:
            columns[name] = pa.array(values, kind)
    return pa.table(columns, arrow_schema(FEATURES))


def write_shard(folder: Path, name: str, rows: pa.Table) -> ShardInfo:
    """Write a Parquet shard, which other programs may write with damaged texts; return its entry in the manifest."""
    return write_parquet_shard(folder / name, rows, GROUP)


def write_manifest(folder: Path, shards: list[ShardInfo], format_version: int = 1) -> Manifest:
    """Write the manifest; one split serves training and evaluation."""
    manifest = Manifest(
        format_version=format_version,
        name="damaged",
        features=dict(FEATURES),
        classes=tuple("abcd"),
        source="made up",
        licence="none",
        splits={"train": Split(shards=tuple(shards))},
    )
    save_manifest(manifest, open_folder(str(folder)))
    return manifest


def sample(number: int) -> dict[str, Any]:
    """Return the sample of that id, damaged if it is one of the bad ones."""
    found = numbered(number)
    if number in BAD_IDS:
        part, stored, _ = BAD[BAD_IDS[number]]
        found[part] = stored
    if number in ODD_IDS:
        found[ODD[ODD_IDS[number]].part] = ODD[ODD_IDS[number]].stored
    return found


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Write the data set: 2,400 samples in four shards, a hundredth of them bad, some others odd."""
    assert len(BAD) >= 20 and len(BAD) <= TOTAL // 100 and not BAD_IDS.keys() & ODD_IDS.keys()
    assert max(*BAD_IDS, *ODD_IDS) < TOTAL
    folder = tmp_path_factory.mktemp("damaged")
    starts = range(0, TOTAL, SHARD)
    write_manifest(
        folder,
        [
            write_shard(folder, f"train-{shard}.parquet", table([sample(i) for i in range(start, start + SHARD)]))
            for shard, start in enumerate(starts)
        ],
    )
    return config(folder)


def config(folder: Path, **changes: Any) -> DataConfig:
    """Return the config to read it in this process, without augmentation."""
    return DataConfig.model_validate(
        {
            "url": str(folder),
            "executor": "inline",
            "eval_split": "train",
            "text_length": 40,
            "points": {"count": POINTS, "scale": [1, 1]},
            "audio": {"rate": RATE, "samples": SAMPLES},
            **changes,
        }
    )


def epoch(data: DataConfig, quarantine: Quarantine, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Return one rank's rows of an epoch."""
    share = TrainShare(
        seed=1,
        rank=rank,
        world=world,
        global_batch=BATCH,
        micro_batch=BATCH // world,
        start_step=0,
        stop_step=TOTAL // BATCH,
    )
    batches = list(train_batches(data, load_manifest(data.url), share, "cpu", quarantine))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_all_damage_is_caught_and_no_good_sample_is_lost(damaged: DataConfig, tmp_path: Path) -> None:
    quarantine = Quarantine(damaged.max_bad_fraction)
    rows = epoch(damaged, quarantine)
    found = {problem.sample_id: problem for problem in quarantine.problems.values()}
    assert found.keys() == BAD_IDS.keys()
    for number, kind in BAD_IDS.items():
        assert found[number].key == f"sample/{number:05d}.png"
        assert re.match(BAD[kind][2], found[number].reason), (kind, found[number].reason)
    assert quarantine.met == len(BAD)
    counts = np.bincount(rows["sample_id"].numpy(), minlength=TOTAL)
    good = np.setdiff1d(np.arange(TOTAL), list(BAD_IDS))
    assert rows["valid"].all() and counts.sum() == TOTAL
    assert (counts[list(BAD_IDS)] == 0).all() and (counts[good] >= 1).all()
    quarantine.write(str(tmp_path))
    listed = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert {(row["key"], row["reason"]) for row in listed} == {(p.key, p.reason) for p in found.values()}


def test_unusual_samples_are_read_correctly(damaged: DataConfig) -> None:
    manifest = load_manifest(damaged.url)
    batches = eval_batches(damaged, manifest, EvalShare("train", BATCH), "cpu")
    rows = {
        int(number): {name: batch[name][row].numpy() for name in batch}
        for batch in batches
        for row, number in enumerate(batch["sample_id"])
    }
    assert sorted(rows) == list(range(TOTAL))
    assert {number for number, row in rows.items() if not row["valid"]} == BAD_IDS.keys()
    for number, kind in ODD_IDS.items():
        part, _, seen, within = ODD[kind]
        wanted, got = seen().astype(float), rows[number][part].astype(float)
        if part == "text":
            got = got[1 : 1 + len(wanted)]
        assert np.abs(got - wanted).max() <= within, kind
    plain = rows[1000]
    assert plain["image"][0, 0, 0] == 1000 % 256 and plain["label"] == 0 and plain["audio"][0] == 1000 % 100


def test_replacements_do_not_depend_on_the_workers(damaged: DataConfig) -> None:
    whole = epoch(damaged, Quarantine())
    halves = [epoch(damaged, Quarantine(), rank, 2) for rank in range(2)]
    for name in ("sample_id", "image", "points"):
        joined = torch.stack([half[name].view(-1, BATCH // 2, *half[name].shape[1:]) for half in halves], dim=1)
        assert torch.equal(joined.flatten(0, 2), whole[name])


def test_over_the_budget_the_run_stops_with_the_reasons(damaged: DataConfig) -> None:
    data = damaged.model_copy(update={"max_bad_fraction": 0.002})
    with pytest.raises(UserError, match=r"data\.max_bad_fraction.*0\.002.*\d x .*, 1 x "):
        epoch(data, Quarantine(data.max_bad_fraction))


def test_inspect_names_the_same_samples(damaged: DataConfig) -> None:
    report = inspect(damaged.url).splits["train"]
    assert report.unreadable == len(BAD) and sum(report.reasons.values()) == len(BAD)
    for line in report.unreadable_samples:
        number = int(re.search(r"sample/(\d+)", line)[1])  # type: ignore[index]
        assert re.search(BAD[BAD_IDS[number]][2], line), line


@pytest.fixture
def shards(damaged: DataConfig, tmp_path: Path) -> tuple[Path, list[ShardInfo]]:
    """Return a copy of the data set whose files may be damaged, and its shards."""
    shutil.copytree(damaged.url, tmp_path, dirs_exist_ok=True)
    return tmp_path, list(load_manifest(damaged.url).splits["train"].shards)


def test_a_missing_shard_is_quarantined_row_by_row(shards: tuple[Path, list[ShardInfo]]) -> None:
    folder, infos = shards
    (folder / infos[2].name).unlink()
    with pytest.raises(UserError, match=r"x train-2\.parquet: missing"):
        epoch(config(folder), Quarantine(0.01))
    quarantine = Quarantine(0.3)
    rows = epoch(config(folder, max_bad_fraction=0.3), quarantine)
    lost = set(range(2 * SHARD, 3 * SHARD))
    assert {problem.sample_id for problem in quarantine.problems.values()} == lost | BAD_IDS.keys()
    assert set(rows["sample_id"].tolist()) == set(range(TOTAL)) - lost - BAD_IDS.keys() and rows["valid"].all()
    assert inspect(str(folder), samples=False).faults == ["train-2.parquet: missing"]


def changed(rows: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the rows with another column of that name."""
    return rows.set_column(rows.schema.get_field_index(name), name, column)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda rows: changed(rows, "label", pa.array(["a"] * SHARD)), "column label is string, wanted int64"),
        (lambda rows: rows.drop_columns(["points"]), "no column points"),
    ],
)
def test_a_shard_of_another_schema_is_quarantined(
    shards: tuple[Path, list[ShardInfo]], change: Any, reason: str
) -> None:
    folder, infos = shards
    infos[1] = write_shard(folder, "train-1.parquet", change(table([numbered(i) for i in range(SHARD, 2 * SHARD)])))
    write_manifest(folder, infos)
    quarantine = Quarantine(0.3)
    rows = epoch(config(folder, max_bad_fraction=0.3), quarantine)
    reasons = {problem.sample_id: problem.reason for problem in quarantine.problems.values()}
    assert set(rows["sample_id"].tolist()) == set(range(TOTAL)) - reasons.keys()
    assert all(reasons[number] == f"train-1.parquet: {reason}" for number in range(SHARD, 2 * SHARD))
    assert "train-1.parquet: columns" in inspect(str(folder), samples=False).faults[0]


def test_columns_that_lose_nothing_by_it_are_read_all_the_same(shards: tuple[Path, list[ShardInfo]]) -> None:
    folder, infos = shards
    rows = table([sample(i) for i in range(SHARD)])
    rows = changed(rows, "label", rows.column("label").cast(pa.int16()))
    rows = changed(rows, "image", rows.column("image").cast(pa.large_binary()))
    infos[0] = write_shard(folder, "train-0.parquet", rows)
    write_manifest(folder, infos)
    quarantine = Quarantine(0.01)
    epoch(config(folder), quarantine)
    assert {problem.sample_id for problem in quarantine.problems.values()} == BAD_IDS.keys()


def test_a_duplicated_shard_is_refused(shards: tuple[Path, list[ShardInfo]]) -> None:
    folder, infos = shards
    raw = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(raw.replace("train-3.parquet", "train-2.parquet"))
    with pytest.raises(UserError, match=r"train: train-2\.parquet .*twice"):
        load_manifest(str(folder))
    (folder / "manifest.json").write_text(raw.replace(infos[3].sha256, infos[2].sha256))
    with pytest.raises(UserError, match=r"train-3\.parquet .*train: train-2\.parquet"):
        load_manifest(str(folder))


def test_arrow_shards_give_the_same(damaged: DataConfig, tmp_path: Path) -> None:
    """All damage but texts that are not UTF-8, which an Arrow shard cannot have."""
    texts = {number for number, kind in BAD_IDS.items() if isinstance(BAD[kind][1], bytes) and BAD[kind][0] == "text"}
    folder, shards = open_folder(str(tmp_path)), []
    for shard, start in enumerate(range(0, TOTAL, SHARD)):
        with ShardWriter(folder, f"train-{shard}.arrow", arrow_schema(FEATURES), GROUP) as writer:
            writer.write(sample(i) | ({"text": ""} if i in texts else {}) for i in range(start, start + SHARD))
            shards.append(writer.close())
    write_manifest(tmp_path, [shard for shard in shards if shard], format_version=2)
    wanted, found = Quarantine(), Quarantine()
    rows = epoch(damaged, wanted)
    assert all(torch.equal(values, rows[name]) for name, values in epoch(config(tmp_path), found).items())
    assert found.problems.keys() == wanted.problems.keys() and len(found.problems) == len(BAD)
    for row, problem in found.problems.items():
        assert problem == wanted.problems[row] or row[1] in texts and problem.reason == "empty text"


def test_a_doubled_sample_is_named(tmp_path: Path) -> None:
    rows = [numbered(i) for i in range(9)] + [numbered(7) | {"key": "another name"}]
    write_manifest(tmp_path, [write_shard(tmp_path, "train-0.parquet", table(rows))])
    assert inspect(str(tmp_path)).splits["train"].double_samples == ["train: another name = train: sample/00007.png"]
