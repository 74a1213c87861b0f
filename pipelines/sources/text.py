"""Plain text (`.txt`) and JSON lines (`.jsonl`) for masked language modelling: documents, cut to a length in bytes.

Perceiver IO (appendix F) trains on ten concatenated documents, cut to 2,048 tokens. A file is read in ranges of bytes,
so that a large one is prepared in parallel. Files whose name or folder contains a split's name belong to that split;
without a split to test on, documents are held out by a hash of their content, so that equal ones are in the same split.
"""

import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder, refusing
from pipelines.features import TextFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import (
    HEAD,
    base_name,
    choice,
    decode_utf8,
    number,
    other_encoding,
    shuffled_units,
    source_folder,
)
from pipelines.sources._files import look
from pipelines.sources._layout import held_out_share, split_notes, splits_of_files

SUFFIXES = (".txt", ".jsonl")
OPTIONS = ("length", "join", "document", "column", "held_out", "splits")
LENGTH = 2046
"""With two special ids around it, a piece has 2,048 tokens."""
THREADS = 16
BUFFER = 1 << 20
LONGEST = 64 << 20
"""Longer documents are rejected, so that they do not fill the memory."""

Range = tuple[str, int, int]
"""A file and the bytes [start, stop); the range has the documents that begin there."""
Document = tuple[str, bytes]
"""Its start and its bytes."""


class TextSource:
    """The source.

    Options: `length` (most bytes of a sample, 2,046), `join` (documents joined before they are cut, 1; in the paper
    10), `document` (the end of one in a .txt: `blank` line, `line`, or `file`), `column` (of JSON lines, `text`),
    `held_out` (share, 0.05), `splits` (`names` or `none`, see `_layout.splits_of_files`).
    """

    title = "plain text and JSON lines, cut to a length (SRC/**/*.txt, *.jsonl), without labels"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List ranges of the files below `src`."""
        refuse_options(options, OPTIONS)
        folder = source_folder("text", src, "*.txt or *.jsonl")
        found = look(folder, SUFFIXES)
        if not found.names:
            raise UserError(f"no .txt or .jsonl files below {folder.url}")
        _check_encoding(folder, found.names)
        content = {
            "src": folder.url,
            "length": number(options, "length", LENGTH, least=8),
            "join": number(options, "join", 1),
            "column": options.get("column", "text"),
            "document": choice(options, "document", ("blank", "line", "file"), "blank"),
        }
        splits = splits_of_files(folder, found.names, options)
        rng, whole = random.Random(seed), content["document"] == "file"
        size = shard_rows * content["length"]
        parts = {split or "train": list(file_ranges(folder, names, size, whole)) for split, names in splits.items()}
        default = "0.05" if splits.keys() == {"train"} else None
        held_out = held_out_share(splits, folder, {"held_out": default, **options} if default else options, "0.05")
        if held_out:
            parts["test"] = parts["train"]
        return Listing(
            name=base_name(folder.url),
            features={"text": TextFeature()},
            classes=(),
            licence="not stated: the user's own data",
            origin=folder.url,
            units=_range_units(parts, rng, size, content, held_out=held_out),
            notes=(*split_notes(splits, held_out), *found.notes()),
            rejected=tuple(found.rejected),
            versions=found.versions,
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Join and cut the unit's documents."""
        content = unit.content
        texts: list[tuple[str, str]] = []
        for key, raw in unit_documents(content):
            try:
                text = decode(key, raw, content["column"])
            except ValueError as error:
                # Documents that are held out by their content are read for both splits, but counted once.
                if not content["held_out"] or unit.split == "train":
                    yield Rejected(key, str(error))
                continue
            if text and _belongs(text, unit.split, content["held_out"]):
                texts.append((key, text))
            if len(texts) == content["join"]:
                yield from _cut(texts, content["length"])
                texts = []
        yield from _cut(texts, content["length"])


def _check_encoding(folder: Folder, names: list[str]) -> None:
    """Refuse a file in UTF-16, whose lines are not found; `UserError` names it."""

    def head(name: str) -> bytes:
        return folder.fs.cat_file(folder.file(name), start=0, end=HEAD)

    with refusing(f"source folder {folder.url}", "check the access to it"), ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(names, pool.map(head, names), strict=True):
            if encoding := other_encoding(found):
                raise UserError(
                    f"{folder.file(name)} is {encoding}, wanted UTF-8: convert it, for example iconv -f UTF-16 -t UTF-8"
                )


def file_ranges(folder: Folder, names: Iterable[str], size: int, whole: bool) -> Iterator[Range]:
    for name in names:
        total = folder.fs.size(folder.file(name))
        step = total if whole else size
        yield from ((name, start, min(start + step, total)) for start in range(0, total, max(1, step)))


def _range_units(
    splits: Mapping[str, list[Range]], rng: random.Random, size: int, content: Mapping[str, Any], *, held_out: float
) -> list[Unit]:
    """Return units of about `size` bytes of their split: small files together, and more where few texts are taken."""
    units: list[Unit] = []
    for split, ranges in splits.items():
        taken = held_out if split == "test" and held_out else 1 - held_out
        mean = max(1.0, sum(stop - start for _, start, stop in ranges) / max(1, len(ranges)) * taken)
        units += shuffled_units({split: ranges}, rng, max(1, int(size / mean)), held_out=held_out, **content)
    return units


def unit_documents(content: Mapping[str, Any]) -> Iterator[Document]:
    """Yield the documents of a unit's ranges, as stored."""
    folder = open_folder(content["src"])
    for name, start, stop in content["items"]:
        by = "line" if name.lower().endswith(".jsonl") else content["document"]
        with folder.fs.open(folder.file(name), "rb") as opened:
            # Files of a store cannot limit the length of a line; the reader can.
            stream = opened if folder.local else io.BufferedReader(opened, BUFFER)
            for place, raw in documents(stream, start, stop, by):
                yield f"{name}@{place}", raw


def documents(stream: BinaryIO, start: int, stop: int, by: str) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of the documents that begin in [start, stop).

    Args:
        stream: the file.
        start, stop: bytes; ranges that cover a file yield each of its documents once.
        by: the end of a document: `line`, a `blank` line, or the `file`.
    """
    if by == "file":
        yield 0, stream.read(LONGEST + 1)
        return
    stream.seek(max(0, start - 3))
    # The start of the file counts as the end of a line.
    before = b"\n" * (start <= 3) + stream.read(start - stream.tell())
    if not before.endswith(b"\n"):
        # A range may begin within an empty line, between its \r and \n.
        before = (before + _rest_of_line(stream))[-3:]
    fresh = not start or by == "line" or before.endswith((b"\n\n", b"\n\r\n"))
    begin, lines, kept = start, [], 0
    while line := stream.readline(LONGEST + 1):
        here = stream.tell() - len(line)
        empty = not line.strip(b"\r\n")
        if not lines and here >= stop:
            return
        if fresh and not empty:
            begin = here if not lines else begin
            lines += [line] if kept <= LONGEST else []
            kept += len(line)
        # If the range begins inside a document, everything up to its end belongs to another range.
        if empty or (by == "line" and line.endswith(b"\n")):
            if lines:
                yield begin, b"".join(lines)
            lines, kept, fresh = [], 0, True
    if lines:
        yield begin, b"".join(lines)


def _rest_of_line(stream: BinaryIO) -> bytes:
    """Read to the end of the line; return its last bytes."""
    last = b""
    while part := stream.readline(LONGEST):
        last = (last + part)[-3:]
        if part.endswith(b"\n"):
            break
    return last


def decode(key: str, raw: bytes, column: str) -> str:
    """Return the text of a document, or raise `ValueError` with the reason for the quarantine."""
    if len(raw) > LONGEST:
        raise ValueError(f"a document of more than {LONGEST >> 20} MiB")
    text = decode_utf8(raw).strip()
    if not key.rsplit("@", 1)[0].lower().endswith(".jsonl") or not text:
        return text
    try:
        value = json.loads(text)[column]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no JSON object with '{column}'") from error
    if not isinstance(value, str):
        raise ValueError(f"'{column}' is not a string")
    return value.strip()


def _belongs(text: str, split: str, held_out: float) -> bool:
    if not held_out:
        return True
    part = int.from_bytes(hashlib.md5(text.encode("utf-8", "replace"), usedforsecurity=False).digest()[:4], "big")
    return (part < held_out * 2**32) == (split == "test")


def _cut(texts: list[tuple[str, str]], length: int) -> Iterator[Sample | Rejected]:
    """Yield pieces of at most `length` bytes of the joined texts, cut before a word if possible."""
    if not texts:
        return
    raw = "\n".join(text for _, text in texts).encode("utf-8", "replace")
    start = 0
    while start < len(raw):
        stop = min(start + length, len(raw))
        if stop < len(raw):
            stop = _border(raw, start, stop)
        piece = raw[start:stop].decode("utf-8").strip()
        if piece:
            yield {"key": f"{texts[0][0]}+{start}", "text": piece}
        start = stop


def _border(raw: bytes, start: int, stop: int) -> int:
    """Return the last space in the second half of [start, stop), else the last start of a character."""
    space = max(raw.rfind(sign, start + (stop - start) // 2, stop) for sign in (b" ", b"\n"))
    if space > start:
        return space + 1
    while raw[stop] & 0xC0 == 0x80:
        stop -= 1
    return stop


source = TextSource()
