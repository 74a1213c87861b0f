"""Compare a manifest with a store's listing, so that missing and changed files are found before a run starts.

A folder is listed once, whatever the number of its shards: 10**5 in an object store take a hundred requests. For a
store that cannot list (plain HTTP), at most `ASKED` evenly spread files are requested.
"""

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from perceiver.config import UserError
from perceiver.storage import NOT_REGULAR, Folder, first_line, open_folder, protocols
from pipelines.shards.manifest import ShardInfo, Split, split_url

ASKED = 1000
THREADS = 16
NAMED = 3
NO_LISTING = {"http", "https"}


def file_tag(info: Mapping[str, Any]) -> str:
    """Return a file's version from a store's listing: its ETag, else its modification time, else nothing.

    A local link has the time of the file that it leads to; in earlier versions it had its own, see `file_fault`.
    """
    if info.get("islink"):
        with contextlib.suppress(OSError):
            return f"{Path(info['name']).stat().st_mtime:.6f}"
    for key in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(key):
            return str(info[key]).strip('"')
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        if info.get(key):
            return f"{info[key]:.6f}" if isinstance(info[key], float) else str(info[key])
    return ""


def listed(folder: Folder, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the store's entries for these files of one folder; missing files are left out."""
    if protocols(folder.fs) & NO_LISTING:
        chosen = names[:: max(1, -(-len(names) // ASKED))]
        with ThreadPoolExecutor(THREADS) as pool:
            found = zip(chosen, pool.map(lambda name: _info(folder, name), chosen), strict=True)
            # Files that were not requested count as unchanged.
            return {name: {"size": None} for name in names if name not in set(chosen)} | {
                name: info for name, info in found if info is not None
            }
    folder.fs.invalidate_cache()
    try:
        entries = folder.fs.ls(folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    wanted = set(names)
    found = ((entry["name"].rstrip("/").rsplit("/", 1)[-1], entry) for entry in entries)
    return {name: entry for name, entry in found if name in wanted}


def _info(folder: Folder, name: str) -> dict[str, Any] | None:
    try:
        return folder.fs.info(folder.file(name))
    except FileNotFoundError:
        return None


def check_listing(url: str, split: Split, options: Mapping[str, str] | None = None) -> None:
    """Refuse shards that are missing, or whose size or version differs from the manifest.

    Args:
        url: the folder of the manifest; indexed files have their own URLs.
        split: the shards.
        options: storage options.

    Raises:
        UserError: the message names the first shards, or the store does not answer.
    """
    folders: dict[str, dict[str, ShardInfo]] = {}
    for shard in split.shards:
        parent, name = split_url(url, shard.name)
        folders.setdefault(parent, {})[name] = shard
    faults = []
    for parent, shards in folders.items():
        folder = open_folder(parent, options)
        try:
            found = listed(folder, list(shards))
        except Exception as error:  # noqa: BLE001  each file system has its own exceptions
            raise UserError(f"cannot list {parent}: {first_line(error)}; check access") from error
        faults += [
            f"{parent}/{name}: {fault}"
            for name, shard in shards.items()
            if (fault := file_fault(shard, found.get(name), folder))
        ]
    if faults:
        more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        indexed = any(shard.tag for shard in split.shards)
        fix = "index the data again into a new folder" if indexed else "restore the files, or prepare the data again"
        raise UserError(
            f"{len(faults)} of {len(split.shards)} files differ from {url}/manifest.json:"
            f" {'; '.join(faults[:NAMED])}{more}: {fix}"
        )


def file_fault(shard: ShardInfo, info: Mapping[str, Any] | None, folder: Folder) -> str:
    """Return how a file differs from its entry in the manifest, or "".

    Args:
        shard: the entry.
        info: the file in the store's listing; None if it is missing, with size None if the store was not asked.
        folder: its folder.
    """
    if info is None:
        return "missing"
    if info.get("type", "file") != "file":
        return NOT_REGULAR
    if info.get("islink") and not shard.tag:
        try:
            folder.existing(shard.name)
        except OSError as error:
            return first_line(error)
    size = info.get("size")
    if size is not None and size != shard.bytes:
        return f"{size} bytes, wanted {shard.bytes}"
    if shard.tag and size is not None and shard.tag not in (file_tag(info), file_tag({**info, "islink": False})):
        return "changed since it was indexed"
    return ""
