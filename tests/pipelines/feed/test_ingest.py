"""Ingest: the same global batches at every world size, after a restart, with and without Ray; nothing bad or lost."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines.feed import ingest
from pipelines.feed.ingest import (
    DataConfig,
    EvalShare,
    TrainShare,
    batch_shapes,
    eval_batches,
    joined_runs,
    train_batches,
)
from pipelines.shards import reader
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, load_manifest, save_manifest
from pipelines.shards.quarantine import Problem, Quarantine
from pipelines.transforms.image import AugmentConfig
from tests.pipelines.toys import (
    CLASSES,
    flip,
    numbered_image,
    png,
    read_shard,
    to_format_1,
    write_images,
    write_parquet_shard,
)

AUGMENT = AugmentConfig(shift=1, rotate=10, flip=True)
Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Write 103 training images in two ragged shards, and 21 to evaluate on."""
    folder = tmp_path_factory.mktemp("toy")
    write_images(folder, {"train": [60, 43], "test": [21]})
    return DataConfig(url=str(folder), executor="inline", augment=AUGMENT, run_samples=40, window=10)


def take(
    data: DataConfig,
    start: int,
    stop: int,
    *,
    rank: int = 0,
    world: int = 1,
    micro: int = 6,
    batch: int = 24,
    **options: Any,
) -> Batches:
    """Return one rank's micro-batches."""
    share = TrainShare(3, batch, micro, start, stop, rank, world)
    return list(train_batches(data, load_manifest(data.url), share, "cpu", **options))


def joined(batches: Batches) -> dict[str, torch.Tensor]:
    """Return all rows in order."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two batches are equal in every bit."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def global_batches(data: DataConfig, start: int, stop: int, world: int, micro: int) -> list[dict[str, torch.Tensor]]:
    """Return the global batch of each step, put together from all ranks."""
    per_step = 24 // world // micro
    ranks = [take(data, start, stop, rank=rank, world=world, micro=micro) for rank in range(world)]
    return [
        joined([batch for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]])
        for step in range(stop - start)
    ]


def test_splits_read_in_one_process_stay_apart(tmp_path: Path) -> None:
    """The process of a data task reads every split, so cached row groups of one must not be used for another."""
    write_images(tmp_path, {"train": [20], "test": [20]}, apart=True)
    data = DataConfig(url=str(tmp_path), executor="inline")
    manifest = load_manifest(data.url)
    take(data, 0, 2)
    for split, first in (("test", 20), ("train", 0), ("test", 20)):
        batches = list(eval_batches(data, manifest, EvalShare(split, 20), "cpu"))
        assert joined(batches)["image"][:, 0, 0, 0].tolist() == list(range(first, first + 20))


def test_batches_have_the_contract_s_keys_shapes_and_types(toy: DataConfig) -> None:
    batches = take(toy, 0, 3)
    assert len(batches) == 12
    assert {name: (tuple(value.shape), value.dtype) for name, value in batches[0].items()} == {
        "image": ((6, 1, 8, 8), torch.uint8),
        "label": ((6,), torch.int64),
        "sample_id": ((6,), torch.int64),
        "valid": ((6,), torch.bool),
    }
    assert batch_shapes(toy, load_manifest(toy.url)) == {"image": (1, 8, 8), "label": ()}
    assert all(batch["valid"].all() for batch in batches)


def test_rows_are_the_stored_samples(toy: DataConfig) -> None:
    rows = joined(take(toy.model_copy(update={"augment": AugmentConfig()}), 0, 9))
    for image, label, number in zip(rows["image"], rows["label"], rows["sample_id"], strict=True):
        assert (image[0].numpy() == numbered_image(int(number))).all()
        assert int(label) == int(number) % CLASSES


def test_each_sample_comes_once_an_epoch_across_batch_ends(toy: DataConfig) -> None:
    ids = joined(take(toy, 0, 43))["sample_id"].numpy()
    for epoch in range(10):
        assert (np.sort(ids[103 * epoch : 103 * (epoch + 1)]) == np.arange(103)).all()


@pytest.mark.parametrize("world, micro", [(1, 24), (2, 6), (4, 6), (8, 3), (3, 4)])
def test_global_batches_do_not_depend_on_the_world_size(toy: DataConfig, world: int, micro: int) -> None:
    wanted = global_batches(toy, 0, 11, 1, 6)
    assert all(same(a, b) for a, b in zip(global_batches(toy, 0, 11, world, micro), wanted, strict=True))


@pytest.mark.parametrize("start", [1, 4, 5, 9])
def test_a_restart_continues_with_the_same_batches(toy: DataConfig, start: int) -> None:
    assert all(same(a, b) for a, b in zip(take(toy, start, 11), take(toy, 0, 11)[4 * start :], strict=True))


def test_limits_of_memory_and_speed_do_not_change_batches(toy: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = joined(take(toy, 0, 9))
    for change in ({"run_samples": 1}, {"run_samples": 10_000}, {"cache_bytes": 1}, {"run_bytes": 1}):
        assert same(joined(take(toy.model_copy(update=change), 0, 9)), wanted)
    monkeypatch.setattr(ingest, "KEEP_DECODED_BYTES", 0)
    assert same(joined(take(toy, 0, 9)), wanted)


def test_augmentation_varies_with_the_epoch_alone(toy: DataConfig) -> None:
    rows = joined(take(toy, 0, 43))
    views: dict[int, set[bytes]] = {}
    for image, number in zip(rows["image"], rows["sample_id"], strict=True):
        views.setdefault(int(number), set()).add(image.numpy().tobytes())
    assert np.mean([len(found) for found in views.values()]) > 9


def test_ray_gives_the_inline_batches_across_segments(
    toy: DataConfig, small_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.feed import stream

    monkeypatch.setattr(stream, "RUNS_PER_DATASET", 3)
    data = toy.model_copy(update={"executor": "ray"})
    for world, rank, start in ((1, 0, 0), (2, 1, 7)):
        wanted = take(toy, start, 24, rank=rank, world=world)
        got = take(data, start, 24, rank=rank, world=world)
        assert len(got) == len(wanted) and all(same(a, b) for a, b in zip(got, wanted, strict=True))
        assert all(value.is_contiguous() for value in got[0].values())


def test_a_consumer_may_stop_early(toy: DataConfig, small_ray: None) -> None:
    data = toy.model_copy(update={"executor": "ray"})
    batches = train_batches(data, load_manifest(toy.url), TrainShare(3, 24, 24, 0, 100_000), "cpu")
    next(batches)
    batches.close()
    assert len(take(data, 0, 2)) == 8


@pytest.mark.parametrize("executor", ["inline", "ray"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_covers_the_split_once_padded(toy: DataConfig, small_ray: None, executor: str, world: int) -> None:
    data = toy.model_copy(update={"executor": executor})
    manifest = load_manifest(toy.url)
    parts = [list(eval_batches(data, manifest, EvalShare("test", 4, rank, world), "cpu")) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    rows = joined([batch for part in parts for batch in part])
    valid = rows["valid"]
    assert sorted(rows["sample_id"][valid].tolist()) == list(range(21))
    assert (rows["sample_id"][~valid] == -1).all() and (rows["image"][~valid] == 0).all()
    for image, number in zip(rows["image"][valid], rows["sample_id"][valid], strict=True):
        assert (image[0].numpy() == numbered_image(int(number))).all()


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (2, 12), (3, 8), (5, 5), (5, 2), (7, 4), (9, 1)])
def test_any_number_of_workers_gives_the_same_samples(toy: DataConfig, world: int, micro: int) -> None:
    """Each rank has the same number of rows; those that no sample fills are padding."""
    whole = take(toy, 2, 6, micro=24)
    shares = [take(toy, 2, 6, rank=rank, world=world, micro=micro) for rank in range(world)]
    per_step = math.ceil(math.ceil(24 / world) / micro)
    assert {len(batches) for batches in shares} == {4 * per_step}
    for step, wanted in enumerate(whole):
        rows = joined([batch for rank in shares for batch in rank[step * per_step : (step + 1) * per_step]])
        assert (rows["sample_id"][~rows["valid"]] == -1).all() and (rows["image"][~rows["valid"]] == 0).all()
        assert same({name: values[rows["valid"]] for name, values in rows.items()}, wanted)


BAD = (3, 4, 50, 99)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Write the toy with four truncated images in train and two in test (3 and 4 are neighbours in a row group)."""
    folder = tmp_path_factory.mktemp("damaged")
    write_images(folder, {"train": [60, 43], "test": [21]}, bad=BAD)
    return DataConfig(url=str(folder), executor="inline", max_bad_fraction=0.2, run_samples=40, window=10)


@pytest.mark.parametrize("micro", [6, 12])
def test_several_streams_side_by_side_change_nothing(damaged: DataConfig, small_ray: None, micro: int) -> None:
    """In 2,000 bytes fit too few decoded rows for a window, so each step is divided between two tasks."""
    wanted = take(damaged, 2, 9, rank=1, world=2, micro=micro)
    quarantine = Quarantine()
    data = damaged.model_copy(update={"executor": "ray", "prefetch_bytes": 2000})
    share = TrainShare(3, 24, micro, 2, 9, 1, 2)
    manifest = load_manifest(data.url)
    works = ingest.train_streams(data, manifest, ingest.sample_plan(data, manifest, seed=3, global_batch=24), share)
    assert [(work.rank, work.world) for work in works] == [(2, 4), (3, 4)]
    got = take(data, 2, 9, rank=1, world=2, micro=micro, quarantine=quarantine)
    assert len(got) == len(wanted) and all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert {problem.key for problem in quarantine.problems.values()} == {f"train/{number}" for number in BAD}


def test_keys_of_earlier_versions_are_left_out() -> None:
    former = {"url": "x", "read_apart": None, "read": {"checksums": False}}
    assert DataConfig.model_validate(former) == DataConfig(url="x")
    with pytest.raises(ValueError, match="read_apar"):
        DataConfig.model_validate({"url": "x", "read_apar": None})


def test_runs_are_joined_up_to_a_length() -> None:
    assert list(joined_runs(iter([(3, 5), (5, 9), (9, 10), (10, 20), (20, 21)]), 7)) == [(3, 10), (10, 20), (20, 21)]
    assert list(joined_runs(iter([]), 7)) == []


def test_windows_read_ahead_give_the_same_rows(toy: DataConfig) -> None:
    """One run over several windows, with memory to read ahead and without."""
    manifest = load_manifest(toy.url)
    plan = ingest.sample_plan(toy, manifest, seed=3, global_batch=24)
    for cache in (256 << 20, 1):
        work = ingest.rank_work(
            toy.model_copy(update={"cache_bytes": cache}), manifest, plan, rank=0, world=1, seed=3, batch=24
        )
        assert len(list(plan.runs(0, 9, 9))) > 2
        ids = np.concatenate([rows["sample_id"] for rows in work.rows(0, 9)])
        assert ids.tolist() == joined(take(toy, 0, 9))["sample_id"].tolist()


def test_rows_come_in_arrays_of_equal_size_across_windows(toy: DataConfig) -> None:
    """Otherwise Ray would join blocks from pieces, and their reader would copy them once more."""
    manifest = load_manifest(toy.url)
    plan = ingest.sample_plan(toy, manifest, seed=3, global_batch=24)
    work = ingest.rank_work(toy, manifest, plan, rank=0, world=2, seed=3, batch=12)
    work = dataclasses.replace(work, chunk=36)
    assert any(start * 12 % 36 for start, _ in plan.runs(0, 8, 8)), "some windows begin within an array"
    assert [len(rows["valid"]) for rows in work.rows(0, 8)] == [36, 36, 24]


def test_large_rows_come_from_a_stream_for_each_data_task(tmp_path: Path) -> None:
    """Small rows have several streams only if the samples shuffled together cannot wait decoded."""
    write_images(tmp_path, {"train": [20]})
    manifest = load_manifest(str(tmp_path))
    share = TrainShare(0, 8, 4, 0, 4)

    def streams(**options: Any) -> int:
        data = DataConfig(url=str(tmp_path), **options)
        plan = ingest.sample_plan(data, manifest, seed=0, global_batch=8)
        return len(ingest.train_streams(data, manifest, plan, share))

    assert streams() == 1
    assert streams(image_size=(128, 128)) == 2
    assert streams(image_size=(128, 128), executor="inline") == 1
    assert streams(prefetch_bytes=1) == 2


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_bad_samples_are_replaced_alike_everywhere_and_reported(
    damaged: DataConfig, small_ray: None, executor: str
) -> None:
    data = damaged.model_copy(update={"executor": executor})
    wanted = global_batches(damaged, 0, 9, 1, 24)
    quarantine = Quarantine()
    halves = [take(data, 0, 9, rank=rank, world=2, micro=12, quarantine=quarantine) for rank in range(2)]
    for step, whole in enumerate(wanted):
        assert same(joined([halves[0][step], halves[1][step]]), whole)
    assert sorted(number for _, number in quarantine.problems) == list(BAD)
    assert {problem.key for problem in quarantine.problems.values()} == {f"train/{number}" for number in BAD}
    rows = joined(wanted)
    assert rows["valid"].all() and not np.isin(rows["sample_id"].numpy(), BAD).any()
    first_epoch = rows["sample_id"][:103].tolist()
    assert set(first_epoch) == set(range(103)) - set(BAD)
    for image, number in zip(rows["image"], rows["sample_id"], strict=True):
        assert (image[0].numpy() == numbered_image(int(number))).all()


def test_a_bad_sample_is_left_out_of_the_evaluation(damaged: DataConfig) -> None:
    quarantine = Quarantine()
    manifest = load_manifest(damaged.url)
    rows = joined(list(eval_batches(damaged, manifest, EvalShare("test", 8), "cpu", quarantine)))
    assert sorted(rows["sample_id"][rows["valid"]].tolist()) == [n for n in range(21) if n not in BAD]
    assert sorted(number for _, number in quarantine.problems) == [3, 4]


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_too_many_bad_samples_stop_the_run_with_their_reasons(
    damaged: DataConfig, small_ray: None, executor: str
) -> None:
    data = damaged.model_copy(update={"executor": executor, "max_bad_fraction": 0.005})
    with pytest.raises(UserError, match=r"data\.max_bad_fraction.*0\.005.* x undecodable image.*train/\d+") as caught:
        take(data, 0, 40)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], *, known: bool) -> None:
    """Write a shard again with other columns, in the same row groups; the manifest may describe the new file."""
    manifest = load_manifest(str(path.parent))
    shards = list(manifest.splits["train"].shards)
    number = next(number for number, shard in enumerate(shards) if shard.name == path.name)
    if path.suffix == ".parquet":
        info = write_parquet_shard(path, change(pq.read_table(path)), shards[number].rows_per_group)
    else:
        table = change(read_shard(path))
        with ShardWriter(open_folder(str(path.parent)), path.name, table.schema, shards[number].rows_per_group) as sink:
            sink.write(table.to_pylist())
            info = sink.close()
    assert info is not None
    if known:
        shards[number] = info
        split = Split(shards=tuple(shards))
        save_manifest(manifest.model_copy(update={"splits": {"train": split}}), open_folder(str(path.parent)))


def without_labels(table: pa.Table) -> pa.Table:
    return table.drop_columns(["label"])


def with_float_labels(table: pa.Table) -> pa.Table:
    return table.set_column(2, "label", table["label"].cast("double"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    "name, damage, reason, lost",
    [
        ("train-1.arrow", Path.unlink, "missing", range(20, 40)),
        ("train-1.arrow", cut, "its size differs from the manifest", range(20, 40)),
        ("train-1.arrow", flip, "record batch at byte 232 is damaged: its CRC-32", range(20, 25)),
        (
            "train-1.arrow",
            lambda path: rewrite(path, without_labels, known=False),
            "its size differs from the manifest",
            range(20, 40),
        ),
        ("train-1.arrow", lambda path: rewrite(path, without_labels, known=True), "record batch at", range(20, 40)),
        ("train-1.arrow", lambda path: rewrite(path, with_float_labels, known=True), "record batch at", range(20, 40)),
        ("train-1.parquet", cut, "its size differs from the manifest", range(20, 40)),
        ("train-1.parquet", flip, "could not verify page integrity, CRC", range(20, 25)),
        (
            "train-1.parquet",
            lambda path: rewrite(path, without_labels, known=True),
            "no column label",
            range(20, 40),
        ),
        (
            "train-1.parquet",
            lambda path: rewrite(path, with_float_labels, known=True),
            "column label is double, wanted int64",
            range(20, 40),
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else None if isinstance(value, range) else value,
)
def test_a_shard_lost_in_mid_run_is_replaced_alike_everywhere(
    tmp_path: Path, name: str, damage: Callable[[Path], Any], reason: str, lost: range
) -> None:
    write_images(tmp_path, {"train": [20, 20, 8]})
    if name.endswith(".parquet"):
        to_format_1(tmp_path)
    damage(tmp_path / name)
    data = DataConfig(url=str(tmp_path), executor="inline", max_bad_fraction=1, run_samples=16)
    quarantine = Quarantine()
    rows = joined(take(data, 0, 2, quarantine=quarantine))
    halves = [take(data, 0, 2, rank=rank, world=2) for rank in range(2)]
    assert same(joined(halves[0][:2] + halves[1][:2] + halves[0][2:] + halves[1][2:]), rows)
    assert rows["valid"].all() and not set(rows["sample_id"].tolist()) & set(lost)
    for image, number in zip(rows["image"], rows["sample_id"], strict=True):
        assert (image[0].numpy() == numbered_image(int(number))).all()
    assert sorted(number for _, number in quarantine.problems) == list(lost)
    assert all(problem.reason.startswith(f"{name}: {reason}") for problem in quarantine.problems.values())
    assert sorted(problem.key for problem in quarantine.problems.values())[0] == f"{name}#0.0"
    assert quarantine.met == len(lost)
    with pytest.raises(UserError, match=rf"data\.max_bad_fraction.*0\.01.*\d+ x {name}: {reason}"):
        take(data.model_copy(update={"max_bad_fraction": 0.01}), 0, 2)


def test_a_folder_of_the_format_before_gives_the_same_batches(tmp_path: Path, toy: DataConfig) -> None:
    shutil.copytree(toy.url, tmp_path, dirs_exist_ok=True)
    old = to_format_1(tmp_path)
    assert load_manifest(str(tmp_path)) == old and not list(tmp_path.glob("*.arrow"))
    data = toy.model_copy(update={"url": str(tmp_path)})
    assert same(joined(take(data, 0, 9)), joined(take(toy, 0, 9)))


def test_ray_replaces_a_lost_shard_as_this_process_does(tmp_path: Path, small_ray: None) -> None:
    write_images(tmp_path, {"train": [20, 20, 8]})
    (tmp_path / "train-1.arrow").unlink()
    data = DataConfig(url=str(tmp_path), executor="ray", max_bad_fraction=1, run_samples=16)
    quarantine = Quarantine()
    assert same(
        joined(take(data, 0, 2, quarantine=quarantine)),
        joined(take(data.model_copy(update={"executor": "inline"}), 0, 2)),
    )
    assert quarantine.met == 20


def test_a_lost_shard_is_left_out_of_the_evaluation(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [2], "test": [10, 10]})
    (tmp_path / "test-0.arrow").unlink()
    data = DataConfig(url=str(tmp_path), executor="inline", max_bad_fraction=1)
    rows = joined(list(eval_batches(data, manifest, EvalShare("test", 20), "cpu")))
    assert rows["sample_id"].tolist() == list(range(20))
    assert rows["valid"].tolist() == [False] * 10 + [True] * 10


def test_a_shard_that_may_not_be_read_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"train": [20]})

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(reader, "read_batch", refuse)
    with pytest.raises(UserError, match=r"train-0\.arrow: not yours.*credentials"):
        take(DataConfig(url=str(tmp_path), executor="inline"), 0, 1)


def test_a_row_group_without_a_good_sample_is_replaced_and_a_data_set_without_one_gives_invalid_rows(
    tmp_path: Path,
) -> None:
    write_images(tmp_path / "half", {"train": [10]}, rows_per_group=5, bad=(0, 1, 2, 3, 4))
    data = DataConfig(url=str(tmp_path / "half"), executor="inline", max_bad_fraction=1)
    rows = joined(take(data, 0, 1, batch=10, micro=10))
    assert rows["valid"].all() and rows["sample_id"].min() >= 5
    write_images(tmp_path / "none", {"train": [10]}, rows_per_group=5, bad=tuple(range(10)))
    data = data.model_copy(update={"url": str(tmp_path / "none")})
    assert not joined(take(data, 0, 1, batch=10, micro=10))["valid"].any()


def test_labels_outside_the_classes_are_bad_samples(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [8]}).model_copy(update={"classes": ("a", "b", "c")})
    quarantine = Quarantine()
    list(
        train_batches(
            DataConfig(url=str(tmp_path), executor="inline"), manifest, TrainShare(0, 8, 8, 0, 1), "cpu", quarantine
        )
    )
    assert {p.reason for p in quarantine.problems.values()} == {"label 3 is not one of 3 classes"}


def test_the_quarantine_is_written_as_a_table(tmp_path: Path) -> None:
    quarantine = Quarantine(1.0)
    quarantine.add([Problem("train", 7, "b", "torn"), Problem("train", 2, "a", "empty")], met=2, seen=10, epoch_share=9)
    quarantine.add([Problem("train", 7, "b", "torn")], met=1, seen=10, epoch_share=9)
    quarantine.write(str(tmp_path / "run"))
    assert pq.read_table(tmp_path / "run" / "quarantine.parquet").to_pylist() == [
        {"split": "train", "sample_id": 2, "key": "a", "reason": "empty"},
        {"split": "train", "sample_id": 7, "key": "b", "reason": "torn"},
    ]
    assert (quarantine.met, quarantine.seen) == (3, 20)


def test_lanes_that_do_not_divide_the_batch_are_refused(toy: DataConfig) -> None:
    with pytest.raises(UserError, match=r"data\.lanes = 7\b"):
        take(toy.model_copy(update={"lanes": 7}), 0, 1)


def test_images_of_different_sizes_need_a_size(tmp_path: Path, toy: DataConfig) -> None:
    manifest = load_manifest(toy.url)
    feature = manifest.features["image"].model_copy(update={"size": None})
    open_sized: Manifest = manifest.model_copy(update={"features": {**manifest.features, "image": feature}})
    with pytest.raises(UserError, match=r"data\.image_size"):
        batch_shapes(toy, open_sized)
    data = toy.model_copy(update={"image_size": (5, 4)})
    assert batch_shapes(data, open_sized)["image"] == (1, 5, 4)
    assert take(data, 0, 1)[0]["image"].shape == (6, 1, 5, 4)
    assert len(png(numbered_image(1))) > 0


def test_data_written_again_in_the_same_place_are_read_again(tmp_path: Path) -> None:
    """In one process, as in a notebook, whose cache has the former ones."""
    data = DataConfig(url=str(tmp_path / "data"), executor="inline")
    for start in (0, 10):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write_images(tmp_path / "data", {"test": [4]}, start=start)
        batches = list(eval_batches(data, load_manifest(data.url), EvalShare("test", 4), "cpu"))
        assert joined(batches)["image"][:, 0, 0, 0].tolist() == list(range(start, start + 4))
