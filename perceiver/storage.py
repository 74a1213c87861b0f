"""Files on any fsspec file system: folders, atomic writes, retries, range reads, and the cache folder.

A value `$NAME` in storage options is a reference to an environment variable.
"""

import errno
import hashlib
import itertools
import json
import logging
import mmap
import os
import random
import re
import secrets
import shutil
import stat
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import fsspec
import pydantic_core
from pydantic import AfterValidator, Field, ValidationError

from perceiver.config import NO_CHAINS, Config, Real, Seconds, UserError, expand_home

READ_ONLY = {"data", "git", "github", "gist", "http", "https", "libarchive", "reference", "tar"}
"""File systems to which nothing can be written."""
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
NETWORK = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}
"""Packages whose errors tell that a store does not answer, unless drivers turn them into those of files."""
REFUSALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
BLOCK_BYTES = 8 << 20
"""Blocks in which a whole remote file is read."""
MAPPED_BYTES = 1 << 20
"""Ranges of local files from this size on are memory-mapped, smaller ones are copied."""
MOST_MAPPED = 256
"""Ranges of local files that are mapped at a time, since each keeps a file open."""
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
NOT_REGULAR = "not a regular file, but a folder, device, FIFO or socket"
LONGEST_NAME = 1000
"""Characters of a file name in a manifest."""
POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python does not define."""

log = logging.getLogger(__name__)

T = TypeVar("T")
Bytes = bytes | memoryview

_MAPPED: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's message, at most `limit` characters, or its type if it has no message.

    Characters that cannot be printed are escaped.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return escaped((text.strip().splitlines() or [type(error).__name__])[0][:limit])


def escaped(text: str) -> str:
    """Return a text with characters that cannot be printed, such as line breaks, as in a Python string."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def is_refusal(error: BaseException) -> bool:
    """Return whether a store has refused access, so that a retry cannot help."""
    return isinstance(error, PermissionError) or type(error).__name__ in REFUSALS


def is_unanswered(error: BaseException) -> bool:
    """Return whether a store has not answered: there is no connection, it broke, or the time is over."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    lost = isinstance(error, ConnectionError | TimeoutError | ReadError) or bool(packages & NETWORK)
    return lost and not isinstance(error, BrokenPipeError) and not is_refusal(error)


def raise_unanswered(error: Exception) -> None:
    """Raise the error of a store that does not answer again; any other error concerns one file."""
    if is_unanswered(error):
        raise error


def safe_name(name: str) -> str:
    """Return the name of a file from a manifest if it is a plain relative path below the manifest's folder.

    Raises:
        ValueError: it is empty, absolute or a URL, or has `.` or `..`, a colon, a backslash, or a character that cannot
            be printed.
    """
    plain = name.isprintable() and not {":", "\\"} & set(name) and len(name) <= LONGEST_NAME
    if not plain or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"got file name {name[:80]!r}, wanted a plain name below the folder")
    return name


def check_printable(name: str) -> str:
    """Return a name that a message may show; `ValueError` if it has control characters or is very long."""
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"got {name[:80]!r}, wanted a name that can be printed")
    return name


PrintableName = Annotated[str, AfterValidator(check_printable)]
"""A name in a file from outside, see `check_printable`."""
FileName = Annotated[str, AfterValidator(safe_name)]
"""The name of a file in a manifest, see `safe_name`."""
PositiveCount = Annotated[int, Field(strict=True, ge=1, lt=1 << 48)]
"""A number of rows, bytes or elements in a file from outside; sums of them fit into 64 bits."""
NonNegativeCount = Annotated[int, Field(strict=True, ge=0, lt=1 << 48)]
"""Like `PositiveCount`, or 0."""
StrictNumber = Annotated[float, Field(strict=True)]
"""A number in a file from outside, not a text or true or false; it may be NaN."""
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hex."""


class NotRegularError(OSError):
    """A path that must not be opened: not a regular file, or a link that leaves its folder."""


def existing_file(fs: Any, folder: str, name: str) -> str:
    """Return the path of a file that is about to be read.

    Args:
        fs: the fsspec file system.
        folder: path of the folder.
        name: name of the file in it, see `safe_name`.

    Raises:
        NotRegularError: on a local disk it is not a regular file (reading a FIFO or a device may never end), or it is a
            link to a file outside the folder.
        ValueError: the name is not a plain one.
    """
    path = f"{folder.rstrip('/')}/{safe_name(name)}"
    if not is_local(fs):
        return path
    try:
        mode = Path(path).lstat().st_mode
        if stat.S_ISLNK(mode) or "/" in name:
            mode = Path(path).stat().st_mode
            if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
                raise NotRegularError(f"{name} is a link to a file outside its folder")
    except (FileNotFoundError, NotADirectoryError):
        return path  # Reading it reports that.
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise
        raise NotRegularError(f"{name} is a link to itself") from None
    if not stat.S_ISREG(mode):
        raise NotRegularError(f"{name} is {NOT_REGULAR}")
    return path


def parse_json(text: str | bytes, where: str, *, finite: bool = False) -> Any:
    """Parse JSON from outside.

    Args:
        text: the JSON.
        where: file or option, for the error.
        finite: refuse NaN and infinite numbers, which Python reads and JSON does not have.

    Raises:
        UserError: it is not JSON, an object has a key twice, or it is nested more than 200 levels deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"key {twice[:80]!r} appears twice")
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name}, wanted a finite number")

    try:
        pydantic_core.from_json(text)  # which limits the depth
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse if finite else None)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({first_line(error)}): restore the file") from None


def invalid_key(error: ValidationError) -> str:
    """Return the first error of a pydantic model in one line: the key, what is wrong, and the value if it is short."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part)[:80] for part in first["loc"])
    got = first["input"]
    value = f", got {got!r}" if isinstance(got, int | float | str | None) and len(repr(got)) <= 40 else ""
    return escaped(f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')[:300]}{value}")


def cache_folder(*parts: str) -> Path:
    """Return a folder of ours in the user's cache: `$PERCEIVER_CACHE`, else `$XDG_CACHE_HOME/perceiver`.

    The default of `$XDG_CACHE_HOME` is `~/.cache`. The folder may not exist yet.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(expand_home(os.environ.get("PERCEIVER_CACHE") or f"{base}/perceiver"), *parts)


def unusable_file(error: Exception) -> str | None:
    """Return a line about a file that cannot be used for want of permission, space or an answer; None for others."""
    if is_unanswered(error):
        return (
            f"a store or server does not answer ({first_line(error)}): check the network, then run the same command "
            "again, which continues where it can"
        )
    if not isinstance(error, OSError) or error.errno not in _UNUSABLE:
        return None
    if error.filename is None:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return None
        return "no space left on the device: free some space, or choose another place for the output"
    name = escaped(os.fsdecode(error.filename))
    return f"{name}: {error.strerror} (caches are in PERCEIVER_CACHE or ~/.cache, temporary files in TMPDIR)"


def protocols(fs: Any) -> set[str]:
    """Return the names of an fsspec file system, such as {"s3", "s3a"}."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def absolute(url: str) -> str:
    """Return a local path or `file://` URL as an absolute path, another URL unchanged."""
    if re.match(r"(file|local)://", url):
        return str(fsspec.core.url_to_fs(url)[1])
    return url if "://" in url else str(Path(url).resolve())


def shortened(path: str) -> str:
    """Return a path relative to the current folder if it is inside; the folder may have been deleted meanwhile."""
    try:
        return path.removeprefix(f"{Path.cwd()}/")
    except FileNotFoundError:
        return path


def is_local(fs: Any) -> bool:
    """Return whether an fsspec file system is the local one, where half-written files are visible."""
    return "file" in protocols(fs)


def write_whole(path: str | Path, content: str | bytes, fs: Any = None) -> None:
    """Write a small file so that a reader sees all of it or nothing, also after a crash; text as UTF-8.

    On a local file system the file is written under another name, synchronized to the disk and renamed. An object store
    shows an object only once it is complete.

    Args:
        path: path of the file; a missing parent folder is created.
        content: the whole content.
        fs: the fsspec file system; default: the local one.

    Raises:
        UserError: a local path is a folder, device, FIFO or socket, or a link to one.
    """
    data = content.encode() if isinstance(content, str) else content
    if fs is not None and not is_local(fs):
        make_parent(fs, str(path))
        fs.pipe_file(str(path), data)
        return
    with _replacement(Path(path)) as partial, partial.open("wb") as file:
        file.write(data)


def put_whole(file: Path, folder: "Folder", name: str) -> None:
    """Copy a local file to a folder like `write_whole`, without reading all of it at once.

    Raises:
        UserError: the target is local and not a regular file.
    """
    if folder.local:
        target = Path(folder.file(name))
        with _replacement(target) as partial, file.open("rb") as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, BLOCK_BYTES)  # `copyfile` would name the source if the disk is full
        return
    make_parent(folder.fs, folder.file(name))
    folder.fs.put_file(str(file), folder.file(name))


@contextmanager
def _replacement(target: Path) -> Iterator[Path]:
    """Yield the path of a file that replaces a local file once it is written and synchronized to the disk."""
    check_regular(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_regular(path: str | Path) -> None:
    """Refuse a local path that exists and must not be replaced by a file.

    Raises:
        UserError: it is a folder, device, FIFO or socket, or a link to one.
    """
    try:
        regular = stat.S_ISREG(Path(path).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        regular = False  # a link to itself
    if not regular:
        raise UserError(f"{path} is {NOT_REGULAR}: it is not overwritten; give another path")


def check_own_file(path: str | Path) -> None:
    """Refuse a local path that is to be read and continued as a file of a run, and might lead elsewhere.

    Raises:
        UserError: it is a link, folder, device, FIFO or socket.
    """
    check_no_link(path)
    check_regular(path)


def check_no_link(path: str | Path) -> None:
    """Refuse a local path that is a link, whatever it leads to: a run writes and deletes in its own folder only.

    Raises:
        UserError: it is a link.
    """
    if Path(path).is_symlink():
        raise UserError(f"{path} is a link, and a run writes into its own folder only: remove the link")


def file_sha256(path: str | Path, fs: Any = None) -> str:
    """Return the SHA-256 of a file in hex, read in blocks.

    Args:
        path: path of the file.
        fs: the fsspec file system; default: the local one.
    """
    with Path(path).open("rb") if fs is None else fs.open(str(path), "rb", block_size=BLOCK_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_parent(fs: Any, path: str) -> None:
    """Create the parent folder of a file, except in object stores, which have none and would create a bucket."""
    if not protocols(fs) & OBJECT_STORES:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def entry_names(fs: Any, path: str) -> list[str]:
    """Return the names of a folder's entries, sorted; empty if it does not exist. Never answered from a cache."""
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))


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
    def local(self) -> bool:
        """Whether the folder is on a local file system, see `is_local`."""
        return is_local(self.fs)

    def exists(self, name: str) -> bool:
        """Return whether the file exists; never answered from a cached listing."""
        self.fs.invalidate_cache()
        return self.fs.exists(self.file(name))

    def names(self) -> list[str]:
        """Return the names of its files, sorted; empty if the folder does not exist."""
        self.fs.invalidate_cache()
        return sorted(path.rpartition("/")[2] for path in self.fs.find(self.path, maxdepth=1))

    def existing(self, name: str) -> str:
        """Return the path of a file that is about to be read, see `existing_file`."""
        return existing_file(self.fs, self.path, name)

    def read_text(self, name: str) -> str:
        """Return the content of a small UTF-8 file."""
        return self.fs.cat_file(self.file(name)).decode("utf-8")

    def write(self, name: str, content: str | bytes) -> None:
        """Write a small file atomically, see `write_whole`."""
        write_whole(self.file(name), content, self.fs)


def open_url(url: str, options: Mapping[str, str] | None = None) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL that a user gave, and the path in it.

    Args:
        url: a path, or a URL such as `s3://bucket/x`.
        options: storage options; a value `$NAME` is taken from the environment.

    Raises:
        UserError: it is empty, no URL, a chain of URLs (`zip://a::s3://b`), of an unknown protocol, or one whose driver
            is not installed or refuses it; or an option names an unset variable.
    """
    text, resolved = os.fspath(url), resolve_options(options or {})
    try:
        if not text or "\0" in text:
            raise ValueError("it is empty" if not text else "it has a zero byte")
        if re.match(r"\w+://[^/]*\[", text):
            raise ValueError("fsspec takes no IPv6 addresses: use a host name")
        if "::" in text:
            raise ValueError(NO_CHAINS)
        fs, path = fsspec.core.url_to_fs(text, **resolved)
        return fs, str(path)
    except Exception as error:  # noqa: BLE001  each driver raises its own types for arguments that it lacks
        reason = (
            f"lacks what its driver needs ({first_line(error)})" if isinstance(error, TypeError) else first_line(error)
        )
        if login := re.match(r"[\w+]+://[^/@]*?:([^@]+)@", text):  # which the driver may quote in another form
            reason = reason.replace(login[1], "***")
        raise UserError(
            f"cannot open {text!r} ({reason}): wanted a path, or a URL such as s3://, gs://, abfs://, file:// or http://"
            " that fsspec can open (for s3:// install perceiver-train[s3])"
        ) from error


def open_folder(url: str, options: Mapping[str, str] | None = None) -> Folder:
    """Open a folder by path or fsspec URL (`s3://bucket/x`, `gs://`, `file://`, a plain path).

    Raises:
        UserError: the URL cannot be opened, see `open_url`.
    """
    fs, path = open_url(url, options)
    return Folder(fs, path, os.fspath(url))


def open_target(url: str, options: Mapping[str, str] | None = None) -> Folder:
    """Open a folder that will be written to.

    Raises:
        UserError: the URL cannot be opened (see `open_url`) or written to, or is a local file.
    """
    folder = open_folder(url, options)
    if kind := protocols(folder.fs) & READ_ONLY:
        raise UserError(f"got {url} to write to, but {min(kind)} can only be read: give a path or a bucket's URL")
    if folder.local and os.path.lexists(folder.path) and not Path(folder.path).is_dir():
        raise UserError(f"got {url} to write to, which is not a folder: give a folder or a new path")
    return folder


@contextmanager
def refusing(what: str, fix: str) -> Iterator[None]:
    """Turn the errors of a file system in a `with` block into a `UserError`: what was used, the reason, the fix.

    A full disk is not the user's mistake, and its error is raised as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.filename else None
        raise UserError(f"{what} cannot be used ({reason or first_line(error)}): {fix}") from error


class RetryPolicy(Config):
    """How often a request is repeated, and how long to wait in between."""

    attempts: int = Field(default=8, ge=1, le=1000, description="requests before giving up")
    backoff: Seconds = Field(default=0.1, description="seconds before the second attempt, doubled for each further")
    longest: Seconds = Field(default=10.0, description="seconds between attempts at most")


class ReadPolicy(RetryPolicy):
    """Time-out and retries of reads from a remote file system."""

    retired: ClassVar[tuple[str, ...]] = ("checksums",)

    timeout: Real = Field(default=30.0, gt=0, le=86_400, description="seconds a single request may take")

    def __hash__(self) -> int:  # Pydantic adds the same to frozen models, unseen by type checkers.
        return hash(tuple(self.__dict__.values()))


class ReadError(OSError):
    """A read that failed at each of its attempts."""


def with_retries(request: Callable[[], T], what: str, policy: RetryPolicy) -> T:
    """Call `request` until it succeeds, and return its result.

    Args:
        request: may raise anything: drivers raise their own types for resets, stalls, throttling and short bodies.
        what: is done, for the log, such as "reading s3://bucket/x".
        policy: number of attempts and pauses.

    Raises:
        Exception: what the last attempt raised, or the first one if a retry cannot help, see `retry_pause`.
    """
    for attempt in itertools.count(1):
        try:
            return request()
        except Exception as error:  # noqa: BLE001  `retry_pause` raises it again if no retry can help
            time.sleep(retry_pause(error, attempt, what, policy))
    raise AssertionError("unreachable")


def retry_pause(
    error: Exception,
    attempt: int,
    what: str,
    policy: RetryPolicy,
    final: tuple[type[Exception], ...] = FINAL_ERRORS,
) -> float:
    """Log a failed attempt and return the seconds to wait before the next one.

    Pauses grow exponentially, each a random share of its limit, so that many callers do not retry at the same moment.

    Args:
        error: what the attempt raised.
        attempt: its number, from 1.
        what: was done, for the log.
        policy: number of attempts and pauses.
        final: errors that are not retried; a refused access never is.

    Raises:
        Exception: `error` itself, if it was the last attempt or a retry cannot help.
    """
    if attempt >= policy.attempts or isinstance(error, final) or is_refusal(error):
        raise error
    pause = random.random() * min(policy.longest, policy.backoff * 2 ** (attempt - 1))
    log.warning("%s failed (%s: %s); retrying in %.1f s", what, type(error).__name__, first_line(error), pause)
    return pause


def read_range(folder: Folder, name: str, start: int, stop: int, policy: ReadPolicy) -> Bytes:
    """Return the bytes [start, stop) of a file; large ranges of a local file are memory-mapped, not copied.

    Raises:
        OSError: a local file cannot be read, is too short, or is not a regular file.
        FileNotFoundError: a remote file does not exist.
        PermissionError: a remote file may not be read, or there are no credentials.
        ReadError: each attempt to read a remote file failed.
    """
    path, fs = folder.file(name), folder.fs
    if folder.local:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise NotRegularError(f"{name} is {NOT_REGULAR}")
            return _mapped(file.fileno(), start, stop) or _whole(
                os.pread(file.fileno(), stop - start, start), stop - start
            )

    def request() -> bytes:
        limits = {"timeout": policy.timeout} if getattr(fs, "async_impl", False) else {}
        return _whole(fs.cat_file(path, start=start, end=stop, **limits), stop - start)

    what = f"{folder.url}/{name}"
    try:
        return with_retries(request, f"reading {what}", policy)
    except FINAL_ERRORS:
        raise
    except Exception as error:
        reason = f"{type(error).__name__} {first_line(error)}"
        if is_refusal(error):
            raise PermissionError(reason) from error
        raise ReadError(f"cannot read {what} after {policy.attempts} attempts: {reason}") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a FIFO without a writer does not block."""
    return os.open(path, flags | os.O_NONBLOCK)


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
