"""An append-only event log on disk: numbered segments of JSON lines, each with a receipt of what was sent from it.

Layout of a spool folder:

    000001.jsonl     one JSON object a line; written by one process, which holds an flock on it while it lives
    000001.offset    bytes of that file that the receiver has acknowledged (absent: 0)
    rejected.jsonl   events that the receiver refused for good, with its reason

A process only ever appends to segments that it made itself. So a line that was cut off by a crash is never continued,
and whoever replays the segment ignores it. Segments that have been sent completely are deleted.
"""

import fcntl
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Event = dict[str, Any]

SEGMENT_BYTES = 64 * 2**20
PENDING_EVENTS = 10_000
READ_BYTES = 256 * 1024


def encode_number(value: float) -> float | str:
    """A finite number as it is; NaN and infinities as strings, so that the line stays strict JSON."""
    return value if math.isfinite(value) else str(value)


def decode_number(value: float | str) -> float:
    """The inverse of `encode_number`."""
    return float(value)


@dataclass(frozen=True)
class Chunk:
    """Events read from one segment, the offset to commit once they have been sent, and whether it holds more."""

    events: list[Event]
    segment: Path
    end: int
    more: bool


class SpoolWriter:
    """Appends events to its own segments. Not thread-safe: the caller holds a lock.

    A full or failing disk never raises: up to `PENDING_EVENTS` events are held in memory and written as soon as the
    disk takes them again; only what exceeds that is dropped, oldest first, and counted in `dropped`.
    """

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.dropped = 0
        self.total = 0
        self.pending: deque[bytes] = deque()
        folder.mkdir(parents=True, exist_ok=True)
        self.segment, self._fd = _new_segment(folder)
        self.own = {self.segment}
        self._size = 0
        self._failing = False

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event; on return it is with the operating system (it survives the death of this process)."""
        self.pending.append(json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self.total += 1
        if len(self.pending) > PENDING_EVENTS:
            self.pending.popleft()
            self.dropped += 1
        self.write_pending()

    def write_pending(self) -> None:
        """Write what an earlier failure of the disk left in memory."""
        try:
            while self.pending:
                self._write_line(self.pending[0])
                self.pending.popleft()
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("tracking spool %s cannot be written (%s); events are held in memory", self.folder, error)
            self._failing = True

    def _write_line(self, line: bytes) -> None:
        if self._size >= self.segment_bytes:
            old = self._fd
            segment, self._fd = _new_segment(self.folder)
            self.own.add(segment)
            self.segment = segment
            self._size = 0
            os.close(old)
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(f"wrote {written} of {len(line)} bytes")
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Give the segment free for replay by others."""
        self.write_pending()
        os.close(self._fd)


class SpoolReader:
    """Reads the events of a spool folder in order: first what earlier processes left behind, then this process's.

    Segments of another process that is still alive (its flock is held) are left to that process.
    """

    def __init__(self, folder: Path, writer: SpoolWriter | None = None) -> None:
        self.folder = folder
        self.writer = writer
        self._locks: dict[Path, int] = {}

    def is_own(self, segment: Path) -> bool:
        """Whether this process's writer made the segment."""
        return self.writer is not None and segment in self.writer.own

    def read(self) -> Chunk | None:
        """The next events that are not yet committed, or None if everything has been."""
        growing = self.writer.segment if self.writer else None
        for segment in segments(self.folder):
            if not self.is_own(segment) and not self._lock(segment):
                continue
            chunk = _read_segment(segment)
            if chunk is not None:
                return chunk
            if segment != growing:
                self._remove(segment)
        return None

    def commit(self, chunk: Chunk) -> None:
        """Record that the events of the chunk have arrived."""
        receipt = chunk.segment.with_suffix(".offset")
        partial = receipt.with_suffix(".offset.tmp")
        partial.write_text(str(chunk.end))
        partial.replace(receipt)

    def reject(self, event: Event, reason: str) -> None:
        """Keep an event that the receiver will never take, with its reason."""
        with (self.folder / "rejected.jsonl").open("a") as file:
            file.write(json.dumps({"reason": reason, "event": event}) + "\n")

    def close(self) -> None:
        """Release the segments of others; delete this process's last one if it was sent completely."""
        for segment in list(self._locks):
            self._unlock(segment)
        if self.writer and self.writer.segment.exists() and _offset(self.writer.segment) >= _size(self.writer.segment):
            self._remove(self.writer.segment)

    def _lock(self, segment: Path) -> bool:
        if segment in self._locks:
            return True
        try:
            fd = os.open(segment, os.O_RDONLY)
        except FileNotFoundError:
            return False
        if not _flock(fd):
            os.close(fd)
            return False
        self._locks[segment] = fd
        return True

    def _unlock(self, segment: Path) -> None:
        fd = self._locks.pop(segment, None)
        if fd is not None:
            os.close(fd)

    def _remove(self, segment: Path) -> None:
        segment.unlink(missing_ok=True)
        segment.with_suffix(".offset").unlink(missing_ok=True)
        self._unlock(segment)


def segments(folder: Path) -> list[Path]:
    """The segments of a spool folder, oldest first."""
    return sorted((path for path in folder.glob("*.jsonl") if path.stem.isdigit()), key=lambda path: int(path.stem))


def unsent(folder: Path) -> int:
    """Number of complete events in the folder that have not been acknowledged."""
    return sum(sum(1 for _ in _lines(segment, _offset(segment), None)) for segment in segments(folder))


def _new_segment(folder: Path) -> tuple[Path, int]:
    """Create the next segment, locked before it can be seen under its name."""
    hidden = folder / f".new-{os.getpid()}-{os.urandom(4).hex()}"
    fd = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
    _flock(fd)
    try:
        number = max((int(path.stem) for path in segments(folder)), default=0)
        while True:
            number += 1
            final = folder / f"{number:06d}.jsonl"
            try:
                os.link(hidden, final)
                return final, fd
            except FileExistsError:
                continue
            except OSError:
                os.close(fd)
                fd = os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
                _flock(fd)
                return final, fd
    finally:
        hidden.unlink()


def _flock(fd: int) -> bool:
    """Take the exclusive lock; False if another holds it. A file system without locks counts as free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("no file locks here: %s", error)
    return True


def _offset(segment: Path) -> int:
    try:
        return int(segment.with_suffix(".offset").read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _size(segment: Path) -> int:
    try:
        return segment.stat().st_size
    except FileNotFoundError:
        return 0


def _lines(segment: Path, start: int, limit: int | None) -> Iterator[bytes]:
    """Complete lines from byte `start` on, up to about `limit` bytes; a torn last line is left out."""
    try:
        file = segment.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        read = 0
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line
            read += len(line)
            if limit is not None and read >= limit:
                return


def _read_segment(segment: Path) -> Chunk | None:
    start = end = _offset(segment)
    events: list[Event] = []
    for line in _lines(segment, start, READ_BYTES):
        end += len(line)
        try:
            events.append(json.loads(line))
        except ValueError:
            log.warning("tracking spool %s: unreadable line at byte %d is skipped", segment, end - len(line))
    return Chunk(events, segment, end, more=end - start >= READ_BYTES) if end > start else None
