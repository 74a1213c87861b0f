"""One driver per run: a lease file in the run's folder, with owner and heartbeat.

The clocks of machines are not trusted. A lease's age is the difference of two timestamps of the store, the lease's and
that of a probe written now. A lease that appears expired, or is from the future, is watched for a heartbeat before it
is taken over. The lease of a process that has ended on this machine is free.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from perceiver.config import Config, UserError
from perceiver.storage import (
    NonNegativeCount,
    NotRegularError,
    PositiveCount,
    StrictNumber,
    existing_file,
    is_local,
    open_url,
    parse_json,
    write_whole,
)

log = logging.getLogger(__name__)

FILE = "lease.json"
LIFE_S = 60.0
"""A lease expires this many seconds after its last renewal."""
BEATS = 4
"""Renewals in that time."""
SETTLE_S = 0.5
"""Seconds between writing a lease and reading its owner, on a store without exclusive creation."""


class Owner(Config):
    """The driver that owns a run."""

    id: str = Field(description="random id of the driver")
    host: str = Field(description="its machine")
    boot: str = Field(description="identifies the machine's last start and its process table, empty if unknown")
    pid: PositiveCount = Field(description="its process")
    began: str = Field(description="start of that process, since process ids are reused")
    beat: NonNegativeCount = Field(default=0, description="number of renewals")
    life_s: StrictNumber = Field(
        default=LIFE_S, gt=0, le=86_400, description="seconds after a renewal at which the lease expires"
    )

    @classmethod
    def here(cls, life_s: float) -> "Owner":
        """Return this process as an owner."""
        pid = os.getpid()
        return cls(
            id=secrets.token_hex(8), host=socket.gethostname(), boot=_boot(), pid=pid, began=_began(pid), life_s=life_s
        )

    @property
    def gone(self) -> bool:
        """Whether the process ran on this machine and has ended."""
        same = self.boot == _boot() if self.boot else self.host == socket.gethostname()
        return same and _began(self.pid) != self.began

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str:
    """Return an id of the machine's last start and this container's process table; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _began(pid: int) -> str:
    """Return the start time of a process, empty if it does not exist or is a zombie."""
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return ""


@dataclass
class LeaseFile:
    """The lease file in the folder of a run (any fsspec URL)."""

    url: str

    def __post_init__(self) -> None:
        self.fs, folder = open_url(self.url.rstrip("/"))
        self.folder, self.path = folder, f"{folder}/{FILE}"
        self.local = is_local(self.fs)

    def read(self) -> Owner | None:
        """Return the owner; None without a lease, or if the file is not a valid one.

        Raises:
            UserError: it is a folder, a device or a link that leaves the run's folder.
        """
        self.fs.invalidate_cache()
        try:
            content = self.fs.cat_file(existing_file(self.fs, self.folder, FILE))
            return Owner.model_validate(parse_json(content, self.url))
        except NotRegularError as error:
            raise UserError(f"{self.url}: {error}: remove it") from None
        except (FileNotFoundError, ValidationError, UserError):
            return None

    def write(self, owner: Owner) -> None:
        """Replace the lease atomically."""
        write_whole(self.path, owner.model_dump_json(), self.fs)

    def create(self, owner: Owner) -> bool:
        """Create the lease; return False if another driver was faster."""
        if self.local:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            scratch = Path(f"{self.path}.{owner.id}")
            scratch.write_text(owner.model_dump_json())
            try:
                os.link(scratch, self.path)
            except FileExistsError:
                return False
            finally:
                scratch.unlink()
            return True
        self.write(owner)
        time.sleep(SETTLE_S)
        found = self.read()
        return found is not None and found.id == owner.id

    def remove(self, owner: Owner) -> None:
        """Remove the lease file; `owner` is the driver that removes it."""
        if not self.local:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self.path)
            return
        # Renaming is atomic: only one of several drivers that found the lease expired moves it.
        aside = Path(f"{self.path}.{owner.id}")
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).rename(aside)
            aside.unlink()

    def age_s(self) -> float | None:
        """Return the seconds since the last renewal by the store's clock; None if the store has no timestamps."""
        probe = f"{self.path}.probe-{secrets.token_hex(4)}"
        try:
            self.fs.pipe_file(probe, b"")
            self.fs.invalidate_cache()
            return (self.fs.modified(probe) - self.fs.modified(self.path)).total_seconds()
        except (NotImplementedError, AttributeError, KeyError, FileNotFoundError):
            return None
        finally:
            with contextlib.suppress(Exception):
                self.fs.rm_file(probe)


class Lease:
    """A held lease: renewed by a thread until `release`.

    Attributes:
        lost: why the lease was lost, empty while it is held. A driver without its lease must stop at once.
    """

    def __init__(self, file: LeaseFile, owner: Owner) -> None:
        self.file, self.owner, self.lost = file, owner, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing and remove the lease, if it is still ours."""
        self._over.set()
        self._thread.join()
        try:
            found = self.file.read()
            if found is not None and found.id == self.owner.id:
                self.file.remove(self.owner)
        except Exception as error:  # noqa: BLE001  a failed store must not hide how the run ended; leases expire
            log.warning("the lease %s could not be released: %s", self.file.url, error)

    def _renew(self) -> None:
        while not self._over.wait(self.owner.life_s / BEATS):
            try:
                found = self.file.read()
                if found is None or found.id != self.owner.id:
                    self.lost = f"another driver has taken over this run ({found or 'its lease was deleted'})"
                    log.error("%s", self.lost)
                    return
                self.owner = self.owner.model_copy(update={"beat": self.owner.beat + 1})
                self.file.write(self.owner)
            except Exception as error:  # noqa: BLE001  each store raises its own; the next renewal tries again
                log.warning("the lease %s could not be renewed: %s", self.file.url, error)


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
    owner = Owner.here(life_s)
    found = file.read()
    if found is not None:
        left = 0.0 if found.gone else _time_left(file, found)
        if left > 0:
            raise UserError(_held(file, found, left))
        log.warning("taking over %s from %s", file.url, found)
    if found is not None or (os.path.lexists if file.local else file.fs.exists)(file.path):  # also a dead link
        file.remove(owner)
    if not file.create(owner):
        raise UserError(_held(file, file.read() or owner, life_s))
    return Lease(file, owner)


def _time_left(file: LeaseFile, found: Owner) -> float:
    """Return the seconds until a lease may expire; 0 if it has expired and is not renewed."""
    age = file.age_s()
    if age is not None and 0 <= age <= found.life_s:
        return found.life_s - age
    # Expired, from the future, or on a store without timestamps: a clock may have been set. A live owner renews it.
    watched_s = found.life_s if age is None or age < 0 else 1.5 * found.life_s / BEATS
    until = time.monotonic() + watched_s
    while time.monotonic() < until:
        time.sleep(min(0.2, watched_s / 10))
        now = file.read()
        if now is None:
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
