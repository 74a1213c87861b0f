"""English text with its topic: the documentation of Django (BSD-3), in pieces, labelled by the part of the manual.

Whole documents are held out. With `share` only a part of the training pieces is taken, to see what labels are worth.
"""

import hashlib
import random
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from perceiver.config import UserError
from pipelines.features import LabelFeature, TextFeature
from pipelines.packages import Package, fetch, read_once
from pipelines.sources import Listing, Sample, Unit, refuse_options
from pipelines.sources._common import item_seed, number, share, units_of

PACKAGE = Package(
    "django==5.2.19",
    "django-5.2.19.tar.gz",
    "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
)
MEMBER = re.compile(r"[^/]+/docs/(.+)\.txt$")
PARTS = ("contrib", "faq", "howto", "internals", "intro", "models", "ref", "releases", "topics")
"""Folders of the manual; contrib and models are those of `ref`."""
LENGTH = 254
"""With two special ids around it, a piece has 256 tokens."""
HELD_OUT = 10
"""One document in as many is held out."""


def part_of(document: str) -> str:
    """Return the part of the manual that a document (`ref/models/fields`) belongs to; empty for none of `PARTS`."""
    folders = PurePosixPath(document).parts[:-1]
    if folders[:1] == ("ref",) and folders[1:2] in (("contrib",), ("models",)):
        return folders[1]
    return folders[0] if folders and folders[0] in PARTS else ""


def pieces(text: str, length: int) -> Iterator[str]:
    """Yield a document in pieces of whole lines of at most `length` bytes; longer lines are cut."""
    kept, size = list[str](), 0
    for line in text.splitlines():
        for part in _cut(line, length):
            if kept and size + len(part.encode()) + 1 > length:
                yield "\n".join(kept)
                kept, size = [], 0
            if part or kept:
                size += len(part.encode()) + bool(kept)
                kept.append(part)
    if kept:
        yield "\n".join(kept)


def _cut(line: str, length: int) -> list[str]:
    raw = line.encode()
    if len(raw) <= length:
        return [line]
    return [raw[start : start + length].decode(errors="ignore") for start in range(0, len(raw), length)]


@read_once
def read_archive(path: str) -> dict[str, str]:
    """Return the documents with a part of the manual by name, in order of their names."""
    found: dict[str, str] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                place = MEMBER.match(member.name)
                if place and member.isfile() and part_of(place[1]):
                    stream = archive.extractfile(member)
                    assert stream is not None, "a plain file"
                    found[place[1]] = stream.read().decode("utf-8")
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable archive ({error}): wanted the file {PACKAGE.file}") from error
    if not found:
        raise UserError(f"{path} contains no documentation: wanted the file {PACKAGE.file}")
    return dict(sorted(found.items()))


class DjangoDocs:
    """The source.

    Options: `length` (most bytes of a piece, 254), `share` (of the training pieces that are taken, 1).
    """

    title = "English technical text, the documentation of Django, and the part of the manual it is from"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the pieces; `src` is a copy of the package's file, downloaded if None."""
        refuse_options(options, ("length", "share"))
        length = number(options, "length", LENGTH, least=16)
        taken = share(options, "share", "0.1") if "share" in options else 1.0
        splits: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
        for name, text in read_archive(str(fetch(PACKAGE, src))).items():
            digest = hashlib.sha256(name.encode()).digest()
            split = "test" if int.from_bytes(digest[:8], "little") % HELD_OUT == 0 else "train"
            for index, _ in enumerate(pieces(text, length)):
                if split == "test" or item_seed(seed, f"{name}/{index}") % 10_000 < round(10_000 * taken):
                    splits[split].append((name, index))
        if not splits["train"]:
            raise UserError(f"option share = {taken:g} leaves no text to train on: give a larger one")
        for rows in splits.values():
            random.Random(seed).shuffle(rows)
        units = units_of(splits, shard_rows, "rows", path=src, length=length)
        features = {"text": TextFeature(), "label": LabelFeature()}
        origin = f"{PACKAGE.requirement}, docs/**/*.txt"
        return Listing("django_docs", features, PARTS, "Django Software Foundation, BSD-3-Clause", origin, units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Yield the unit's pieces."""
        documents = read_archive(str(fetch(PACKAGE, unit.content["path"])))
        cut: dict[str, list[str]] = {}
        for name, index in unit.content["rows"]:
            if name not in cut:
                cut[name] = list(pieces(documents[name], unit.content["length"]))
            yield {"key": f"{name}#{index}", "text": cut[name][index], "label": PARTS.index(part_of(name))}


source = DjangoDocs()
