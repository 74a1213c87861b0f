"""Leases: one driver per run, whatever the clocks show and however the previous driver ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.record.lease import FILE, LeaseFile, Owner, acquire, hold
from cluster.runtime.session import raise_on_signal
from perceiver.config import UserError

LIFE = 0.8
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
        assert not lease.lost
    assert file.read() is None


def test_a_lease_is_renewed(file: LeaseFile) -> None:
    lease = acquire(file, LIFE)
    file.write(elsewhere(lease.owner))  # as seen by another machine
    until = time.monotonic() + 30
    while (found := file.read()) is None or found.beat < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    lease.release()


def test_an_expired_lease_is_taken_over(file: LeaseFile) -> None:
    file.write(elsewhere(Owner.here(LIFE)))
    until = time.monotonic() + 30
    while (file.age_s() or 0) <= LIFE:
        assert time.monotonic() < until
        time.sleep(0.02)
    second = acquire(file, 30)
    found = file.read()
    assert found is not None and found.id == second.owner.id
    second.release()


def test_a_driver_notices_that_its_lease_was_taken_over(file: LeaseFile) -> None:
    lease, other = acquire(file, LIFE), elsewhere(Owner.here(30))
    until = time.monotonic() + 30
    while not lease.lost:
        assert time.monotonic() < until
        file.write(other)  # again, if a renewal has just replaced it
        time.sleep(0.02)
    assert "another driver" in lease.lost and str(other) in lease.lost
    lease.release()
    found = file.read()
    assert found is not None and found.id == other.id


@pytest.mark.parametrize("shift", [-3600, 3600])
def test_a_clock_that_is_an_hour_off_neither_frees_nor_locks_a_run(tmp_path: Path, shift: float) -> None:
    file = LeaseFile(str(tmp_path))
    beats, stopped = threading.Semaphore(0), threading.Event()

    def beat() -> None:
        """Renew as a live owner on another machine; the store's clock is set after each renewal."""
        owner = elsewhere(Owner.here(LIFE))
        while not stopped.wait(LIFE / 8):
            owner = owner.model_copy(update={"beat": owner.beat + 1})
            file.write(owner)
            os.utime(file.path, (time.time() + shift, time.time() + shift))
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
    assert not (tmp_path / FILE).exists() and signal.getsignal(signal.SIGTERM) is before


def test_one_of_many_concurrent_drivers_gets_the_lease(tmp_path: Path) -> None:
    found: list[Any] = []

    def race() -> None:
        try:
            found.append(acquire(LeaseFile(str(tmp_path))))
        except UserError:
            found.append(None)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [lease for lease in found if lease is not None]
    winner.release()
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_lease_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    lease = acquire(LeaseFile(str(tmp_path)))
    assert json.loads((tmp_path / FILE).read_text())["life_s"] > 0
    lease.release()
    assert not (tmp_path / FILE).exists()


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
    ],
)
def test_a_lease_with_values_out_of_range_is_none(file: LeaseFile, change: dict[str, Any]) -> None:
    file.fs.makedirs(file.folder, exist_ok=True)
    file.fs.pipe_file(file.path, json.dumps({**Owner.here(LIFE).model_dump(), **change}).encode())
    assert file.read() is None
    with hold(file.url, 30) as lease:
        assert not lease.lost


def test_a_lease_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match=FILE), hold(str(tmp_path), 30):
        pass
    (tmp_path / FILE).rmdir()
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(UserError, match=FILE), hold(str(tmp_path), 30):
        pass
