"""Leases: one driver per run, whatever the clocks show and however the previous driver ended."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.record import lease as leases
from cluster.record.lease import LeaseFile, acquire, hold
from cluster.runtime.session import raise_on_signal
from perceiver.config import UserError
from perceiver.storage import write_whole
from perceiver.train.checkpoint.fence import BEFORE, Fence, Owner, TakenOverError
from tests.faults.race import bucket, rounds

LIFE = 0.8
CLAIM = "lease/00000001.json"
HOLDER = """
import sys, time
from cluster.record.lease import LeaseFile, acquire
lease = acquire(LeaseFile(sys.argv[1]), 60)
print("held", flush=True)
time.sleep(600)
"""


def elsewhere(owner: Owner) -> Owner:
    """Return the same owner on another machine, whose processes are not visible here."""
    return owner.model_copy(update={"host": "far", "boot": "another"})


@pytest.fixture(params=["local", "memory"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> LeaseFile:
    return LeaseFile(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def test_a_second_driver_is_refused_with_the_owner_and_the_expiry(file: LeaseFile) -> None:
    with hold(file.url, 30):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .*\d\d:\d\d:\d\d") as caught:
            acquire(file, 30)
        assert "\n" not in str(caught.value)
    with hold(file.url, 30) as lease:
        assert lease.number == 2 and not lease.taken_by
    found = file.read(2)
    assert found is not None and found.released


def test_a_lease_is_renewed(file: LeaseFile) -> None:
    lease = acquire(file, LIFE)
    until = time.monotonic() + 30
    while (found := file.read(1)) is None or found.beat < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    lease.release()


def test_an_expired_lease_is_taken_over(file: LeaseFile) -> None:
    file.write(1, elsewhere(Owner.here(LIFE)))
    until = time.monotonic() + 30
    while (file.age_s(1) or 0) <= LIFE:
        assert time.monotonic() < until
        time.sleep(0.02)
    second = acquire(file, 30)
    found = file.read(file.newest())
    assert second.number == 2 and found is not None and found.id == second.owner.id
    second.release()


def test_a_driver_notices_who_has_taken_over_and_changes_nothing_any_more(file: LeaseFile) -> None:
    lease, other = acquire(file, LIFE), elsewhere(Owner.here(30))
    lease.check()
    file.write(2, other)
    with pytest.raises(TakenOverError, match=rf"another driver has taken over this run \({other}\)"):
        lease.check()
    until = time.monotonic() + 30
    while any(thread.name == "lease" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.02)
    lease.release()
    first, second = file.read(1), file.read(2)
    assert first is not None and not first.released and second == other


def test_a_driver_whose_lease_was_deleted_or_replaced_stops(file: LeaseFile) -> None:
    lease = acquire(file, 30)
    file.write(1, elsewhere(Owner.here(30)))  # the run was deleted, and another one started in its place
    with pytest.raises(TakenOverError, match="on far"):
        lease.fence.check()
    file.fs.rm(f"{file.folder}/lease", recursive=True)
    with pytest.raises(TakenOverError, match="deleted"):
        lease.fence.check()
    lease.release()
    assert file.newest() == 0  # it does not write it again


@pytest.mark.parametrize("shifts", [(-3600,), (3600,), (3600, -3600)], ids=["behind", "ahead", "jumping"])
def test_a_clock_that_is_an_hour_off_or_jumps_neither_frees_nor_locks_a_run(
    tmp_path: Path, shifts: tuple[float, ...]
) -> None:
    file = LeaseFile(str(tmp_path))
    beats, stopped = threading.Semaphore(0), threading.Event()

    def beat() -> None:
        """Renew as a live owner on another machine; the store's clock is set after each renewal."""
        owner = elsewhere(Owner.here(LIFE))
        while not stopped.wait(LIFE / 8):
            owner = owner.model_copy(update={"beat": owner.beat + 1})
            shift = shifts[owner.beat % len(shifts)]
            file.write(1, owner)
            os.utime(file.path(1), (time.time() + shift, time.time() + shift))
            beats.release()

    thread = threading.Thread(target=beat)
    thread.start()
    assert beats.acquire(timeout=30)
    try:
        with pytest.raises(UserError, match=str(os.getpid())):
            acquire(file, LIFE)
    finally:
        stopped.set()
        thread.join()
    acquire(file, LIFE).release()  # no longer renewed: taken over although the time of its file is an hour off


def test_the_lease_of_a_killed_driver_is_free_on_its_machine(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], text=True, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} "):
            acquire(LeaseFile(str(tmp_path)))
        process.kill()
        process.wait()
        with hold(str(tmp_path)) as lease:
            assert lease.owner.pid == os.getpid()
    finally:
        process.kill()
        process.communicate()


def test_a_driver_that_is_terminated_while_it_starts_releases_its_lease(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), raise_on_signal(), hold(str(tmp_path), 30):
        signal.raise_signal(signal.SIGTERM)
    assert json.loads((tmp_path / CLAIM).read_text())["released"] and signal.getsignal(signal.SIGTERM) is before


def test_one_of_several_processes_takes_over_a_dead_drivers_run(tmp_path: Path) -> None:
    """In the first round they start at once; `python -m tests.faults.race` does 200 rounds, and some on S3."""
    assert rounds(str(tmp_path / "run"), 8, 10) == {1: 10}
    assert len(list((tmp_path / "run" / "lease").iterdir())) == 10


def test_a_store_creates_a_claim_only_once_or_is_asked_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 with conditional writes, a server that ignores the condition, and one without them."""
    waits: list[float] = []
    monkeypatch.setattr(leases.time, "sleep", waits.append)
    with bucket() as url:
        file, one, other = LeaseFile(f"{url}/run"), Owner.here(30), Owner.here(30)
        assert file.create(1, one) and not file.create(1, other) and not waits
        put = file.fs.pipe_file
        monkeypatch.setattr(file.fs, "pipe_file", lambda path, data, mode="": put(path, data))
        assert file.create(2, other) and waits == [leases.SETTLE_S]
        monkeypatch.setattr(file.fs, "pipe_file", lambda path, data: put(path, data))
        monkeypatch.setattr(leases.time, "sleep", lambda seconds: LeaseFile(file.url).write(3, one))
        assert not file.create(3, other)  # the other one wrote it meanwhile
        file.fs.clear_instance_cache()


def test_a_store_that_lists_late_hides_no_claim(file: LeaseFile, monkeypatch: pytest.MonkeyPatch) -> None:
    first = acquire(file, 30)
    second = file.read(1)
    assert second is not None
    file.write(2, elsewhere(second))
    monkeypatch.setattr("perceiver.train.checkpoint.fence.entry_names", lambda fs, path: [])
    assert file.newest() == 2
    with pytest.raises(UserError, match="in use by process"):
        acquire(file, 30)
    with pytest.raises(TakenOverError, match="on far"):
        first.fence.check()


def test_a_driver_that_was_delayed_before_it_takes_over_is_refused(file: LeaseFile) -> None:
    """It has found a dead driver; the run has been deleted since, and has had other drivers."""
    file.write(9, elsewhere(Owner.here(30)))
    assert not file.create(2, Owner.here(30))


def test_a_copy_of_a_running_run_is_free_soon_and_a_moved_one_stops_its_driver(tmp_path: Path) -> None:
    lease = acquire(LeaseFile(str(tmp_path / "run")), LIFE)
    file = LeaseFile(str(tmp_path / "copy"))
    file.write(1, lease.owner.model_copy(update={"life_s": 4.0}))  # by its age it would be in use for four seconds
    with hold(file.url, 30) as second:
        assert second.number == 2
        lease.fence.check()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(TakenOverError, match="deleted"):
        lease.fence.check()
    lease.release()
    assert not (tmp_path / "run").exists()
    with hold(str(tmp_path / "moved"), 30) as third:  # no longer renewed
        assert third.number == 2


def test_a_run_of_an_earlier_version_is_respected_and_then_has_numbers(file: LeaseFile) -> None:
    """Its driver stops when it finds its file deleted."""
    fields = {"id", "host", "boot", "pid", "began", "beat", "life_s"}
    write_whole(f"{file.folder}/{BEFORE}", Owner.here(30).model_dump_json(include=fields), file.fs)
    with pytest.raises(UserError, match="in use"):
        acquire(file, 30)
    dead = Owner.here(30).model_copy(update={"began": "0"})
    write_whole(f"{file.folder}/{BEFORE}", dead.model_dump_json(include=fields), file.fs)
    with hold(file.url, 30) as lease:
        assert lease.number == 1 and not file.fs.exists(f"{file.folder}/{BEFORE}")


def test_an_invalid_claim_is_ignored_and_the_starts_before_it_are_kept(tmp_path: Path) -> None:
    first = acquire(LeaseFile(str(tmp_path)))
    first.start_at(7)
    (tmp_path / "lease" / "00000002.json").write_text("{")
    with hold(str(tmp_path)) as third:
        third.start_at(5)
        assert third.number == 3 and third.owner.starts == ((3, 5),)
        third.start_at(9)
        assert third.owner.last_step(1) == 5 and third.owner.last_step(3) == math.inf
    assert Fence(str(tmp_path), 1, first.owner.id).taken_by() == str(third.owner)


@pytest.mark.parametrize(
    "change",
    [
        {"life_s": 1e300},
        {"life_s": 0},
        {"life_s": float("nan")},
        {"pid": -1},
        {"pid": "1"},
        {"beat": 1 << 70},
        {"id": 1},
        {"released": 1},
        {"starts": [[1, -1]]},
    ],
)
def test_a_lease_with_values_out_of_range_is_none(file: LeaseFile, change: dict[str, Any]) -> None:
    write_whole(file.path(1), json.dumps({**Owner.here(LIFE).model_dump(), **change}), file.fs)
    assert file.read(1) is None
    with hold(file.url, 30) as lease:
        assert lease.number == 2


def test_a_lease_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lease").write_text("")
    with pytest.raises(UserError, match="lease is not a folder"), hold(str(tmp_path), 30):
        pass
    (tmp_path / "lease").unlink()
    (tmp_path / CLAIM).mkdir(parents=True)
    with pytest.raises(UserError, match=CLAIM), hold(str(tmp_path), 30):
        pass
    (tmp_path / CLAIM).rmdir()
    os.mkfifo(tmp_path / CLAIM)
    with pytest.raises(UserError, match=CLAIM), hold(str(tmp_path), 30):
        pass
