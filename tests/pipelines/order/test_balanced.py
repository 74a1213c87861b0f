"""The balanced order: each class equally often at every point of the run, the same batches everywhere, nothing kept."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines.features import ImageFeature, LabelsFeature
from pipelines.feed.ingest import DataConfig, TrainShare, load_data, sample_plan, train_batches
from pipelines.index import index
from pipelines.order.balanced import BalancedPlan, ClassIndex
from pipelines.order.mixture import MixturePart
from pipelines.order.plan import RowGroups
from pipelines.prepare import PrepareConfig
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.labels import class_index
from pipelines.shards.manifest import Manifest, Split, arrow_schema, load_manifest, save_manifest
from tests.pipelines.feed.test_ingest import Batches, joined, same
from tests.pipelines.toys import numbered_image, png, to_format_1, write_images

LABELS = st.lists(st.lists(st.integers(-1, 6), max_size=4), min_size=1, max_size=60)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder for each test."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PERCEIVER_CACHE", str(place))
    return place / "classes"


def index_of(labels: list[list[int]], classes: int) -> ClassIndex:
    """Return the index of samples with some classes each."""
    pairs = np.array([(row, label) for row, own in enumerate(labels) for label in own], np.int64).reshape(-1, 2)
    return ClassIndex.of(pairs[:, 0], pairs[:, 1], classes)


@st.composite
def plans(draw: st.DrawFn) -> tuple[BalancedPlan, list[set[int]]]:
    """Draw plans over samples of none, one or several classes; each of the first classes has a sample."""
    classes = draw(st.integers(1, 7))
    drawn = draw(LABELS)
    labels = [[label for label in own if label < classes] for own in drawn] + [[label] for label in range(classes)]
    plan = BalancedPlan(
        RowGroups([len(labels)], [draw(st.integers(1, 9))]),
        index_of(labels, classes),
        draw(st.integers(0, 2**40)),
        draw(st.sampled_from([1, 6, 24, 40])),
    )
    return plan, [set(own) for own in labels]


@settings(max_examples=60, deadline=None)
@given(LABELS)
def test_the_index_has_each_sample_of_each_class_once_in_order(labels: list[list[int]]) -> None:
    found = index_of(labels, 5)
    for number in range(5):
        own = found.members[found.first[number] : found.first[number + 1]].tolist()
        assert own == [row for row, classes in enumerate(labels) if number in classes]
    assert found.counts.sum() == found.members.size


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 10**12))
def test_each_class_is_drawn_once_in_each_cycle(drawn: tuple[BalancedPlan, list[set[int]]], cycle: int) -> None:
    plan, labels = drawn
    classes = plan.index.counts.size
    ids, epochs = plan.at(np.arange(cycle * classes, (cycle + 2) * classes))
    kinds = (epochs % classes).tolist()
    assert sorted(kinds[:classes]) == sorted(kinds[classes:]) == list(range(classes))
    assert all(kind in labels[row] for kind, row in zip(kinds, ids.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(0, 50))
def test_a_pass_of_a_class_has_each_of_its_samples_once(drawn: tuple[BalancedPlan, list[set[int]]], turn: int) -> None:
    plan, labels = drawn
    classes = plan.index.counts.size
    for kind, count in enumerate(plan.index.counts.tolist()):
        ids, epochs = plan.at(np.arange(turn * count * classes, (turn + 1) * count * classes))
        own = ids[epochs % classes == kind]
        assert sorted(own.tolist()) == [row for row, own in enumerate(labels) if kind in own]
        assert (epochs[epochs % classes == kind] == turn * classes + kind).all(), "no view of a sample is repeated"


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(0, 10**9), st.integers(1, 6), st.integers(1, 9))
def test_ranks_and_restarts_share_the_same_batches(
    drawn: tuple[BalancedPlan, list[set[int]]], start: int, steps: int, world: int
) -> None:
    plan, _ = drawn
    alone = plan.share(start, start + steps)
    together = np.concatenate([plan.share(start, start + steps, rank, world).ids for rank in range(world)], axis=1)
    assert [row[row >= 0].tolist() for row in together] == alone.ids.tolist()
    assert (plan.share(start + steps - 1, start + steps).ids[0] == alone.ids[-1]).all()
    runs = list(plan.runs(start, start + steps, 4))
    assert [step for first, last in runs for step in range(first, last)] == list(range(start, start + steps))


def test_the_order_depends_on_the_seed_alone() -> None:
    """A run may be resumed by a newer version of this program: change the numbers only with a note to users."""
    found = index_of([[row % 3, row % 7 // 3] for row in range(40)], 3)
    orders = [BalancedPlan(RowGroups([40], [8]), found, seed, 12).share(7, 8).ids[0].tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] == [14, 23, 37, 15, 35, 28, 39, 5, 22, 11, 33, 12]


def write_tags(folder: Path, tags: list[list[int] | None], classes: str = "abcd") -> Manifest:
    """Write a data set of pictures with a list of classes each, in two shards."""
    features = {"image": ImageFeature(channels=1, size=(8, 8)), "label": LabelsFeature()}
    rows = [{"key": f"{number}", "image": png(numbered_image(number)), "label": own} for number, own in enumerate(tags)]
    infos = []
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        with ShardWriter(open_folder(str(folder)), f"train-{number}.arrow", arrow_schema(features), 3) as writer:
            writer.write(part)
            infos.append(writer.close())
    manifest = Manifest(
        name="tags", features=features, classes=tuple(classes), splits={"train": Split(shards=tuple(infos))},
        licence="none", source="made up",
    )  # fmt: skip
    save_manifest(manifest, open_folder(str(folder)))
    return manifest


@pytest.fixture
def toy(tmp_path: Path) -> DataConfig:
    """Write 43 training images of four classes."""
    write_images(tmp_path / "toy", {"train": [30, 13], "test": [8]})
    return DataConfig(url=str(tmp_path / "toy"), executor="inline", order="balanced", run_samples=40, cache_bytes=4096)


def take(data: DataConfig, start: int, stop: int, rank: int = 0, world: int = 1) -> Batches:
    """Return one rank's batches of 24 / world."""
    share = TrainShare(3, 24, 24 // world, start, stop, rank, world)
    return list(train_batches(data, load_data(data), share, "cpu"))


def test_batches_are_balanced_at_any_world_size_after_restarts_and_on_ray(toy: DataConfig, small_ray: None) -> None:
    wanted = take(toy, 0, 6)
    for batch in wanted:
        assert Counter(batch["label"].tolist()) == dict.fromkeys(range(4), 6)
        for image, number in zip(batch["image"], batch["sample_id"], strict=True):
            assert (image[0].numpy() == numbered_image(int(number))).all()
    halves = [take(toy, 2, 6, rank, 2) for rank in range(2)]
    for step in range(2, 6):
        assert same(joined([half[step - 2] for half in halves]), wanted[step])
    large = toy.model_copy(update={"executor": "ray", "cache_bytes": 1 << 20})
    assert all(same(a, b) for a, b in zip(take(large, 0, 6), wanted, strict=True))


def test_labels_of_all_formats_give_the_same_index(toy: DataConfig, tmp_path: Path) -> None:
    manifest = load_manifest(toy.url)
    found = class_index(toy.url, manifest, "train")
    assert found.members.tolist() == [row for kind in range(4) for row in range(43) if row % 4 == kind]
    old = class_index(toy.url, to_format_1(Path(toy.url)), "train")
    (tmp_path / "raw").mkdir()
    images = [png(numbered_image(row)) for row in range(43)]
    table = pa.table({"image": images, "label": ["abcd"[row % 4] for row in range(43)]})
    pq.write_table(table, tmp_path / "raw" / "train.parquet", row_group_size=10)
    config = PrepareConfig(options={"image": "image", "label": "label", "classes": "a,b,c,d"})
    indexed = class_index("unused", index("table", str(tmp_path / "raw"), str(tmp_path / "i"), config), "train")
    for other in (old, indexed):
        assert other.members.tolist() == found.members.tolist() and other.first.tolist() == found.first.tolist()


def test_samples_of_several_classes_are_drawn_for_each_and_those_of_none_never(tmp_path: Path) -> None:
    tags = [[0, 1], [1], [], None, [2, 2], [0], [3, 1], [7]]
    write_tags(tmp_path, tags)
    data = DataConfig(url=str(tmp_path), order="balanced", executor="inline", max_bad_fraction=1, eval_split="train")
    plan = sample_plan(data, load_data(data), seed=0, global_batch=8)
    assert isinstance(plan, BalancedPlan)
    assert plan.index.counts.tolist() == [2, 3, 1, 1]
    assert set(plan.share(0, 50).ids.ravel().tolist()) == {0, 1, 4, 5, 6}


def test_the_pass_over_the_labels_is_kept(toy: DataConfig, cache: Path) -> None:
    manifest = load_manifest(toy.url)
    found = class_index(toy.url, manifest, "train").members.tolist()
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert class_index(toy.url, manifest, "train").members.tolist() == found, "a damaged file is replaced"
    for shard in Path(toy.url).glob("*.arrow"):
        shard.unlink()
    assert class_index(toy.url, manifest, "train").members.tolist() == found, "no shard is read again"
    kept.unlink()
    with pytest.raises(UserError, match=r"train-\d\.arrow: missing") as caught:
        class_index(toy.url, manifest, "train")
    assert "\n" not in str(caught.value)


def test_a_truncated_shard_is_refused(toy: DataConfig) -> None:
    shard = Path(toy.url) / "train-1.arrow"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError, match=r"train-1\.arrow") as caught:
        class_index(toy.url, load_manifest(toy.url), "train")
    assert "\n" not in str(caught.value)


def test_a_shard_of_other_rows_is_refused(toy: DataConfig) -> None:
    manifest = load_manifest(toy.url)
    first, last = manifest.split("train").shards
    longer = Split(shards=(first, last)).model_copy(update={"shards": (first, last.model_copy(update={"rows": 14}))})
    with pytest.raises(UserError, match=r"train-1\.arrow has 13 rows, the manifest 14"):
        class_index(toy.url, manifest.model_copy(update={"splits": {"train": longer}}), "train")


def test_what_cannot_be_balanced_is_refused_before_the_run(toy: DataConfig, tmp_path: Path) -> None:
    write_tags(tmp_path / "tags", [[0], [2], [0, 2], [0]])
    manifest = load_manifest(toy.url)
    unlabelled = manifest.model_copy(update={"features": {"image": manifest.features["image"]}})
    part = MixturePart(url=toy.url, weight=1)
    for change, data, message in (
        ({"url": str(tmp_path / "tags")}, load_manifest(str(tmp_path / "tags")), "no sample of b, d: "),
        ({}, unlabelled, "needs the feature 'label' .*has image: "),
        ({"mixture": (part,)}, manifest, r"cannot be combined with data\.mixture"),
        ({"lanes": 2}, manifest, r"cannot be combined with data\.lanes"),
        ({"window": 20}, manifest, r"cannot be combined with data\.window"),
        ({"train_split": "none"}, manifest, "no split 'none'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            sample_plan(toy.model_copy(update=change), data, seed=0, global_batch=24)
        assert "\n" not in str(caught.value)
