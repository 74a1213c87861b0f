"""Workers start from the newest checkpoint of memory and storage, and from storage if memory fails."""

from pathlib import Path

import pytest
import torch

from cluster.record.run_folder import RunFolder
from cluster.worker.peers import Start, end_start, find_start
from perceiver.train.checkpoint.ledger import SampleLog
from perceiver.train.checkpoint.memory import MemoryCheckpointHook, PartHolder, Peer
from perceiver.train.checkpoint.store import CheckpointStore, Snapshot
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import History
from tests.perceiver.train.checkpoint.test_hook import info
from tests.perceiver.train.toy import toy_engine


def saved(step: int) -> Snapshot:
    return Snapshot(step, 8 * step, {}, {}, {}, {}, '{"step": 1}\n')


def send(folder: Path, step: int, holder: Peer) -> None:
    """Save a step in memory, with the samples of the steps 1 to `step`."""
    log = SampleLog()
    log.steps = {number: (torch.tensor([number, -1]),) for number in range(1, step + 1)}
    store = CheckpointStore(str(folder / "sender"))
    hook = MemoryCheckpointHook(
        toy_engine(), store, 1, [holder], lambda info: saved(step), lambda last: log.table(0, last), History(), 1
    )
    hook(info(step))
    hook.join()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("PERCEIVER_CACHE", str(tmp_path / "cache"))
    folder = RunFolder(str(tmp_path / "runs"), "small-001")
    folder.checkpoints.save(toy_engine(), saved(4))
    return folder


def found(run: RunFolder, *peers: Peer) -> Start:
    return find_start(run, peers, 0, True, torch.device("cpu"))


@pytest.mark.parametrize(("sent", "origin", "step"), [(3, "storage", 4), (4, "storage", 4), (6, "memory", 6)])
def test_the_newest_counts(run: RunFolder, tmp_path: Path, sent: int, origin: str, step: int) -> None:
    holder = PartHolder()
    send(tmp_path, sent, holder)
    start = found(run, holder)
    assert (start.origin, start.step, start.stored) == (origin, step, 4)
    assert start.store.history(step) == '{"step": 1}\n' and start.store.manifest(step).step == step
    assert (start.place == "memory") == (origin == "memory")


def test_the_samples_that_the_ledger_lacks_come_along_and_nothing_is_left(run: RunFolder, tmp_path: Path) -> None:
    holder, log = PartHolder(), SampleLog()
    send(tmp_path, 6, holder)
    start = found(run, holder)
    start.samples(log)
    assert {step: [ids.tolist() for ids in each] for step, each in log.steps.items()} == {5: [[5, -1]], 6: [[6, -1]]}
    engine: Engine = toy_engine()
    end_start(start, engine, leads=True)
    assert not any((tmp_path / "cache").rglob("*.safetensors"))


def test_a_damaged_checkpoint_in_memory_is_not_used(run: RunFolder, tmp_path: Path) -> None:
    holder = PartHolder()
    send(tmp_path, 6, holder)
    ((save, rank),) = holder.held()
    holder.add(save, rank, "rest.safetensors", 0, b"\xff")
    start = found(run, holder)
    assert (start.origin, start.step, start.stored) == ("storage", 4, 4)


def test_without_holders_or_their_answer_the_store_counts(run: RunFolder) -> None:
    class Lost(PartHolder):
        def held(self) -> dict[tuple[tuple[int, int], int], str]:
            raise ConnectionError("node lost")

    for start in (found(run), found(run, Lost(), PartHolder())):
        assert (start.origin, start.step) == ("storage", 4)
