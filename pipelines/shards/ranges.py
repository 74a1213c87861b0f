"""Reading ranges of files: over the network with time-out, retries and backoff, of local files their cached pages."""

import mmap
import os
import random
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import fsspec.asyn
from pydantic import Field

from perceiver.config import Config
from pipelines.shards.io import Folder

FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
MAPPED_BYTES = 1 << 20
"""Local ranges from this size on are not copied."""
MOST_MAPPED = 256
"""Ranges of local files that are mapped at a time, since each keeps a file open."""
POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python has no name for."""

T = TypeVar("T")
Bytes = bytes | memoryview

_MAPPED: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


class ReadPolicy(Config):
    """How patient a reader is with a remote file system."""

    retired: ClassVar[tuple[str, ...]] = ("checksums",)

    timeout: float = Field(default=30.0, gt=0, description="seconds a single request may take")
    attempts: int = Field(default=8, ge=1, description="requests before a read fails")
    backoff: float = Field(default=0.1, ge=0, description="seconds before the second attempt, doubled for each further")
    longest: float = Field(default=10.0, ge=0, description="seconds between attempts at most")


class ReadError(OSError):
    """A read that failed for good, after all attempts."""


def with_retries(request: Callable[[], T], what: str, policy: ReadPolicy) -> T:
    """Make a request until it succeeds.

    Waits grow exponentially, each a random share of its limit, so that many readers do not come back at once.

    Raises:
        FileNotFoundError, PermissionError: at once, since trying again does not help.
        ReadError: the last attempt failed.
    """
    for attempt in range(policy.attempts):
        try:
            return request()
        except FINAL_ERRORS:
            raise
        except Exception as error:  # Drivers raise their own types for resets, stalls, throttling and short bodies.
            if attempt == policy.attempts - 1:
                first = (str(error).splitlines() or [""])[0]
                raise ReadError(
                    f"cannot read {what} after {policy.attempts} attempts: {type(error).__name__} {first}"
                ) from error
            time.sleep(random.random() * min(policy.longest, policy.backoff * 2**attempt))
    raise AssertionError("unreachable: at least one attempt is made")


def read_range(folder: Folder, name: str, start: int, stop: int, policy: ReadPolicy) -> Bytes:
    """The bytes [start, stop) of a file; large ranges of a local one are views of the system's own pages.

    Raises:
        OSError: a local file cannot be read.
        ReadError: of other file systems, see `with_retries`.
    """
    path, fs = folder.file(name), folder.fs
    if folder.local:
        with Path(path).open("rb", buffering=0) as file:
            return _mapped(file.fileno(), start, stop) or _whole(
                os.pread(file.fileno(), stop - start, start), stop - start
            )

    def request() -> bytes:
        data: Any
        if getattr(fs, "async_impl", False):
            data = fsspec.asyn.sync(fs.loop, fs._cat_file, path, start=start, end=stop, timeout=policy.timeout)
        else:
            data = fs.cat_file(path, start=start, end=stop)
        return _whole(data, stop - start)

    return with_retries(request, f"{folder.url}/{name}", policy)


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise OSError(f"got {len(data)} of {size} bytes")
    return data


def _mapped(file: int, start: int, stop: int) -> memoryview | None:
    """A view of a local file's pages in place of a copy of them; None where there is none to be had.

    All are read here, where a damaged disk or a file cut short is an error and not the signal that ends the process.
    """
    if sys.platform != "linux" or stop - start < MAPPED_BYTES or len(_MAPPED) >= MOST_MAPPED:
        return None
    first = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        pages = mmap.mmap(file, stop - first, access=mmap.ACCESS_READ, offset=first)
        pages.madvise(POPULATE_READ)
    except (OSError, ValueError):  # an older system, too many files, a shorter one: a plain read says what is wrong
        return None
    _MAPPED.add(pages)
    return memoryview(pages)[start - first :]
