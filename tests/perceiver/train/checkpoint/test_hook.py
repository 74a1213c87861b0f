"""Checkpoints during training: in the background, on a schedule, retried, pruned; the same on all ranks."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perceiver.config import UserError
from perceiver.storage import RetryPolicy
from perceiver.train.checkpoint.hook import (
    BackgroundSaver,
    CheckpointHook,
    EveryEpochs,
    Listeners,
    Measured,
    best_steps,
    interval_s,
    kept,
)
from perceiver.train.checkpoint.shards import HEADER, save_header, shard_name
from perceiver.train.checkpoint.store import CheckpointManifest, CheckpointStore, Snapshot
from perceiver.train.config import KeepBest, SavingConfig
from perceiver.train.engine.protocol import StepResult
from perceiver.train.hooks import History
from perceiver.train.loop import Flags, StepInfo
from tests.perceiver.train.toy import toy_engine


class Ranks:
    """Some ranks as threads of this process; `sum` is a collective over them."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.values: list[list[float]] = [[]] * world

    def sum(self, rank: int, values: Sequence[float]) -> list[float]:
        self.values[rank] = list(values)
        self.barrier.wait()
        total = [sum(column) for column in zip(*self.values, strict=True)]
        self.barrier.wait()
        return [float(value) for value in total]

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Do the work on all ranks; return what each returned, or the exception that it raised."""
        found: list[Any] = [None] * self.world

        def body(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except Exception as error:  # noqa: BLE001
                found[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def engine_of(ranks: Ranks, rank: int) -> Any:
    """Return a toy engine that reports several ranks and writes one file per rank."""
    engine: Any = toy_engine()
    engine.rank, engine.world = rank, ranks.world
    engine.sum = lambda values: ranks.sum(rank, values)

    def save(folder: Path) -> None:
        (folder / shard_name(rank)).write_bytes(bytes([rank]) * 1000)
        if rank == 0:
            save_header(folder, {}, ranks.world)

    engine.save = save
    return engine


def info(step: int, total: int = 100, loss: float = 0.5) -> StepInfo:
    return StepInfo(step, total, step / 10, 8, 0.1, 0.0, StepResult(step - 1, loss, {}, 1.0, 0.1, False))


def after(hook: CheckpointHook, step: int, total: int = 100) -> None:
    """Call the hook as the loop does: with the flags of all ranks."""
    flags = Flags(*(count > 0 for count in hook.engine.sum([float(flag) for flag in hook.flags()])))
    hook(replace(info(step, total), flags=flags))


def snapshot(info: StepInfo, metrics: Mapping[str, float], number: int) -> Snapshot:
    return Snapshot(info.step, info.step * 8, {}, {}, {}, {}, "", metrics, number)


def hook_of(ranks: Ranks, rank: int, store: CheckpointStore, **options: Any) -> CheckpointHook:
    """Return a hook; options: attempts, figures, listeners, and keys of `SavingConfig`."""
    attempts, figures = options.pop("attempts", 3), options.pop("figures", lambda info: {})
    listeners = options.pop("listeners", Listeners())
    config = SavingConfig(**{"checkpoint_every": 0.1, **options})
    saver = BackgroundSaver(store, config, retries=RetryPolicy(attempts=attempts, backoff=0.001))
    assert config.checkpoint_every != "auto"
    cadence = EveryEpochs(config.checkpoint_every)
    return CheckpointHook(engine_of(ranks, rank), saver, cadence, History(), snapshot, figures, listeners)


class Gate:
    """Blocks every upload until it is opened."""

    def __init__(self, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, publish = threading.Event(), store.publish

        def held(staged: Any) -> None:
            assert self.open.wait(60)
            publish(staged)

        monkeypatch.setattr(store, "publish", held)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    url = str(tmp_path / "checkpoints") if request.param == "local" else f"memory://{tmp_path.name}/checkpoints"
    return CheckpointStore(url)


def test_training_continues_while_a_checkpoint_is_uploaded(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that becomes due during another one starts when that has ended; the loop waits for the last one."""
    gate, saved = Gate(store, monkeypatch), []
    hook = hook_of(Ranks(1), 0, store, listeners=Listeners(saved=lambda step, url: saved.append(step)))
    after(hook, 1)
    assert hook.saver.busy and store.steps() == []
    after(hook, 2)
    after(hook, 3)
    gate.open.set()
    hook.saver.join()
    after(hook, 4)
    assert hook.drain()
    assert saved == [1, 4]
    after(hook, 100)
    assert saved == [1, 4, 100] and store.steps() == [4, 100] and store.problems(100) == []
    (row, *_) = hook.history.rows
    assert 0 < row["train/checkpoint_stall_share"] <= 1


def test_all_ranks_save_together_and_only_complete_checkpoints_count(store: CheckpointStore) -> None:
    ranks = Ranks(3)

    def work(rank: int) -> None:
        hook = hook_of(ranks, rank, store)
        for step in (1, 2, 3):
            after(hook, step, total=3)

    assert ranks.run(work) == [None] * 3
    manifest = store.newest()
    assert manifest is not None and manifest.step == 3 and manifest.world == 3
    assert {HEADER, *map(shard_name, range(3)), "history.jsonl"} == set(manifest.files)


def test_a_failure_of_one_rank_costs_one_checkpoint_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, said = Ranks(2), []
    store = CheckpointStore(f"memory://{tmp_path.name}/checkpoints")
    put = store.fs.put_file

    def flaky(source: str, target: str) -> None:
        if f"step-00000001/{shard_name(1)}" in target:
            raise ConnectionError("reset by peer")
        put(source, target)

    monkeypatch.setattr(store.fs, "put_file", flaky)

    def work(rank: int) -> None:
        hook = hook_of(ranks, rank, store, listeners=Listeners(missed=said.append))
        after(hook, 1)
        hook.drain()
        after(hook, 2)
        hook.drain()

    assert ranks.run(work) == [None, None]
    assert store.steps() == [2]
    (reason,) = said
    assert "step-00000001 was not saved: ConnectionError: reset by peer" in reason


def test_too_many_misses_stop_the_run(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(staged: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "publish", full)
    hook = hook_of(Ranks(1), 0, store, checkpoint_misses=2)
    after(hook, 1)
    hook.saver.join()
    after(hook, 2)
    hook.saver.join()
    with pytest.raises(UserError, match=r"2 .*train\.checkpoint_misses.*No space left"):
        after(hook, 3)


def test_a_refusal_stops_all_ranks_at_once_without_another_try(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE1234")
    ranks, tries = Ranks(2), []
    publish = store.publish

    def refuse(staged: Any) -> None:
        tries.append(staged.rank)
        if staged.rank == 1:
            raise PermissionError("Access Denied")
        publish(staged)

    monkeypatch.setattr(store, "publish", refuse)

    def work(rank: int) -> None:
        hook = hook_of(ranks, rank, store)
        after(hook, 1)
        hook.drain()

    found = ranks.run(work)
    assert all(isinstance(error, UserError) for error in found) and sorted(tries) == [0, 1]
    assert "refuses access key ...1234 (Access Denied)" in str(found[1]) and store.url in str(found[1])


def test_the_last_checkpoint_must_be_saved(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "publish", lambda staged: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="last checkpoint .*step-.*disk full"):
        after(hook_of(Ranks(1), 0, store), 100)


def test_the_interval_follows_young_and_daly_within_the_stall_budget() -> None:
    assert interval_s(2.0, 10_000.0) == pytest.approx(200.0)
    assert interval_s(10.0, 3600.0) == pytest.approx(1000.0)
    for cost in (0.01, 1.0, 100.0):
        assert cost / interval_s(cost, 3600.0) <= 0.01 + 1e-9


def test_all_ranks_take_the_interval_that_rank_0_measured() -> None:
    ranks = Ranks(2)

    def work(rank: int) -> tuple[int, int]:
        cadence = Measured(engine_of(ranks, rank), mtbf_s=3600.0, start_step=40)
        due = [step for step in range(41, 60) if cadence.due(step, lambda epochs: False)]
        cadence.saved(45, stall_s=0.5 + rank, step_s=1.0 + rank)
        return due[0], cadence.next

    assert ranks.run(work) == [(45, 45 + 60)] * 2


def manifests(figures: Mapping[int, float]) -> dict[int, CheckpointManifest]:
    base: dict[str, Any] = {"samples": 0, "world": 1, "engine": {}, "parameters": {}, "recipe": {}, "versions": {}}
    return {
        step: CheckpointManifest(
            **base, step=step, created=0.0, files={}, number=number, metrics={"eval/loss": value} if value else {}
        )
        for number, (step, value) in enumerate(figures.items())
    }


def test_retention_keeps_the_newest_each_nth_and_the_best() -> None:
    found = manifests({10: 0.5, 20: 0.2, 30: 0.0, 40: float("nan"), 50: 0.2, 60: 0.9, 70: 0.8})
    best = KeepBest(metric="eval/loss", mode="min", count=2)
    assert best_steps(found, best) == [20, 50]
    assert kept(found, SavingConfig(keep_checkpoints=1)) == {70}
    assert kept(found, SavingConfig(keep_checkpoints=2, keep_every=3, keep_best=best)) == {10, 40, 70, 60, 20, 50}


def test_an_evaluation_among_the_best_is_saved_and_named(store: CheckpointStore) -> None:
    figures = {1: 0.3, 3: 0.7, 5: 0.5, 7: 0.9}
    best: list[int] = []
    hook = hook_of(
        Ranks(1),
        0,
        store,
        checkpoint_every=50.0,
        keep_checkpoints=1,
        keep_best=KeepBest(count=1),
        figures=lambda info: {"eval/accuracy": figures[info.step]} if info.step in figures else {},
        listeners=Listeners(best=lambda step, url: best.append(step)),
    )
    for step in range(1, 9):
        after(hook, step)
        hook.drain()
    assert best == [1, 3, 7] and store.steps() == [7]
    after(hook, 100)
    assert store.steps() == [7, 100] and best == [1, 3, 7]


def test_an_evaluation_among_the_best_waits_for_the_save_in_flight(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(store, monkeypatch)
    hook = hook_of(
        Ranks(1),
        0,
        store,
        keep_best=KeepBest(),
        figures=lambda info: {"eval/accuracy": 0.5} if info.step == 2 else {},
    )
    after(hook, 1)
    threading.Timer(0.05, gate.open.set).start()
    after(hook, 2)
    hook.drain()
    assert store.manifest(2).metrics == {"eval/accuracy": 0.5}
