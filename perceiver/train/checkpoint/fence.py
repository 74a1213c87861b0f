"""Which driver owns a run: numbered claims in the run's folder, one file for each driver that has owned it.

    lease/00000003.json     the third driver: its process, its renewals, and the step at which each driver started

A claim is created exclusively, so a number has one owner, and only that owner writes the file afterwards. The owner of
the highest number owns the run. The number is also the fencing token of the driver and its workers: it is in what they
write, and a reader ignores what a driver has written after the start of a later one. A check before a write alone
would not do, as a process may be stopped between the two.
"""

import math
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from perceiver.config import Config, UserError
from perceiver.storage import (
    NonNegativeCount,
    NotRegularError,
    PositiveCount,
    StrictNumber,
    entry_names,
    existing_file,
    is_local,
    open_url,
    parse_json,
)

FOLDER = "lease"
BEFORE = "lease.json"
"""The lease of versions without numbers; it counts as number 0."""
LIFE_S = 60.0
"""A lease expires this many seconds after its last renewal."""


class TakenOverError(UserError):
    """Another driver has taken over the run for which this process wants to write."""


class Owner(Config):
    """A driver that owns a run, or has owned it."""

    id: str = Field(description="random id of the driver")
    host: str = Field(description="its machine")
    boot: str = Field(description="identifies the machine's last start and its process table, empty if unknown")
    pid: PositiveCount = Field(description="its process")
    began: str = Field(description="start of that process, since process ids are reused")
    place: str = Field(default="", description="where the run's folder was, which may have been copied since")
    beat: NonNegativeCount = Field(default=0, description="number of renewals")
    life_s: StrictNumber = Field(
        default=LIFE_S, gt=0, le=86_400, description="seconds after a renewal at which the lease expires"
    )
    released: bool = Field(default=False, strict=True, description="whether the driver has ended")
    starts: tuple[tuple[PositiveCount, NonNegativeCount], ...] = Field(
        default=(), description="number and first step of this driver and of earlier ones that started before that step"
    )

    @classmethod
    def here(cls, life_s: float, place: str = "", starts: tuple[tuple[int, int], ...] = ()) -> "Owner":
        """Return this process as an owner."""
        name, host, pid = secrets.token_hex(8), socket.gethostname(), os.getpid()
        return cls(
            id=name, host=host, boot=_boot(), pid=pid, began=_began(pid), place=place, life_s=life_s, starts=starts
        )

    @property
    def gone(self) -> bool:
        """Whether the driver has released the lease, or its process ran on this machine and has ended."""
        same = self.boot == _boot() if self.boot else self.host == socket.gethostname()
        return self.released or (same and _began(self.pid) != self.began)

    def started(self, number: int, step: int) -> "Owner":
        """Return this owner, with its number, as it has chosen the step from which its workers continue."""
        return self.model_copy(
            update={"starts": (*((n, first) for n, first in self.starts if first < step), (number, step))}
        )

    def last_step(self, number: int) -> float:
        """Return the last step up to which the work of a driver counts: where the first one after it started."""
        return min((step for later, step in self.starts if later > number), default=math.inf)

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
class Claims:
    """The claims in the folder of a run (any fsspec URL)."""

    url: str

    def __post_init__(self) -> None:
        self.fs, self.folder = open_url(self.url.rstrip("/"))
        self.local = is_local(self.fs)
        self.place = os.path.realpath(self.folder) if self.local else self.url.rstrip("/")

    def path(self, number: int) -> str:
        """Return the path of a claim in the file system."""
        return f"{self.folder}/{_name(number)}"

    def newest(self, known: int = 0) -> int:
        """Return the highest number that is claimed, 0 without any; `known` is one that is.

        Raises:
            UserError: the folder of the claims is a file.
        """
        if self.local and os.path.lexists(f"{self.folder}/{FOLDER}") and not Path(self.folder, FOLDER).is_dir():
            raise UserError(f"{self.url}/{FOLDER} is not a folder: remove it")
        names = entry_names(self.fs, f"{self.folder}/{FOLDER}")
        found = max([known, *(int(match[1]) for name in names if (match := re.fullmatch(r"(\d{8,12})\.json", name)))])
        while self._exists(found + 1):  # the listing of a store may be late
            found += 1
        return found

    def read(self, number: int) -> Owner | None:
        """Return the owner of a number; None without a claim, or if the file is not a valid one.

        Raises:
            UserError: it is a folder, a device or a link that leaves the run's folder.
        """
        self.fs.invalidate_cache()
        try:
            content = self.fs.cat_file(existing_file(self.fs, self.folder, _name(number)))
            return Owner.model_validate(parse_json(content, self.url))
        except NotRegularError as error:
            raise UserError(f"{self.url}: {error}: remove it") from None
        except (FileNotFoundError, ValidationError, UserError):
            return None

    def readable(self, number: int) -> Owner | None:
        """Return the owner of a number, or of the highest one below it whose claim is valid; None without any."""
        return next((owner for each in range(number, 0, -1) if (owner := self.read(each)) is not None), None)

    def _exists(self, number: int) -> bool:
        return (os.path.lexists if self.local else self.fs.exists)(self.path(number))  # also a dead link


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json" if number else BEFORE


@dataclass(frozen=True)
class Fence:
    """The claim for which a driver or one of its workers writes.

    Attributes:
        url: of the run's folder.
        number: of the claim.
        id: of its owner.
    """

    url: str
    number: int
    id: str

    @property
    def claims(self) -> Claims:
        """Return the claims of the run."""
        return Claims(self.url)

    def taken_by(self) -> str:
        """Return who has taken over the run; empty if nobody has."""
        claims = self.claims
        newest = claims.newest(self.number)
        if newest > self.number:
            return str(claims.read(newest) or f"number {newest} in {FOLDER}/")
        mine = claims.read(self.number)
        return "" if mine is not None and mine.id == self.id else str(mine or "its lease was deleted")

    def check(self) -> None:
        """Raise `TakenOverError` if another driver has taken over the run."""
        if taken_by := self.taken_by():
            raise self.error(taken_by)

    def error(self, taken_by: str) -> TakenOverError:
        """Return the error of a process whose run was taken over."""
        return TakenOverError(
            f"{self.url}: another driver has taken over this run ({taken_by}); this driver stops, its work since then "
            "is discarded"
        )
