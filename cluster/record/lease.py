"""One driver a run: a lease file beside the run, with owner and heartbeat.

The clocks of machines are not trusted. A lease's age is the difference of two times that the store itself gave, the
lease's and that of a probe written now; a lease that looks expired is watched for a heartbeat before it is taken over,
and so is one from the future. A driver whose process is gone from this machine holds nothing.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from pydantic import Field, ValidationError

from perceiver.config import Config, UserError
from perceiver.storage import is_local, write_whole

log = logging.getLogger(__name__)

FILE = "lease.json"
LIFE_S = 60.0
"""A lease that was not renewed for so long has expired."""
BEATS = 4
"""Renewals in that time."""
SETTLE_S = 0.5
"""On a store without exclusive creation: pause between writing a lease and reading whose it is."""


class Owner(Config):
    """Who holds a run."""

    id: str = Field(description="drawn at random by each driver")
    host: str = Field(description="its machine")
    boot: str = Field(description="identifies the machine's last start and its process table, where the system tells")
    pid: int = Field(description="its process")
    began: str = Field(description="start of that process in clock ticks: another one may get its number")
    beat: int = Field(default=0, description="counts the renewals")
    life_s: float = Field(default=LIFE_S, description="seconds after a renewal at which the lease expires")

    @classmethod
    def here(cls, life_s: float) -> "Owner":
        """This process."""
        pid = os.getpid()
        return cls(
            id=secrets.token_hex(8), host=socket.gethostname(), boot=_boot(), pid=pid, began=_began(pid), life_s=life_s
        )

    @property
    def gone(self) -> bool:
        """Whether the process ran on this machine and does not run any more."""
        same = self.boot == _boot() if self.boot else self.host == socket.gethostname()
        return same and _began(self.pid) != self.began

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str:
    """Names this start of the machine and this container's process numbers; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process began, empty if it is not there (a zombie is not)."""
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return ""


@dataclass
class LeaseFile:
    """The lease of one run below a folder (any fsspec URL)."""

    url: str
    storage_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.fs, folder = fsspec.core.url_to_fs(self.url.rstrip("/"), **dict(self.storage_options or {}))
        self.folder, self.path = folder, f"{folder}/{FILE}"
        self.local = is_local(self.fs)

    def read(self) -> Owner | None:
        """Who holds the run; None if nobody does, or the file is no lease."""
        self.fs.invalidate_cache()
        try:
            return Owner.model_validate_json(self.fs.cat_file(self.path))
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, owner: Owner) -> None:
        """Replace the lease, whole."""
        write_whole(self.fs, self.path, owner.model_dump_json())

    def create(self, owner: Owner) -> bool:
        """Write the lease where there is none; False if another driver was faster."""
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
        """Take the lease away if it is that owner's (or no lease at all, which nobody can own)."""
        if not self.local:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self.path)
            return
        # Renaming is atomic: of several that found the lease expired, one moves it away.
        aside = Path(f"{self.path}.{owner.id}")
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).rename(aside)
            aside.unlink()

    def age_s(self) -> float | None:
        """Seconds since the last renewal by the store's own clock; None if the store does not tell times."""
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
        lost: what has happened to it, empty while it is held. Whoever finds it lost must stop at once.
    """

    def __init__(self, file: LeaseFile, owner: Owner) -> None:
        self.file, self.owner, self.lost = file, owner, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing and take the lease away, if it is still ours."""
        self._over.set()
        self._thread.join()
        try:
            found = self.file.read()
            if found is not None and found.id == self.owner.id:
                self.file.remove(self.owner)
        except Exception as error:  # noqa: BLE001  a store that is gone must not hide how the run ended; leases expire
            log.warning("the lease %s could not be given back: %s", self.file.url, error)

    def _renew(self) -> None:
        while not self._over.wait(self.owner.life_s / BEATS):
            try:
                found = self.file.read()
                if found is None or found.id != self.owner.id:
                    self.lost = f"another driver holds this run now ({found or 'its lease was deleted'})"
                    log.error("%s", self.lost)
                    return
                self.owner = self.owner.model_copy(update={"beat": self.owner.beat + 1})
                self.file.write(self.owner)
            except Exception as error:  # noqa: BLE001  each store raises its own; the next beat tries again
                log.warning("the lease %s could not be renewed: %s", self.file.url, error)


@contextmanager
def hold(url: str, life_s: float = LIFE_S, storage_options: Mapping[str, Any] | None = None) -> Iterator[Lease]:
    """Hold the lease of a run's folder for the time of a `with` block.

    Raises:
        UserError: another driver holds it; the message says which, and until when.
    """
    lease = acquire(LeaseFile(url, storage_options), life_s)
    try:
        yield lease
    finally:
        lease.release()


def acquire(file: LeaseFile, life_s: float = LIFE_S) -> Lease:
    """Take the lease.

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
    if found is not None or file.fs.exists(file.path):
        file.remove(owner)
    if not file.create(owner):
        raise UserError(_held(file, file.read() or owner, life_s))
    return Lease(file, owner)


def _time_left(file: LeaseFile, found: Owner) -> float:
    """Seconds for which a lease is certain to hold; 0 if it has expired and nobody renews it."""
    age = file.age_s()
    if age is not None and 0 <= age <= found.life_s:
        return found.life_s - age
    # Expired, from the future, or on a store that tells no time: a clock may have been set. Who lives renews it.
    patience = found.life_s if age is None or age < 0 else 1.5 * found.life_s / BEATS
    until = time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(min(0.2, patience / 10))
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
