"""Mixtures: exact weights at every point of the run, each data set in its own epochs, the same batches everywhere."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.config import UserError
from pipelines.features import LabelFeature
from pipelines.feed.ingest import (
    DataConfig,
    TrainShare,
    check_files,
    load_data,
    sample_plan,
    train_batches,
)
from pipelines.order.mixture import (
    MixedSplit,
    MixturePart,
    MixturePlan,
    mixed_manifest,
    mixing_table,
    readable_batch,
    whole_parts,
)
from pipelines.order.plan import RowGroups
from pipelines.shards.quarantine import Quarantine
from tests.pipelines.feed.test_ingest import Batches, joined, same
from tests.pipelines.toys import numbered_image, to_format_1, write_images

COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=7).map(tuple)


@st.composite
def plans(draw: st.DrawFn) -> MixturePlan:
    """Draw mixtures of one to four data sets of all shapes."""
    sets = draw(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4))
    groups = [RowGroups([rows], [per_group]) for rows, per_group, _ in sets]
    return MixturePlan.build(
        groups,
        [weight for *_, weight in sets],
        [None] * len(sets),
        seed=draw(st.integers(0, 3)),
        global_batch=draw(st.sampled_from([1, 6, 24, 40, 96])),
    )


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.integers(0, 2**40))
def test_the_weights_are_kept_within_one_sample_from_the_start_and_two_anywhere(
    counts: tuple[int, ...], seed: int
) -> None:
    which, before = mixing_table(counts, seed)
    assert which.size % sum(counts) == 0
    drawn = np.cumsum(which[:, None] == np.arange(len(counts)), axis=0)
    ahead = drawn * sum(counts) - np.arange(1, which.size + 1)[:, None] * np.array(counts)
    assert (np.abs(ahead) < sum(counts)).all(), "each prefix is within one sample of the weights"
    assert (ahead[-1] == 0).all(), "the complete table has them exactly, so its repetitions do, too"
    assert ((ahead.max(axis=0) - ahead.min(axis=0)) < 2 * sum(counts)).all(), "a stretch is the difference of prefixes"
    assert (before == (drawn - (which[:, None] == np.arange(len(counts))))[np.arange(which.size), which]).all()


@settings(max_examples=25, deadline=None)
@given(plans(), st.integers(0, 3))
def test_each_data_set_has_its_own_epochs(plan: MixturePlan, epoch: int) -> None:
    turns = max(
        -(-part.samples * sum(plan.counts) // count) for part, count in zip(plan.plans, plan.counts, strict=True)
    )
    positions = np.arange((epoch + 1) * turns + 2)
    which, draws = plan.drawn(positions)
    ids, epochs = plan.at(positions)
    for number, part in enumerate(plan.plans):
        here = which == number
        assert (draws[here] == np.arange(here.sum())).all()
        own = ids[here][epochs[here] == epoch] - plan.first[number]
        assert (np.sort(own) == np.arange(part.samples)).all()


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 40), st.integers(1, 6), st.data())
def test_ranks_and_restarts_share_the_same_batches(
    plan: MixturePlan, start: int, steps: int, data: st.DataObject
) -> None:
    world = data.draw(st.sampled_from([w for w in range(1, plan.global_batch + 1) if plan.global_batch % w == 0]))
    alone = plan.share(start, start + steps)
    together = [plan.share(start, start + steps, rank, world) for rank in range(world)]
    assert (np.concatenate([part.ids for part in together], axis=1) == alone.ids).all()
    assert (np.concatenate([part.epochs for part in together], axis=1) == alone.epochs).all()
    assert (plan.share(start + steps - 1, start + steps).ids[0] == alone.ids[-1]).all()
    runs = list(plan.runs(start, start + steps, 4))
    assert [step for first, last in runs for step in range(first, last)] == list(range(start, start + steps))


def test_the_order_depends_on_the_seed_alone() -> None:
    """A run may be resumed by a newer version of this program: change the numbers only with a note to users."""
    tables = [mixing_table((7, 3), seed)[0] for seed in (0, 0, 1)]
    assert (tables[0] == tables[1]).all() and (tables[0] != tables[2]).any()
    plan = MixturePlan.build(
        [RowGroups([100], [10]), RowGroups([50], [10])], [2, 1], [None, None], seed=1, global_batch=12
    )
    assert plan.share(7, 8).ids[0].tolist() == [4, 75, 108, 28, 116, 6, 3, 109, 21, 117, 9, 1]


@pytest.mark.parametrize(
    "weights, counts",
    [([0.7, 0.3], (7, 3)), ([2, 1], (2, 1)), ([1], (1,)), ([0.1, 0.2, 0.3], (1, 2, 3)), ([5, 5], (1, 1))],
)
def test_weights_are_taken_as_decimals(weights: list[float], counts: tuple[int, ...]) -> None:
    assert whole_parts(weights) == counts


def test_weights_of_many_digits_are_rounded_and_vanishing_ones_refused() -> None:
    counts = whole_parts([1281167, 50021, 314.159])
    assert sum(counts) == 65536
    assert counts[0] / 65536 == pytest.approx(1281167 / 1331502.159, abs=1e-4)
    with pytest.raises(UserError, match="weight 1 .*1/65536"):
        whole_parts([1, 1e7 + 1 / 3])


@pytest.mark.parametrize("share, batch", [(0.2, 1), (5.4, 5), (716.8, 715), (307.2, 308), (8, 8), (1024, 1024)])
def test_a_data_set_s_batch_divides_into_lanes(share: float, batch: int) -> None:
    assert abs(readable_batch(share) - share) <= max(1, 2.5)
    if batch >= 16:
        assert any(readable_batch(share) % draw == 0 for draw in range(8, 13))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Mix 70 images numbered from 0 and 30 numbered from 1000, three to two."""
    root = tmp_path_factory.mktemp("mixed")
    write_images(root / "a", {"train": [40, 30], "test": [10]})
    write_images(root / "b", {"train": [30], "test": [5]}, start=1000)
    parts = (MixturePart(url=str(root / "a"), weight=3), MixturePart(url=str(root / "b"), weight=2))
    return DataConfig(url=str(root / "a"), mixture=parts, executor="inline", run_samples=40)


def take(data: DataConfig, start: int, stop: int, rank: int = 0, world: int = 1, **options: Quarantine) -> Batches:
    """Return one rank's batches of 20 / world."""
    share = TrainShare(3, 20, 20 // world, start, stop, rank, world)
    return list(train_batches(data, load_data(data), share, "cpu", **options))


def test_batches_come_from_the_data_sets_by_weight(mixed: DataConfig) -> None:
    manifest = load_data(mixed)
    assert isinstance(manifest.split("train"), MixedSplit)
    assert manifest.split("train").samples == 100
    rows = joined(take(mixed, 0, 10))
    for image, number in zip(rows["image"], rows["sample_id"], strict=True):
        assert (image[0].numpy() == numbered_image(int(number) if number < 70 else int(number) - 70 + 1000)).all()
    second = rows["sample_id"].reshape(10, 20) >= 70
    assert (np.abs(second.sum(dim=1).numpy() - 8) < 2).all()
    assert int(second.sum()) == 80
    own = rows["sample_id"][rows["sample_id"] >= 70].tolist()
    assert sorted(own[:30]) == sorted(own[30:60]) == list(range(70, 100))


def test_a_mixture_is_the_same_at_any_world_size_after_restarts_and_on_ray(mixed: DataConfig, small_ray: None) -> None:
    wanted = take(mixed, 0, 8)
    halves = [take(mixed, 3, 8, rank, 2) for rank in range(2)]
    for step in range(3, 8):
        assert same(joined([half[step - 3] for half in halves]), wanted[step])
    got = take(mixed.model_copy(update={"executor": "ray"}), 0, 8)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_bad_sample_is_replaced_from_its_own_data_set(tmp_path: Path) -> None:
    write_images(tmp_path / "a", {"train": [40], "test": [5]})
    write_images(tmp_path / "b", {"train": [20, 20]}, start=1000)
    (tmp_path / "b" / "train-0.arrow").unlink()
    parts = tuple(MixturePart(url=str(tmp_path / name), weight=1) for name in "ab")
    data = DataConfig(url=str(tmp_path / "a"), mixture=parts, executor="inline", max_bad_fraction=1)
    quarantine = Quarantine()
    rows = joined(take(data, 0, 4, quarantine=quarantine))
    assert int((rows["sample_id"] >= 60).sum()) == int((rows["sample_id"] < 40).sum()) == 40
    assert {(p.split, p.reason) for p in quarantine.problems.values()} == {
        (f"train of {tmp_path}/b", "train-0.arrow: missing")
    }
    with pytest.raises(UserError, match=rf"{tmp_path}/b/train-0\.arrow: missing"):
        check_files(data, load_data(data))


def test_shards_of_both_formats_can_be_mixed(mixed: DataConfig, tmp_path: Path) -> None:
    for part in mixed.mixture:
        shutil.copytree(part.url, tmp_path / Path(part.url).name)
    to_format_1(tmp_path / "b")
    parts = tuple(part.model_copy(update={"url": str(tmp_path / Path(part.url).name)}) for part in mixed.mixture)
    data = mixed.model_copy(update={"url": str(tmp_path / "a"), "mixture": parts, "window": 20})
    check_files(data, load_data(data))
    assert same(joined(take(data, 0, 5)), joined(take(mixed.model_copy(update={"window": 20}), 0, 5)))


def test_data_sets_that_do_not_agree_are_refused(mixed: DataConfig, tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [4]})
    part = MixturePart(url="s3://other", weight=1)
    for change, message in (
        ({"classes": ("a", "b", "x", "d")}, "s3://other has other classes .* class 2 is 'x', wanted 'c'"),
        ({"classes": ("a",)}, "has other classes .* 1, wanted 4"),
        ({"features": {"image": manifest.features["image"]}}, "has the features image, .* image, label"),
        ({"features": {**manifest.features, "image": LabelFeature()}}, "feature 'image' of s3://other is"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            mixed_manifest(manifest, "train", [(part, manifest.model_copy(update=change))])
        assert "\n" not in str(caught.value)
    larger = manifest.features["image"].model_copy(update={"size": (9, 9)})
    other = manifest.model_copy(update={"features": {**manifest.features, "image": larger}})
    assert mixed_manifest(manifest, "train", [(part, other)]).features["image"].model_dump()["size"] is None
    with pytest.raises(UserError, match=r"data\.lanes = 2\b"):
        sample_plan(mixed.model_copy(update={"lanes": 2}), load_data(mixed), seed=0, global_batch=20)
