"""Helpers of several sources: options, tars, lists, units of items, seeds."""

import csv
import gzip
import hashlib
import io
import random
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder, refusing
from pipelines.sources import Unit

MAX_FILE = 512 << 20
"""Largest file, or member of a tar, in bytes, that is read as a whole: a sample, or a list of labels."""
csv.field_size_limit(MAX_FILE)  # of the whole process; a cell of 128 KiB would be an error
MAX_HEADER = 1 << 20
HEAD = 1024
"""First bytes by which an encoding is recognized."""
MAX_CLASSES = 1_000_000
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error)
"""What reading a damaged tar may raise."""


def source_folder(name: str, src: str | None, wanted: str) -> Folder:
    """Open the source folder that the user gave, or raise `UserError`."""
    if src is None:
        raise UserError(f"source {name} needs a source folder with {wanted}: perceiver prepare {name} SRC DST")
    folder = open_folder(src)
    with refusing(f"source folder {src}", "check the place and the access to it"):
        there = folder.fs.isdir(folder.path)
    if not there:
        raise UserError(f"source folder {src} does not exist: wanted a folder with {wanted}")
    return folder


class TarBytes:
    """The bytes of a tar, decompressed, for `tarfile`; a header that would fill the memory is an error.

    Args:
        stream: the file, plain or with gzip.
        forward: it is read forwards, without seeking, as a compressed one always is.

    Attributes:
        forward: as above.
        allowed: bytes that may be read until this is set again if it is read forwards, else those of one call.
    """

    def __init__(self, stream: Any, forward: bool) -> None:
        self.compressed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=stream) if self.compressed else stream
        self.forward = forward or self.compressed
        self.seek, self.tell, self.seekable = self._stream.seek, self._stream.tell, self._stream.seekable
        self.allowed = MAX_HEADER

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        if size > self.allowed:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER} bytes")
        found = self._stream.read(size)
        self.allowed -= len(found) if self.forward else 0
        return found


def tar_members(stream: BinaryIO | Any, *, forward: bool = False) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of a tar, and the archive to extract the member from before the next one is taken.

    Args:
        stream: the file, plain or with gzip.
        forward: read without seeking, and raise `EOFError` if the end of the archive is missing.

    Raises:
        one of `TAR_ERRORS`: the tar is damaged.
    """
    content: Any = TarBytes(stream, forward)
    with tarfile.open(fileobj=content, mode="r|" if content.forward else "r:") as archive:
        for member in archive:
            content.allowed = max(0, member.size) + MAX_HEADER
            yield archive, member
        if forward and not content.compressed and stream.seek(0, io.SEEK_END) < archive.offset + tarfile.BLOCKSIZE:
            raise EOFError("no end of the archive")


def other_encoding(head: bytes) -> str:
    """Return the encoding of a text that is not UTF-8 by its first bytes; empty for UTF-8, which has no zero bytes."""
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    return "UTF-16 or a binary file" if b"\0" in head else ""


def decode_utf8(content: bytes) -> str:
    """Return a text in UTF-8 without its byte order mark.

    Raises:
        ValueError: it is in another encoding; the message is a reason for the quarantine.
    """
    if found := other_encoding(content[:HEAD]):
        raise ValueError(f"{found}, wanted UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8: {error.reason}") from error


def read_list(folder: Folder, name: str) -> str:
    """Return the text of a small file, such as a list of labels.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        with refusing(folder.file(name), "check the access to it"):
            content = folder.fs.cat_file(folder.file(name))
        return decode_utf8(content)
    except ValueError as error:
        known = "UTF-16" if "wanted" in str(error) else "LATIN1"
        raise UserError(
            f"{folder.file(name)} is not readable ({error}): convert it, for example iconv -f {known} -t UTF-8"
        ) from error


def numbered_classes(largest: int, where: str) -> list[str]:
    """Return the names "0", "1", ... of classes that are known by numbers only.

    Args:
        largest: the largest label; -1 without labels.
        where: the labels, for the error.

    Raises:
        UserError: there are more than `MAX_CLASSES`.
    """
    if largest >= MAX_CLASSES:
        raise UserError(
            f"{where}: got the label {largest}, wanted class numbers below {MAX_CLASSES}: number the classes from 0, "
            "or give --option classes=NAME,..."
        )
    return [str(label) for label in range(largest + 1)]


def path_below(name: str) -> str:
    """Return a path in a table of files, relative to the table's folder; names may have any character.

    Raises:
        ValueError: it is empty, absolute or a URL, or has `..` or an empty part.
    """
    name = name.removeprefix("./")
    if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
        raise ValueError(f"got file name {name[:80]!r}, wanted a path below the table's folder, such as images/a.png")
    return name


def base_name(src: str) -> str:
    """Return the last part of a path or URL; of `.` and `..` the name of that folder."""
    name = src.rstrip("/").rsplit("/", 1)[-1]
    return (Path(src).resolve().name or "data") if name in ("", ".", "..") else name


def choice(options: Mapping[str, str], key: str, allowed: Iterable[str], default: str) -> str:
    """Return an option that takes one of some words, or raise `UserError`."""
    value, allowed = options.get(key, default), list(allowed)
    if value not in allowed:
        raise UserError(f"option {key}={value}: wanted one of {', '.join(allowed)}")
    return value


def share(options: Mapping[str, str], key: str, default: str) -> float:
    """Return an option that is a share between 0 and 1, or raise `UserError`."""
    try:
        value = float(options.get(key, default))
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UserError(f"option {key}={options[key]}: wanted a share between 0 and 1, such as {default}")
    return value


def number(options: Mapping[str, str], key: str, default: int, *, least: int = 1) -> int:
    """Return an option that is a whole number of at least `least`, or raise `UserError`."""
    text = options.get(key, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) >= least):
        raise UserError(
            f"option {key}={text[:80]}: wanted a whole number of at least {least}, below 10^9, such as {default}"
        )
    return int(text)


def channels(options: Mapping[str, str], default: str = "3") -> int:
    """Return the option `channels` of image sources: 1 (grey) or 3 (RGB)."""
    return int(choice(options, "channels", ("1", "3"), default))


def hold_out(items: Sequence[Any], part: float, rng: random.Random) -> dict[str, list[Any]]:
    """Split items at random into `test`, a share of them, and `train`; of two or more each gets at least one."""
    shuffled = list(items)
    rng.shuffle(shuffled)
    cut = min(max(1, round(len(shuffled) * part)), len(shuffled) - 1)
    return {"train": shuffled[cut:], "test": shuffled[:cut]} if cut > 0 else {"train": shuffled}


def shuffled_units(
    splits: Mapping[str, Sequence[Any]], rng: random.Random, shard_rows: int, **content: Any
) -> list[Unit]:
    """Return `units_of` shuffled items, under `items`."""
    shuffled = {split: list(members) for split, members in splits.items()}
    for items in shuffled.values():
        rng.shuffle(items)
    return units_of(shuffled, shard_rows, "items", **content)


def units_of(splits: Mapping[str, Sequence[Any]], shard_rows: int, name: str, **content: Any) -> list[Unit]:
    """Return units of up to `shard_rows` items each in order, under `name` next to the content that all share."""
    return [
        Unit(split, {**content, name: items[start : start + shard_rows]})
        for split, items in splits.items()
        for start in range(0, len(items), shard_rows)
    ]


def item_seed(seed: int, key: str) -> int:
    """Return a seed for the randomness of one item that does not depend on the order of reading."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little")
