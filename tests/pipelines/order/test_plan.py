"""The sample plan: every sample once per epoch, the same batches at every world size and from every step."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.hashing import GOLDEN, mix64
from pipelines.feed.samples import SampleRng, sample_stream
from pipelines.order.permutation import keys, permute
from pipelines.order.plan import EvalPlan, RowGroups, SamplePlan

SHARDS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=6)


@st.composite
def plans(draw: st.DrawFn) -> SamplePlan:
    """Draw plans of all shapes: ragged shards, several row group sizes, batches larger than an epoch."""
    shards = draw(SHARDS)
    lanes = draw(st.integers(1, 6))
    return SamplePlan.build(
        RowGroups(*zip(*shards, strict=True)),
        seed=draw(st.integers(0, 3)),
        lanes=lanes,
        global_batch=lanes * draw(st.integers(1, 12)),
        window=draw(st.integers(1, 40)),
    )


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 5))
def test_each_epoch_contains_each_sample_once(plan: SamplePlan, epoch: int) -> None:
    positions = np.arange(epoch * plan.samples, (epoch + 1) * plan.samples)
    ids, epochs = plan.at(positions)
    assert (epochs == epoch).all()
    assert (np.sort(ids) == np.arange(plan.samples)).all()


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 40), st.integers(1, 9), st.data())
def test_ranks_share_the_same_batches_at_any_world_size(
    plan: SamplePlan, start: int, steps: int, data: st.DataObject
) -> None:
    """In the same order, with padding at the end of a rank's rows: any number of ranks, more than samples, too."""
    world = data.draw(st.integers(1, plan.global_batch + 3))
    least = -(-plan.global_batch // world)
    rows = data.draw(st.none() | st.integers(least, least + 5))
    alone = plan.share(start, start + steps)
    together = [plan.share(start, start + steps, rank, world, rows) for rank in range(world)]
    assert {part.ids.shape for part in together} == {(steps, rows or least)}
    ids = np.concatenate([part.ids for part in together], axis=1)
    epochs = np.concatenate([part.epochs for part in together], axis=1)
    assert (ids[ids >= 0].reshape(alone.ids.shape) == alone.ids).all()
    assert (epochs[ids >= 0].reshape(alone.ids.shape) == alone.epochs).all()


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 30), st.integers(1, 30))
def test_any_step_can_be_asked_for_alone(plan: SamplePlan, start: int, steps: int) -> None:
    at_once = plan.share(start, start + steps)
    for step in range(steps):
        assert (plan.share(start + step, start + step + 1).ids[0] == at_once.ids[step]).all()


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 50), st.integers(0, 200), st.integers(1, 20))
def test_runs_cover_the_steps_in_order(plan: SamplePlan, start: int, steps: int, most: int) -> None:
    runs = list(plan.runs(start, start + steps, most))
    assert [step for first, last in runs for step in range(first, last)] == list(range(start, start + steps))
    assert all(0 < last - first <= most for first, last in runs)


def test_a_run_of_a_whole_window_reads_each_row_group_once_and_alone() -> None:
    plan = SamplePlan.build(RowGroups([4096, 4096], [64, 64]), seed=3, global_batch=64)
    assert (plan.lanes, plan.window) == (8, 256)
    reads: list[tuple[int, int]] = []
    for rank in range(2):
        for start, stop in plan.runs(0, 128, 1000):
            shard, group, _ = plan.groups.locate(plan.share(start, stop, rank, 2).ids.ravel())
            reads += set(zip(shard.tolist(), group.tolist(), strict=True))
    assert len(reads) == len(set(reads)) == 128


def test_ragged_sizes_cost_few_extra_reads() -> None:
    """Lanes that begin within a row group touch one more of five; windows end together in all lanes."""
    plan = SamplePlan.build(RowGroups([5003] * 200, [128] * 200), seed=0, global_batch=256)
    start, stop = list(plan.runs(4000, 4500, 10**9))[2]
    assert stop - start in (63, 64)
    for rank in (0, 7):
        ids = plan.share(start, stop, rank, 8).ids.ravel()
        shard, group, _ = plan.groups.locate(ids)
        touched = len(set(zip(shard.tolist(), group.tolist(), strict=True)))
        assert touched <= 1.5 * ids.size / 128


def test_epochs_and_seeds_differ_and_epochs_repeat_nothing() -> None:
    groups = RowGroups([1000, 1000], [50, 50])
    first = SamplePlan.build(groups, seed=1, global_batch=40)
    other = SamplePlan.build(groups, seed=2, global_batch=40)
    orders = [first.at(np.arange(2000) + 2000 * epoch).ids for epoch in range(3)] + [other.at(np.arange(2000)).ids]
    for number, order in enumerate(orders):
        assert (np.sort(order) == np.arange(2000)).all()
        assert all((order == before).mean() < 0.01 for before in orders[:number])


def test_label_runs_of_a_sorted_data_set_vanish() -> None:
    """In storage order neighbours always share one of 10 labels; batches are nearly as mixed as random ones."""
    samples, classes = 20_000, 10
    labels = np.arange(samples) * classes // samples
    plan = SamplePlan.build(RowGroups([samples], [64]), seed=0, global_batch=256)
    batches = labels[plan.share(0, samples // 256).ids]
    assert (labels[1:] == labels[:-1]).mean() > 0.999
    assert (batches[:, 1:] == batches[:, :-1]).mean() < 0.35
    counts = np.array([np.bincount(batch, minlength=classes) for batch in batches])
    assert counts.std(axis=0).mean() < 2 * np.sqrt(256 * 0.1 * 0.9)
    assert abs(np.corrcoef(counts[1:].ravel(), counts[:-1].ravel())[0, 1]) < 0.6


@pytest.mark.parametrize("batch, lanes", [(64, 8), (8192, 1024), (96, 12), (97, 1), (4, 1), (100, 10), (1, 1)])
def test_lanes_follow_from_the_batch(batch: int, lanes: int) -> None:
    assert SamplePlan.build(RowGroups([500], [10]), seed=0, global_batch=batch).lanes == lanes


def test_a_thousand_ranks_and_a_billion_samples_fit_in_little_memory() -> None:
    groups = RowGroups(np.full(20_000, 50_003), np.full(20_000, 128))
    plan = SamplePlan.build(groups, seed=0, global_batch=16_384)
    tracemalloc.start()
    for step in (0, 61_000, 10_000_000):
        batches = [plan.share(step, step + 2, rank, 1024) for rank in (0, 1, 511, 1023)]
        whole = plan.share(step, step + 1).ids[0]
        assert np.unique(whole).size == whole.size == 16_384
        assert (batches[0].ids[0] == whole[:16]).all() and (batches[-1].ids[0] == whole[-16:]).all()
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 40))
def test_evaluation_sees_each_sample_once_in_equally_many_batches(samples: int, world: int, batch: int) -> None:
    plan = EvalPlan(samples, batch)
    parts = [plan.share(0, plan.batches(world), rank, world).ids for rank in range(world)]
    assert {part.shape for part in parts} == {(plan.batches(world), batch)}
    seen = np.concatenate(parts).ravel()
    assert (np.sort(seen[seen >= 0]) == np.arange(samples)).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**32))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert (np.sort(permute(np.arange(size), size, key)) == np.arange(size)).all()


@pytest.mark.parametrize("size", [3, 5, 31, 100])
def test_permutations_are_even(size: int) -> None:
    """Each element gets each position equally often over many keys: chi-square per degree of freedom near 1."""
    draws = 5000
    out = permute(np.arange(size)[None, :], size, keys(7, np.arange(draws))[:, None])
    counts = np.stack([(out == value).sum(axis=0) for value in range(size)])
    expected = draws / size
    assert ((counts - expected) ** 2 / expected).sum() / (size - 1) ** 2 < 3


def test_the_order_does_not_change_between_versions() -> None:
    """A run may be resumed by a newer version of this program: change these numbers only with a note to users."""
    plan = SamplePlan.build(RowGroups([4000], [128]), seed=1, global_batch=64)
    assert plan.share(100, 101).ids[0, :8].tolist() == [712, 3264, 3267, 2896, 2737, 2922, 2869, 2776]
    assert SampleRng(sample_stream(1, 2, 3))().integers(0, 1000, 4).tolist() == [194, 176, 370, 605]


def test_samples_draw_independently() -> None:
    draws = np.array(
        [SampleRng(sample_stream(0, epoch, sample))().uniform(size=3) for epoch in (0, 1) for sample in range(4000)]
    )
    for shift in (1, 4000):
        related = np.corrcoef(draws[:-shift].T, draws[shift:].T) - np.eye(6)
        assert np.abs(related).max() < 5 / math.sqrt(4000)


def test_one_integer_is_scrambled_as_an_array_is() -> None:
    assert [mix64(value + GOLDEN) for value in range(50)] == keys(np.arange(50)).tolist()
