"""Files on any fsspec file system: folders, atomic writes, and range reads with time-out and retries.

A value `$NAME` in storage options is a reference to an environment variable.
"""

import mmap
import os
import random
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import fsspec
from pydantic import Field

from perceiver.config import Config, UserError

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
MAPPED_BYTES = 1 << 20
"""Ranges of local files from this size on are memory-mapped, smaller ones are copied."""
MOST_MAPPED = 256
"""Ranges of local files that are mapped at a time, since each keeps a file open."""
POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python has no name for."""

T = TypeVar("T")
Bytes = bytes | memoryview

_MAPPED: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


def first_line(error: BaseException) -> str:
    """Return the error's first line, or its type if it has no text."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def resolve_options(options: Mapping[str, str]) -> dict[str, str]:
    """Replace each value of the form `$NAME` by the environment variable NAME, so that no recipe contains a secret.

    Raises:
        UserError: the variable is not set.
    """
    resolved = {}
    for key, value in options.items():
        if value.startswith("$"):
            if value[1:] not in os.environ:
                raise UserError(
                    f"data.storage_options.{key} names {value}, but the environment has no variable"
                    f" {value[1:]}: export it, or give another name"
                )
            value = os.environ[value[1:]]
        resolved[key] = value
    return resolved


@dataclass(frozen=True)
class Folder:
    """A folder: its file system `fs`, its `path` without the protocol, and the `url` that was given."""

    fs: Any
    path: str
    url: str

    def file(self, name: str) -> str:
        """Return the path of a file in this folder, as `fs` takes it."""
        return f"{self.path.rstrip('/')}/{name}"

    @property
    def protocols(self) -> set[str]:
        """Names of the file system, such as {"s3", "s3a"}."""
        return {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)

    @property
    def local(self) -> bool:
        """Whether the folder is on a local file system, where half-written files are visible."""
        return "file" in self.protocols

    def make_room(self, path: str) -> None:
        """Create the parent folder of a file, except in object stores, which have none and would create a bucket."""
        if not self.protocols & OBJECT_STORES:
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)

    def exists(self, name: str) -> bool:
        """Return whether the file exists; never answered from a cached listing."""
        self.fs.invalidate_cache()
        return self.fs.exists(self.file(name))

    def names(self) -> list[str]:
        """Return the names of its files, sorted; empty if the folder does not exist."""
        self.fs.invalidate_cache()
        return sorted(path.rpartition("/")[2] for path in self.fs.find(self.path, maxdepth=1))

    def read_text(self, name: str) -> str:
        """Return the content of a small UTF-8 file."""
        return self.fs.cat_file(self.file(name)).decode("utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Write a small UTF-8 file atomically."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file atomically: a reader sees all of it or nothing."""
        target = self.file(name)
        self.make_room(target)
        scratch = f"{target}.{os.getpid()}.partial" if self.local else target
        self.fs.pipe_file(scratch, content)
        if scratch != target:
            self.fs.mv(scratch, target)


def open_folder(url: str, options: Mapping[str, str] | None = None) -> Folder:
    """Open a folder by path or fsspec URL (`s3://bucket/x`, `gs://`, `file://`, a plain path).

    Raises:
        UserError: the protocol is unknown, its driver is not installed, or an option names an unset variable.
    """
    try:
        fs, path = fsspec.core.url_to_fs(os.fspath(url), **resolve_options(options or {}))
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot open {url}: {error}; wanted a path or a URL that fsspec knows"
            " (for s3:// install perceiver-train[s3])"
        ) from error
    return Folder(fs, path, os.fspath(url))


class ReadPolicy(Config):
    """Time-out and retries of reads from a remote file system."""

    retired: ClassVar[tuple[str, ...]] = ("checksums",)

    timeout: float = Field(default=30.0, gt=0, description="seconds a single request may take")
    attempts: int = Field(default=8, ge=1, description="requests before a read fails")
    backoff: float = Field(default=0.1, ge=0, description="seconds before the second attempt, doubled for each further")
    longest: float = Field(default=10.0, ge=0, description="seconds between attempts at most")

    def __hash__(self) -> int:  # Pydantic adds the same to frozen models, unseen by type checkers.
        return hash(tuple(self.__dict__.values()))


class ReadError(OSError):
    """A read that failed at each of its attempts."""


def with_retries(request: Callable[[], T], what: str, policy: ReadPolicy) -> T:
    """Call `request` until it succeeds, and return its result.

    Pauses grow exponentially, each a random share of its limit, so that many readers do not retry at the same moment.

    Raises:
        FileNotFoundError, PermissionError: from the first attempt, since a retry does not help.
        ReadError: the last attempt failed.
    """
    for attempt in range(policy.attempts):
        try:
            return request()
        except FINAL_ERRORS:
            raise
        except Exception as error:  # Drivers raise their own types for resets, stalls, throttling and short bodies.
            if attempt == policy.attempts - 1:
                raise ReadError(
                    f"cannot read {what} after {policy.attempts} attempts: {type(error).__name__} {first_line(error)}"
                ) from error
            time.sleep(random.random() * min(policy.longest, policy.backoff * 2**attempt))
    raise AssertionError("unreachable: at least one attempt is made")


def read_range(folder: Folder, name: str, start: int, stop: int, policy: ReadPolicy) -> Bytes:
    """Return the bytes [start, stop) of a file; large ranges of a local file are memory-mapped, not copied.

    Raises:
        OSError: a local file cannot be read or is too short.
        ReadError: a remote file cannot be read, see `with_retries`.
    """
    path, fs = folder.file(name), folder.fs
    if folder.local:
        with Path(path).open("rb", buffering=0) as file:
            return _mapped(file.fileno(), start, stop) or _whole(
                os.pread(file.fileno(), stop - start, start), stop - start
            )

    def request() -> bytes:
        patience = {"timeout": policy.timeout} if getattr(fs, "async_impl", False) else {}
        return _whole(fs.cat_file(path, start=start, end=stop, **patience), stop - start)

    return with_retries(request, f"{folder.url}/{name}", policy)


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise OSError(f"got {len(data)} of {size} bytes")
    return data


def _mapped(file: int, start: int, stop: int) -> memoryview | None:
    """Map a range of a local file; None if it is small or cannot be mapped.

    All pages are read here, where a damaged disk or a truncated file is an error. Read later, it would be a SIGBUS,
    which ends the process.
    """
    if sys.platform != "linux" or stop - start < MAPPED_BYTES or len(_MAPPED) >= MOST_MAPPED:
        return None
    first = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        pages = mmap.mmap(file, stop - first, access=mmap.ACCESS_READ, offset=first)
        pages.madvise(POPULATE_READ)
    except (OSError, ValueError):  # An older kernel, too many open files, a truncated file: a plain read reports it.
        return None
    _MAPPED.add(pages)
    return memoryview(pages)[start - first :]
