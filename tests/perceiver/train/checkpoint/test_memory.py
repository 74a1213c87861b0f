"""Checkpoints in memory: complete or not counted, the same bytes as in storage, bounded, and never in the way."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perceiver.config import UserError
from perceiver.train.checkpoint.fence import Fence
from perceiver.train.checkpoint.ledger import SampleLog
from perceiver.train.checkpoint.memory import MemoryCheckpointHook, PartHolder, Peer, find_held, lay_out
from perceiver.train.checkpoint.store import CheckpointStore, Snapshot
from perceiver.train.hooks import History
from perceiver.train.loop import Flags, StepInfo
from tests.perceiver.train.checkpoint.test_hook import Ranks, engine_of, info
from tests.perceiver.train.toy import toy_batches, toy_engine


def hook_of(folder: Path, engine: Any, *targets: Peer, every: int = 2, lease: int = 0) -> MemoryCheckpointHook:
    fence = Fence(str(folder), lease, "") if lease else None
    return MemoryCheckpointHook(
        engine,
        CheckpointStore(str(folder / "staging"), fence),
        every,
        list(targets),
        snapshot=lambda info: Snapshot(info.step, 8 * info.step, {}, {}, {}, {}, "", {}),
        samples=lambda step: SampleLog().table(0, step),
        history=History(),
        log_every=1,
        failed=lambda reason: None,
    )


def after(hook: MemoryCheckpointHook, step: int) -> StepInfo:
    """Return the argument after a step, with the flags of all ranks."""
    flags = Flags(*(count > 0 for count in hook.engine.sum([float(flag) for flag in hook.flags()])))
    return replace(info(step), flags=flags)


class Lost(PartHolder):
    """A holder whose node is lost."""

    def begin(self, *_: object) -> None:
        raise ConnectionError("node lost")

    held = read = begin  # type: ignore[assignment]


class Slow(PartHolder):
    """A holder that takes nothing until `ready` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = threading.Event()

    def begin(self, *arguments: Any) -> None:
        assert self.ready.wait(60)
        super().begin(*arguments)


def test_a_checkpoint_in_memory_has_the_bytes_of_one_in_storage(tmp_path: Path) -> None:
    engine, holder = toy_engine(), PartHolder()
    for step, batch in enumerate(toy_batches(0, 4)):
        engine.step([batch], step)
    hook = hook_of(tmp_path, engine, holder)
    hook(after(hook, 4))
    hook.join()
    stored, copy = CheckpointStore(str(tmp_path / "stored")), CheckpointStore(str(tmp_path / "copy"))
    stored.save(engine, Snapshot(4, 32, {}, {}, {}, {}, "", {}))
    held = find_held([holder], 0)
    assert held is not None and held.save[0] == 4
    lay_out(held, copy)
    newest = copy.newest()
    assert newest is not None and newest.step == 4
    for name in stored.manifest(4).files:
        there, here = (Path(store.folder(4), name).read_bytes() for store in (stored, copy))
        assert there == here, name
    restored = toy_engine()
    assert restored.load(Path(copy.folder(4))) == 4
    batch = next(toy_batches(4, 5))
    assert restored.step([batch], 4).loss == engine.step([batch], 4).loss
    assert not any((tmp_path / "staging").rglob("*")), "nothing is left on the disk"


def test_a_save_counts_with_the_parts_of_all_ranks_and_the_driver_s_number(tmp_path: Path) -> None:
    ranks, near, far = Ranks(2), PartHolder(), PartHolder()

    def work(rank: int, steps: range, targets: list[list[Peer]]) -> None:
        hook = hook_of(tmp_path, engine_of(ranks, rank), *targets[rank], lease=3)
        for step in steps:
            hook(after(hook, step))
            hook.join()

    assert ranks.run(lambda rank: work(rank, range(2, 5), [[near, far], [far, near]])) == [None, None]
    held = find_held([Lost(), far], 3)  # either holder has all parts
    assert held is not None and held.save[0] == 4 and held.manifest.world == 2
    assert find_held([near], 2) is None, "of another driver"
    lay_out(held, CheckpointStore(str(tmp_path / "copy")))
    assert {save[0] for save, _ in far.held()} == {2, 4}, "the complete one and the one that arrived"

    # After a restart from step 4, rank 1 sends to no one: step 6 is never complete, and step 4 stays.
    def again(rank: int) -> None:
        hook = replace(
            hook_of(tmp_path, engine_of(ranks, rank), *[[near], [Lost()]][rank], lease=3), complete=held.save
        )
        hook(after(hook, 6))
        hook.join()

    assert ranks.run(again) == [None, None]
    found = find_held([near], 3)
    assert found is not None and found.save == held.save


def test_a_complete_checkpoint_stays_until_the_next_one_is_complete(tmp_path: Path) -> None:
    holder = PartHolder()
    hook = hook_of(tmp_path, toy_engine(), holder)
    for step in (2, 4, 6):
        hook(after(hook, step))
        hook.join()
        assert {save[0] for save, _ in holder.held()} == {max(step - 2, 2), step}


def test_steps_do_not_wait_for_a_slow_holder_and_skipped_ones_are_counted(tmp_path: Path) -> None:
    holder = Slow()
    hook = hook_of(tmp_path, toy_engine(), holder)
    for step in (2, 3, 4, 5, 6):
        hook(after(hook, step))
    assert hook.skipped == 2 and find_held([holder], 0) is None
    holder.ready.set()
    hook.join()
    hook(after(hook, 8))
    hook.join()
    held = find_held([holder], 0)
    assert held is not None and held.save[0] == 8
    assert hook.history.rows[-1]["train/checkpoint_memory_skipped"] == 2


def test_a_lost_holder_is_replaced_and_reported_once(tmp_path: Path) -> None:
    said: list[str] = []
    first, second = PartHolder(), PartHolder()
    hook = replace(hook_of(tmp_path, toy_engine(), first, Lost(), second), failed=said.append)
    for step in (2, 3, 4, 5):
        hook(after(hook, step))
        hook.join()
    assert len(said) == 1 and "node lost" in said[0]
    assert first.held() == second.held() != {}


def test_without_a_holder_training_continues_and_it_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    hook = replace(hook_of(tmp_path, toy_engine(), Lost()), failed=said.append)
    for step in range(2, 10):
        hook(after(hook, step))
        hook.join()
    assert [line for line in said if "step 2 in memory was not saved" in line] and len(said) == 2


def test_damaged_and_lost_parts_are_refused(tmp_path: Path) -> None:
    holder = PartHolder()
    hook = hook_of(tmp_path, toy_engine(), holder)
    hook(after(hook, 2))
    hook.join()
    held = find_held([holder], 0)
    assert held is not None
    store = CheckpointStore(str(tmp_path / "copy"))
    with pytest.raises(OSError, match="no holder has"):
        lay_out(replace(held, parts={name: (rank, [Lost()]) for name, (rank, _) in held.parts.items()}), store)
    holder.add(held.save, 0, "rest.safetensors", 0, b"\xff")
    with pytest.raises(UserError, match=r"step 2 in memory is damaged.*rest\.safetensors"):
        lay_out(held, store)
