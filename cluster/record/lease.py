"""One driver per run: the claim of a driver, renewed while it runs. `perceiver.train.checkpoint.fence` has the format.

A driver takes a run over by the exclusive creation of the next number, so of several that find the same dead driver one
succeeds. No claim is deleted, and each driver writes its own alone: a late renewal of an older one changes nothing.

The clocks of machines are not trusted. A lease's age is the difference of two timestamps of the store, the lease's and
that of a probe written now. A lease that appears expired, or is from the future, is watched for a heartbeat before it
is taken over; so is one of another place, as the folder of a running run may have been copied. The lease of a process
that has ended on this machine is free.
"""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perceiver.config import UserError
from perceiver.storage import OBJECT_STORES, protocols, write_whole
from perceiver.train.checkpoint.fence import LIFE_S, Claims, Fence, Owner

log = logging.getLogger(__name__)

BEATS = 4
"""Renewals in the life of a lease."""
SETTLE_S = 5.0
"""Seconds between writing a claim and reading its owner, on a store without exclusive creation."""


@dataclass
class LeaseFile(Claims):
    """The claims of a run, as a driver writes them."""

    def write(self, number: int, owner: Owner) -> None:
        """Replace a claim atomically."""
        write_whole(self.path(number), owner.model_dump_json(), self.fs)

    def create(self, number: int, owner: Owner) -> bool:
        """Create a claim; return False if another driver was faster."""
        if self.local:
            self._link(number, owner)
        elif not self._put_new(number, owner):
            self.write(number, owner)
            time.sleep(SETTLE_S)
        found = self.read(number)  # an answer may be lost: a claim that exists may be ours
        return found is not None and found.id == owner.id and self.newest(number) == number

    def _link(self, number: int, owner: Owner) -> None:
        path = Path(self.path(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{owner.id}")
        scratch.write_text(owner.model_dump_json())
        try:
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
        finally:
            scratch.unlink()

    def _put_new(self, number: int, owner: Owner) -> bool:
        """Create an object unless it exists; return False if the store cannot do this, whatever it has done.

        Some servers ignore the condition: they would create the same object twice.
        """
        if not protocols(self.fs) & {*OBJECT_STORES, "memory"}:
            return False  # fsspec's default asks whether the file exists before it writes it
        try:
            for _ in range(2):
                self.fs.pipe_file(self.path(number), owner.model_dump_json().encode(), mode="create")
        except FileExistsError:
            return True
        except (TypeError, ValueError, NotImplementedError) as error:
            log.warning("%s has no exclusive creation (%s)", self.url, error)
        return False

    def age_s(self, number: int) -> float | None:
        """Return the seconds since the last renewal by the store's clock; None if the store has no timestamps."""
        probe = f"{self.path(number)}.probe-{secrets.token_hex(4)}"
        try:
            self.fs.pipe_file(probe, b"")
            self.fs.invalidate_cache()
            return (self.fs.modified(probe) - self.fs.modified(self.path(number))).total_seconds()
        except (NotImplementedError, AttributeError, KeyError, FileNotFoundError):
            return None
        finally:
            with contextlib.suppress(Exception):
                self.fs.rm_file(probe)


class Lease:
    """A held lease: renewed by a thread until `release`.

    Attributes:
        number: of the claim.
        fence: for what this driver and its workers write.
        taken_by: who has taken over the run, empty while the lease is held. A driver without its lease must stop.
    """

    def __init__(self, file: LeaseFile, number: int, owner: Owner) -> None:
        self.file, self.number, self.owner, self.taken_by = file, number, owner, ""
        # Workers have another current folder: the path of the file system is absolute.
        self.fence = Fence(file.folder if file.local else file.url, number, owner.id)
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def start_at(self, step: int) -> None:
        """Record the step from which the workers of this driver continue; it bounds what earlier drivers wrote."""
        with self._lock:
            self.owner = self.owner.started(self.number, step)
            self.file.write(self.number, self.owner)

    def check(self) -> None:
        """Raise `TakenOverError` if another driver has taken over the run; a store that does not answer has not."""
        if not self.taken_by:
            try:
                self.taken_by = self.fence.taken_by()
            except Exception as error:  # noqa: BLE001  each store raises its own
                log.warning("the lease of %s could not be read: %s", self.file.url, error)
        if self.taken_by:
            raise self.fence.error(self.taken_by)

    def release(self) -> None:
        """Stop renewing and mark the lease as released, if it is still ours."""
        self._over.set()
        self._thread.join()
        try:
            if not self.fence.taken_by():
                self.file.write(self.number, self.owner.model_copy(update={"released": True}))
        except Exception as error:  # noqa: BLE001  a failed store must not hide how the run ended; leases expire
            log.warning("the lease of %s could not be released: %s", self.file.url, error)

    def _renew(self) -> None:
        while not self._over.wait(self.owner.life_s / BEATS):
            try:
                self.taken_by = self.fence.taken_by()
                if self.taken_by:
                    log.error("%s", self.fence.error(self.taken_by))
                    return
                with self._lock:
                    self.owner = self.owner.model_copy(update={"beat": self.owner.beat + 1})
                    self.file.write(self.number, self.owner)
            except Exception as error:  # noqa: BLE001  each store raises its own; the next renewal tries again
                log.warning("the lease of %s could not be renewed: %s", self.file.url, error)


@contextmanager
def hold(url: str, life_s: float = LIFE_S) -> Iterator[Lease]:
    """Hold the lease of a run's folder in a `with` block.

    Raises:
        UserError: another driver holds it; the message names the driver and the expiry.
    """
    lease = acquire(LeaseFile(url), life_s)
    try:
        yield lease
    finally:
        lease.release()


def acquire(file: LeaseFile, life_s: float = LIFE_S) -> Lease:
    """Acquire the lease.

    Raises:
        UserError: see `hold`.
    """
    number = file.newest()
    found = file.read(number)
    if found is not None and not found.gone:
        if (left := _time_left(file, number, found)) > 0:
            raise UserError(_held(file, found, left))
        log.warning("taking over %s from %s", file.url, found)
    before = file.readable(number)
    owner = Owner.here(life_s, file.place, before.starts if before else ())
    if not file.create(number + 1, owner):
        raise UserError(_held(file, file.read(file.newest(number)) or owner, life_s))
    if number == 0:
        with contextlib.suppress(FileNotFoundError):
            file.fs.rm_file(file.path(0))  # an owner of an earlier version finds that it has lost it
    return Lease(file, number + 1, owner)


def _time_left(file: LeaseFile, number: int, found: Owner) -> float:
    """Return the seconds until a lease may expire; 0 if it has expired and is not renewed."""
    watched_s = 1.5 * found.life_s / BEATS
    if found.place in ("", file.place):
        age = file.age_s(number)
        if age is not None and 0 <= age <= found.life_s:
            return found.life_s - age
        if age is None or age < 0:
            watched_s = found.life_s
    # Expired, from the future, on a store without timestamps or of another place: a live owner renews it.
    until = time.monotonic() + watched_s
    while time.monotonic() < until:
        time.sleep(min(0.2, watched_s / 10))
        now = file.read(number)
        if now is None or now.released:
            return 0.0
        if (now.id, now.beat) != (found.id, found.beat):
            return now.life_s
    return 0.0


def _held(file: LeaseFile, found: Owner, left: float) -> str:
    until = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
    return (
        f"{file.url} is in use by {found}, at least until {until} ({left:.0f} s from now) unless it renews its lease: "
        "wait for it, stop it, or give another --run"
    )
