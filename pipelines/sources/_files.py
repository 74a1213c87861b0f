"""The files of a folder of raw data: those with the wanted endings, links followed, and what is left out."""

import contextlib
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from perceiver.config import UserError
from perceiver.storage import Folder, raise_unanswered, refusing
from pipelines.shards.listing import file_tag, listed
from pipelines.sources import Rejected, Sample
from pipelines.sources._common import MAX_FILE, path_below

SYSTEM_NAMES = {
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
IN_PARTS = (".tar", ".gz", ".tgz", ".parquet", ".txt", ".jsonl", ".h5", ".hdf5")
"""Endings of files that are read in parts and may be larger than `MAX_FILE`."""
PREPARED = (".arrow", ".arrow.json", "manifest.json", "quarantine.parquet", "_receipts/fingerprint")
"""Endings of files of a prepared folder, which may be below the raw data."""
NO_MEDIA = (*PREPARED, ".parquet", ".md", ".txt", ".json")
"""Endings of files in a folder of tables that a cell does not name."""
SPECIAL = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
MOST_VISITS = 100
"""How often a folder may be reached over links; a few links to each other would otherwise be an endless tree."""
VERSION = "?versionId="
LINKS = DEAD_LINK, LOOP = "a dead link", "a link to a folder above it"

Entry = tuple[str, str, int, int | str]
"""A file relative to the source folder, what it is unless it is a regular file, its bytes, and its time or ETag."""


@dataclass
class Found:
    """The files below a folder.

    Attributes:
        names: files with the wanted endings, relative to the folder and sorted. Links are followed.
        versions: size and time (or ETag) of each of them, by which a changed file is recognised.
        rejected: links that lead nowhere or to a folder above them.
        ignored: number and an example of the files that were left out, by reason.
    """

    names: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    ignored: dict[str, tuple[int, str]] = field(default_factory=dict)

    def ignore(self, reason: str, name: str) -> None:
        """Count a file that is left out."""
        count, example = self.ignored.get(reason, (0, name))
        self.ignored[reason] = count + 1, min(example, name)

    def notes(self) -> tuple[str, ...]:
        """Return one line that counts what was left out, with an example of each; none if nothing was."""
        parts = [f"{reason}: {count:,} ({example})" for reason, (count, example) in self.ignored.items()]
        return (f"left out: {'; '.join(parts)}",) if parts else ()


def hidden(name: str) -> bool:
    """Return whether a path has a hidden part, or a file or folder that operating systems and editors leave behind."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM_NAMES for part in name.split("/")
    )


def look(folder: Folder, suffixes: tuple[str, ...]) -> Found:
    """Find all files below a folder with one of these (lower-case) endings; hidden and system files are left out.

    Raises:
        UserError: the folder cannot be listed, or a wanted file is a FIFO, a socket or a device, which could be read
            for ever, or too large.
    """
    found = Found()
    with refusing(f"source folder {folder.url}", "check the place and the access to it"):
        for name, kind, size, tag in (
            _local_entries(folder.path, Counter()) if folder.local else _remote_entries(folder)
        ):
            wanted = name.lower().endswith(suffixes)
            if hidden(name):
                found.ignore("hidden or system files", name)
            elif kind in LINKS:
                if wanted or "." not in name.rsplit("/", 1)[-1]:
                    found.rejected.append(Rejected(name, kind))
            elif VERSION in name and not folder.local:
                found.rejected.append(Rejected(name, f"{VERSION} in a name, which stores read as a version: rename it"))
            elif not wanted:
                found.ignore("files with other endings", name)
            elif kind:
                raise UserError(f"{folder.file(name)} is a {kind}: wanted a regular file; move it away")
            elif size > MAX_FILE and not name.lower().endswith(IN_PARTS):
                raise UserError(f"{folder.file(name)} has {size:,} bytes, more than {MAX_FILE:,}: move it away")
            else:
                found.names.append(name)
                found.versions[name] = version(size, tag)
    found.names.sort()
    return found


def version(size: int | None, tag: int | str) -> str:
    """Return what recognises a changed file; empty if the store states neither a time nor an ETag."""
    return f"{size} {tag}" if tag else ""


def others_version(folder: Folder, known: tuple[str, ...] = NO_MEDIA) -> str:
    """Return a hash of the names and versions of all files below a folder.

    Args:
        folder: the source folder.
        known: endings of files that do not count; hidden files do not either.
    """
    found = sorted(
        f"{name} {version(size, tag)}"
        for name, _, size, tag in _entries(folder)
        if not hidden(name) and not name.lower().endswith(known)
    )
    return hashlib.sha256("\n".join(found).encode("utf-8", "surrogateescape")).hexdigest()


def versions_of(folder: Folder, names: Iterable[str]) -> dict[str, str]:
    """Return size and time (or ETag) of files that a table names; those that do not exist are left out."""
    versions: dict[str, str] = {}
    if folder.local:
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                facts = Path(folder.file(name)).stat()
                versions[name] = version(facts.st_size, facts.st_mtime_ns)
        return versions
    by_parent: dict[str, set[str]] = {}
    for name in names:
        above, _, base = name.rpartition("/")
        by_parent.setdefault(above, set()).add(base)
    for above, bases in by_parent.items():
        parent = Folder(folder.fs, folder.file(above), folder.url) if above else folder
        prefix = above and above + "/"
        with refusing(f"source folder {folder.file(above)}", "check the place and the access to it"):
            infos = listed(parent, sorted(bases))
        versions |= {prefix + base: version(info["size"], file_tag(info)) for base, info in infos.items()}
    return versions


def read_file(folder: Folder, name: str) -> bytes:
    """Read a file that a table names.

    Raises:
        ValueError: it is a FIFO, socket, device or folder, or larger than `MAX_FILE`; the message is a reason for the
            quarantine.
        OSError: it does not exist or cannot be read.
    """
    facts = folder.fs.info(folder.file(name))
    if folder.local and not stat.S_ISREG(Path(folder.file(name)).stat().st_mode):
        raise ValueError("not a regular file")
    if (facts.get("size") or 0) > MAX_FILE:
        raise ValueError(f"{facts['size']:,} bytes, more than {MAX_FILE:,}")
    return folder.fs.cat_file(folder.file(name))


def read_below(folder: Folder, above: str, name: str) -> bytes:
    """Read a file that a cell of a table names; see `read_file`.

    Args:
        folder: the source folder.
        above: the table's folder, with a slash, relative to it.
        name: the path, relative to the table's folder.
    """
    return read_file(folder, above + path_below(name))


def whole_file(folder: Folder, key: str, path: str, feature: str, label: int | list[int]) -> Sample | Rejected:
    """Return a sample whose feature is a file as it is, or why there is none; an empty path is a missing file."""
    if not path:
        return Rejected(key, "no media file")
    try:
        return {"key": key, feature: folder.fs.cat_file(folder.file(path)), "label": label}
    except OSError as error:
        return unreadable(key, error)


def unreadable(key: str, error: OSError) -> Rejected:
    """Return a file that cannot be read as rejected; raise the error of a store that does not answer again."""
    raise_unanswered(error)
    return Rejected(key, f"unreadable file: {type(error).__name__}")


def _entries(folder: Folder) -> Iterator[Entry]:
    """Yield the files below a folder."""
    return _local_entries(folder.path, Counter()) if folder.local else _remote_entries(folder)


def _remote_entries(folder: Folder) -> Iterator[Entry]:
    """Yield the files below a folder of a store."""
    root = folder.path.rstrip("/") + "/"
    for path, facts in folder.fs.find(folder.path, detail=True).items():
        yield path[len(root) :], "", facts.get("size") or 0, file_tag(facts)


def _local_entries(
    path: str, visits: Counter[tuple[int, int]], prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Entry]:
    """Yield the files below a local folder, and hidden folders with a slash; links are followed.

    Args:
        path: the folder.
        visits: how often each folder, by device and number, was read.
        prefix: its name relative to the first one, with a slash.
        above: the folders above it, to detect loops.
    """
    facts = Path(path).stat()
    here = facts.st_dev, facts.st_ino
    above = above | {here}
    visits[here] += 1
    if visits[here] > MOST_VISITS:
        raise UserError(f"{path} is reached by more than {MOST_VISITS} links: remove them")
    with os.scandir(path) as entries:
        for entry in entries:
            name = prefix + entry.name
            try:
                facts = entry.stat()
            except OSError:  # the target does not exist, or the link leads to itself
                yield name, DEAD_LINK, 0, 0
                continue
            if not stat.S_ISDIR(facts.st_mode):
                yield name, SPECIAL.get(stat.S_IFMT(facts.st_mode), ""), facts.st_size, facts.st_mtime_ns
            elif hidden(entry.name):
                yield name + "/", "", 0, 0
            elif (facts.st_dev, facts.st_ino) in above:
                yield name, LOOP, 0, 0
            else:
                yield from _local_entries(entry.path, visits, name + "/", above)
