"""The ledger: every step's samples are on disk, however the process ended; the audit finds lost and doubled ones."""

import json
from pathlib import Path

import pytest
import torch

from perceiver.train.checkpoint import ledger as ledgers
from perceiver.train.checkpoint.ledger import Ledger, SampleLog
from perceiver.train.engine.protocol import StepResult
from perceiver.train.loop import StepInfo, sample_ids
from tests.faults.audit import audit

BATCH = 6


def planned(step: int) -> list[int]:
    return [(step * BATCH + i) % 100 for i in range(BATCH)]


def info(step: int, rank: int, world: int = 2) -> StepInfo:
    share = BATCH // world
    ids = torch.tensor(planned(step)[rank * share : (rank + 1) * share])
    result = StepResult(step - 1, 0.5, {}, 1.0, 0.1, False)
    return StepInfo(step, 100, step / 10, BATCH, 0.1, 0.0, result, False, tuple(ids.split(2)))


def run(url: str, start: int, saves: list[int], stop: int, world: int = 2) -> None:
    """Take the steps after ``start`` up to ``stop``, recording at the saves; then end without a last save."""
    for rank in range(world):
        samples = SampleLog()
        ledger = Ledger(url, rank, samples, start)
        if rank == 0:
            ledger.rewind(start)
        for step in range(start + 1, stop + 1):
            samples(info(step, rank, world))
            if step in saves:
                ledger.record(step)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ledger") if request.param == "local" else f"memory://{tmp_path.name}/ledger"


def test_a_run_that_was_killed_and_resumed_with_more_workers_is_exact(url: str) -> None:
    run(url, 0, [4, 8], 10)
    run(url, 4, [6], 8)  # the checkpoint at 8 was damaged: the steps after 4 are repeated
    run(url, 6, [9, 12], 12, world=3)
    found = audit(url, 12, planned)
    assert found.exact and found.steps == 12 and not found.voided


def test_lost_and_doubled_samples_are_found(tmp_path: Path) -> None:
    url = str(tmp_path / "ledger")
    run(url, 0, [4, 8], 8)
    (tmp_path / "ledger" / "steps-00000005-00000008" / "rank-00001.parquet").unlink()
    extra = tmp_path / "ledger" / "steps-00000002-00000004" / "rank-00000.parquet"
    extra.parent.mkdir()
    extra.write_bytes((tmp_path / "ledger" / "steps-00000001-00000004" / "rank-00000.parquet").read_bytes())
    found = audit(url, 9, planned)
    assert not found.exact
    assert {step for step, _ in found.lost} == {5, 6, 7, 8, 9} and len(found.lost) == 4 * 3 + 6
    assert {step for step, _ in found.doubled} == {1, 2, 3, 4}


def test_rolled_back_steps_are_reported(url: str) -> None:
    run(url, 0, [4, 8], 8)
    Ledger(url, 0, SampleLog(), 8).discard(4, 7)
    found = audit(url, 8, planned)
    assert found.exact and found.voided == {5, 6, 7}
    Ledger(url, 0, SampleLog(), 4).rewind(4)
    assert audit(url, 4, planned).voided == set()


def test_what_a_failed_write_left_out_is_written_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = SampleLog()
    ledger = Ledger(str(tmp_path / "ledger"), 0, samples, 0)
    samples(info(1, 0, world=1))
    with monkeypatch.context() as broken, pytest.raises(OSError):
        broken.setattr(ledgers, "write_whole", lambda *_: (_ for _ in ()).throw(OSError("full")))
        ledger.record(1)
    samples(info(2, 0, world=1))
    ledger.record(2)
    samples.forget(2)
    assert samples.steps == {} and audit(str(tmp_path / "ledger"), 2, planned).exact


def test_rows_without_a_sample_are_marked() -> None:
    batch = {"sample_id": torch.tensor([3, 4]), "valid": torch.tensor([True, False])}
    assert sample_ids(batch).tolist() == [3, -1]


def test_a_void_file_is_json(tmp_path: Path) -> None:
    Ledger(str(tmp_path), 0, SampleLog(), 0).discard(2, 5)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == {"first": 3, "last": 5}


def test_remembered_ids_keep_no_block_of_data_alive() -> None:
    seen, log = info(1, 0), SampleLog()
    log(seen)
    for kept, given in zip(log.steps[1], seen.sample_ids, strict=True):
        assert torch.equal(kept, given)
        assert kept.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
        assert kept.untyped_storage().nbytes() == kept.nbytes
