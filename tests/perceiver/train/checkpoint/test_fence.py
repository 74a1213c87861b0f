"""Drivers that were taken over: what they write afterwards is refused, and does not count if it lands all the same."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.record.lease import LeaseFile, acquire
from cluster.record.run_folder import RunFolder
from perceiver.export.weights import open_weights
from perceiver.storage import RetryPolicy, entry_names, open_url
from perceiver.train.checkpoint.fence import Claims, Fence, Owner, TakenOverError
from perceiver.train.checkpoint.hook import BackgroundSaver
from perceiver.train.checkpoint.ledger import Ledger, SampleLog
from perceiver.train.checkpoint.store import CheckpointStore
from perceiver.train.config import SavingConfig
from tests.faults.audit import audit
from tests.perceiver.train.checkpoint.test_ledger import info, planned
from tests.perceiver.train.checkpoint.test_store import snapshot
from tests.perceiver.train.toy import toy_engine


class Drivers:
    """Drivers that own a run, one after the other, none of which has ended."""

    def __init__(self, url: str) -> None:
        self.file, self.url = LeaseFile(url), url

    def take_over(self, step: int) -> Fence:
        """Let the next driver take over the run and start at a step."""
        number = self.file.newest() + 1
        before = self.file.readable(number - 1)
        owner = Owner.here(60.0, starts=before.starts if before else ()).started(number, step)
        self.file.write(number, owner)
        return Fence(self.url, number, owner.id)

    def store(self, fence: Fence | None) -> CheckpointStore:
        return CheckpointStore(f"{self.url}/checkpoints", fence)

    def folders(self) -> list[int]:
        """Return the steps of all folders, whether they count or not."""
        fs, path = open_url(f"{self.url}/checkpoints")
        return sorted(int(name.removeprefix("step-")) for name in entry_names(fs, path) if name.startswith("step-"))

    def save_late(self, fence: Fence, step: int) -> None:
        """Save a checkpoint as a driver whose checks were all before it was taken over."""
        late = Unchecked(fence.url, fence.number, fence.id)
        assert self.store(late).save(toy_engine(), snapshot(step))


class Unchecked(Fence):
    def taken_by(self) -> str:
        return ""


@pytest.fixture(params=["local", "memory"])
def drivers(request: pytest.FixtureRequest, tmp_path: Path) -> Drivers:
    return Drivers(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def test_a_checkpoint_of_a_driver_that_was_taken_over_does_not_count(drivers: Drivers) -> None:
    """Drivers start at 0, 4, 2 (a checkpoint was damaged) and 6; each but the last writes late."""
    first = drivers.take_over(0)
    drivers.store(first).save(toy_engine(), snapshot(4))
    second = drivers.take_over(4)
    drivers.save_late(first, 8)
    drivers.store(second).save(toy_engine(), snapshot(6))
    for fence in (second, None):
        assert drivers.store(fence).steps() == [4, 6]
    third = drivers.take_over(2)
    assert drivers.store(None).steps() == []
    drivers.store(third).save(toy_engine(), snapshot(3))
    drivers.save_late(second, 5)
    drivers.store(third).save(toy_engine(), snapshot(6))
    fourth = drivers.take_over(6)
    drivers.save_late(first, 12)
    drivers.save_late(second, 9)
    drivers.save_late(third, 7)
    for fence in (fourth, None):
        store = drivers.store(fence)
        newest = store.newest()
        assert store.steps() == [3, 6] and newest is not None and (newest.step, newest.lease) == (6, 3)
    drivers.save_late(third, 6)  # the step at which the fourth has started
    assert drivers.store(fourth).steps() == [3, 6]
    drivers.save_late(second, 6)
    assert drivers.store(fourth).steps() == [3]
    drivers.store(fourth).save(toy_engine(), snapshot(7))  # replaces the late one of this step
    assert drivers.store(None).steps() == [3, 7]
    drivers.store(fourth).prune({7})
    assert drivers.folders() == [7, 8, 9, 12]
    drivers.store(fourth).save(toy_engine(), snapshot(13))
    drivers.store(fourth).prune({13})
    assert drivers.folders() == [13]


def test_a_save_after_the_takeover_is_refused_and_deletes_nothing(drivers: Drivers) -> None:
    first = drivers.take_over(0)
    old = drivers.store(first)
    staged = old.stage(toy_engine(), snapshot(2))
    second = drivers.take_over(0)
    with pytest.raises(TakenOverError):
        old.publish(staged)
    new = drivers.store(second)
    new.save(toy_engine(), snapshot(4))
    staged = old.stage(toy_engine(), snapshot(4))
    for refused in (lambda: old.publish(staged), lambda: old.prune(())):
        with pytest.raises(TakenOverError, match="another driver has taken over this run"):
            refused()
    assert new.problems(4) == [] and new.steps() == [4]


def test_workers_of_a_driver_that_was_taken_over_stop_without_another_attempt(drivers: Drivers) -> None:
    saver = BackgroundSaver(
        drivers.store(drivers.take_over(0)), SavingConfig(), retries=RetryPolicy(attempts=2, backoff=600.0)
    )
    other = drivers.file.read(drivers.take_over(0).number)
    saver.start(toy_engine(), snapshot(2))
    saver.join(60)
    assert not saver.busy and str(other) in saver.refused and saver.failure


def test_the_ledger_shows_one_history(drivers: Drivers) -> None:
    """The second driver starts at step 4; the first one records other steps later, also with a late write."""
    url = f"{drivers.url}/ledger"
    first, samples = drivers.take_over(0), SampleLog()
    old = Ledger(url, 0, samples, 0, first)
    for step in range(1, 9):
        samples(info(step, 0, world=1))
    old.record(4)
    second = drivers.take_over(4)
    new = Ledger(url, 0, samples, 4, second)
    new.rewind(4)
    with pytest.raises(TakenOverError):
        old.record(6)
    old.fence = Unchecked(first.url, first.number, first.id)
    old.record(8)
    new.record(6)
    new.record(8)
    found = audit(url, 8, planned)
    assert found.exact and found.steps == 8


def test_a_run_folder_refuses_what_a_driver_that_was_taken_over_writes(tmp_path: Path) -> None:
    drivers = Drivers(str(tmp_path / "run"))
    folder = RunFolder(str(tmp_path), "run")
    owned = replace(folder, fence=drivers.take_over(0))
    owned.note(status="running")
    drivers.take_over(0)
    for write in (lambda: owned.note(status="failed"), lambda: owned.write("model.safetensors", b"")):
        with pytest.raises(TakenOverError):
            write()
    assert folder.facts()["status"] == "running" and not folder.exists("model.safetensors")


def test_a_run_without_numbers_is_resumed(tmp_path: Path) -> None:
    """Its checkpoints count up to the step at which the first driver with a number has started, without reading."""
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    for step in (2, 4):
        store.save(toy_engine(), snapshot(step))
    lease = acquire(LeaseFile(str(tmp_path)))
    owned = CheckpointStore(store.url, lease.fence)
    assert owned.steps() == [2, 4]
    lease.start_at(4)
    store.save(toy_engine(), snapshot(6))  # by the driver of an earlier version, stopped meanwhile
    (tmp_path / "checkpoints" / "step-00000008").mkdir()
    (tmp_path / "checkpoints" / "step-00000008" / "manifest.json").write_text("{")
    assert CheckpointStore(store.url, lease.fence).steps() == [2, 4, 8]
    assert CheckpointStore(store.url, lease.fence).problems(8)
    lease.release()
    assert Claims(str(tmp_path)).newest() == 1


def test_weights_of_a_run_are_never_those_of_a_late_checkpoint(tmp_path: Path) -> None:
    drivers = Drivers(str(tmp_path))
    first = drivers.take_over(0)
    drivers.store(first).save(toy_engine(), snapshot(2))
    drivers.take_over(2)
    drivers.save_late(first, 4)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(Exception, match="step-00000002"):  # which has no recipe
        open_weights(str(tmp_path))


def test_a_worker_in_another_folder_checks_the_same_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lease = acquire(LeaseFile("runs/small-001"), 30)
    monkeypatch.chdir("/")
    lease.fence.check()
    lease.release()
