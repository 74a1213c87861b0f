"""WebDataset tars: `SRC/train-000000.tar`, ...; members that share a name up to the first dot are one sample.

Kinds of member: .jpg .jpeg .png .webp (image), .flac .wav .ogg .mp3 (audio), .mp4 .mkv .webm .avi (video), .txt
(text), .cls (class as a number or name), .json (its `label`, or the key that the option `label` names). A tar is read
sequentially and never unpacked. Members with `..` or an absolute path, links, devices and pickles are never opened:
each is listed with key and reason in the quarantine; the other members of its sample are used.
"""

import contextlib
import json
import random
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, raise_unanswered
from pipelines.features import AudioFeature, Feature, ImageFeature, LabelFeature, TextFeature, VideoFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import (
    MAX_FILE,
    TAR_ERRORS,
    base_name,
    channels,
    find_files,
    numbered_classes,
    shuffled_units,
    source_folder,
    split_of,
    tar_members,
)

KINDS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("flac", "wav", "ogg", "mp3"),
    "video": ("mp4", "mkv", "webm", "avi"),
    "text": ("txt",),
    "label": ("cls", "json"),
}
KIND_OF = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}
LABELS = KINDS["label"]
PICKLES = ("pkl", "pickle", "pyd", "pt", "pth", "joblib", "dill")
"""Suffixes that other readers of this format unpickle."""
MAX_LABEL = 1 << 20
OPTIONS = ("classes", "label", "channels")
PROBE = 256
DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class Member(NamedTuple):
    """A safe member: the sample's name, the suffix, the content."""

    name: str
    suffix: str
    content: bytes


class WebDataset:
    """The source. Options: `classes` (names with commas), `label` (key of the .json), `channels` of images (1 or 3)."""

    title = "WebDataset tars (SRC/train-*.tar, SRC/val-*.tar) of images, sound, video or texts, with .cls or .json"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the tars below `src`; each becomes one shard."""
        refuse_options(options, OPTIONS)
        folder = source_folder("webdataset", src, "*.tar")
        names = find_files(folder, (".tar", ".tar.gz", ".tgz"))
        if not names:
            raise UserError(f"no .tar files below {folder.url}: wanted train-000000.tar, ...")
        key = options.get("label", "label")
        kinds, labels = probe(folder, names[0], key)
        found = (
            ImageFeature(channels=channels(options)),
            AudioFeature(),
            VideoFeature(),
            TextFeature(),
            LabelFeature(),
        )
        features: dict[str, Feature] = {feature.kind: feature for feature in found if feature.kind in kinds}
        named = options["classes"].split(",") if "classes" in options else None
        classes = (named or class_names(folder, names, labels, key)) if labels else []
        splits = {
            split: [name for name in names if split_of(name) == split]
            for split in dict.fromkeys(sorted((split_of(name) for name in names), key="train val test".index))
        }
        units = shuffled_units(
            splits, random.Random(seed), 1, src=folder.url, reading=[list(features), labels, key, classes]
        )
        return Listing(base_name(folder.url), features, tuple(classes), "not stated: see the source", folder.url, units)

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's tar."""
        content = unit.content
        folder = open_folder(content["src"])
        for name in content["items"]:
            for found in samples_of(members(folder, name), SampleLayout(*content["reading"])):
                if isinstance(found, Rejected):
                    yield Rejected(f"{name}/{found.key}" if found.key else name, found.reason)
                else:
                    yield {**found, "key": f"{name}/{found['key']}"}


def members(folder: Folder, name: str) -> Iterator[Member | Rejected]:
    """Yield the members of a tar in order; unsafe ones and the place of damage as `Rejected`."""
    try:
        with folder.fs.open(folder.file(name), "rb") as stream:
            for archive, member in tar_members(stream, forward=True):
                if member.isdir():
                    continue
                reason = unsafe(member)
                if reason:
                    yield Rejected(member.name, reason)
                    continue
                base, _, suffix = member.name.rsplit("/", 1)[-1].partition(".")
                inside = archive.extractfile(member)
                assert inside is not None, "a regular file"
                place = member.name[: len(member.name) - len(suffix) - 1] if suffix else base
                yield Member(place, suffix.lower().rsplit(".", 1)[-1], inside.read())
    except TAR_ERRORS as error:
        raise_unanswered(error)
        yield Rejected("", f"a damaged tar, read up to the damage: {first_line(error, 80)}")


def unsafe(member: tarfile.TarInfo) -> str:
    """Return why a member is not opened; empty if it is safe."""
    if member.name.startswith(("/", "\\")) or DRIVE.match(member.name):
        return "a member with an absolute path"
    if ".." in member.name.replace("\\", "/").split("/"):
        return "a member with .. in its path"
    if not member.isreg():
        return "a link" if member.islnk() or member.issym() else "a device or another special file"
    if member.name.lower().rsplit(".", 1)[-1] in PICKLES:
        return "a pickle"
    most = MAX_LABEL if member.name.lower().endswith((".cls", ".json")) else MAX_FILE
    return "" if member.size <= most else f"a member of {member.size} bytes, more than {most}"


def samples_of(found: Iterable[Member | Rejected], layout: "SampleLayout") -> Iterator[Sample | Rejected]:
    """Join the members of one name to a sample; an incomplete one is `Rejected`."""
    name, sample, reason = "", {}, ""
    for member in found:
        if isinstance(member, Rejected):
            yield member
            continue
        if member.name != name:
            yield from layout.finished(name, sample, reason)
            name, sample, reason = member.name, {}, ""
        kind = layout.kind(member)
        if kind and kind not in sample:
            try:
                sample[kind] = layout.value(member, kind)
            except ValueError as error:
                reason = reason or str(error)
    yield from layout.finished(name, sample, reason)


@dataclass(frozen=True)
class SampleLayout:
    """The members of a sample.

    Attributes:
        kinds: of the members; all are required.
        labels: suffix of the member with the label, cls or json.
        key: of the label in a .json.
        classes: their names.
    """

    kinds: Sequence[str]
    labels: str
    key: str
    classes: Sequence[str]

    def kind(self, member: Member) -> str | None:
        """Return the kind of a wanted member, else None."""
        if member.suffix in LABELS:
            return "label" if "label" in self.kinds and member.suffix == self.labels else None
        kind = KIND_OF.get(member.suffix)
        return kind if kind in self.kinds else None

    def value(self, member: Member, kind: str) -> Any:
        """Return what is stored of a member, or raise `ValueError` with the reason for the quarantine."""
        if kind == "text":
            return utf8(member.content)
        return number_of(raw_label(member, self.key), self.classes) if kind == "label" else member.content

    def finished(self, name: str, sample: Mapping[str, Any], reason: str) -> Iterator[Sample | Rejected]:
        """Yield the sample if it is complete; nothing if none of its members is wanted."""
        missing = [kind for kind in self.kinds if kind not in sample]
        if reason or (sample and missing):
            yield Rejected(name, reason or f"a sample without {' and '.join(missing)}")
        elif sample:
            yield {"key": name, **sample}


def utf8(content: bytes) -> str:
    """Decode a text, or raise `ValueError`."""
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8: {error.reason}") from error


def raw_label(member: Member, key: str) -> str | int:
    """Return the label as written in a .cls or .json, or raise `ValueError`."""
    text = utf8(member.content)
    if member.suffix == "json":
        try:
            value = json.loads(text)[key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no JSON object with '{key}'") from error
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise ValueError(f"'{key}' is neither a number nor a string")
        return value
    return int(text) if text.lstrip("-").isdecimal() else text


def number_of(label: str | int, classes: Sequence[str]) -> int:
    """Return the class of a label by its number or name, or raise `ValueError`."""
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    raise ValueError("an unknown label")


def probe(folder: Folder, name: str, key: str) -> tuple[list[str], str]:
    """Return the kinds of the first samples of a tar, and the suffix of their label."""
    kinds: set[str] = set()
    labels = ""
    for member in islice(members(folder, name), PROBE):
        if isinstance(member, Rejected):
            continue
        if member.suffix not in LABELS:
            kinds |= {KIND_OF[member.suffix]} if member.suffix in KIND_OF else set()
        elif labels != "cls":
            with contextlib.suppress(ValueError):
                raw_label(member, key)
                labels = member.suffix
    if not kinds:
        raise UserError(
            f"{folder.url}/{name} has no images, sound, video or texts at its beginning: wanted members such as"
            " 000000.jpg and 000000.cls"
        )
    return [*sorted(kinds), *(["label"] if labels else [])], labels


def _labels(folder: Folder, name: str, suffix: str, key: str) -> Iterator[str | int]:
    """Yield the labels of a tar; those that cannot be read are left out."""
    with folder.fs.open(folder.file(name), "rb") as stream:
        for archive, info in tar_members(stream):
            wanted = info.name.endswith(f".{suffix}") and not unsafe(info)
            inside = archive.extractfile(info) if wanted else None
            if inside:
                with contextlib.suppress(ValueError):
                    yield raw_label(Member("", suffix, inside.read()), key)


def class_names(folder: Folder, names: Iterable[str], labels: str, key: str) -> list[str]:
    """Return the names of the classes by the labels of all tars: numbers up to the largest, or the strings in order."""
    found: set[str | int] = set()
    for name in names:
        try:
            found.update(_labels(folder, name, labels, key))
        except TAR_ERRORS as error:  # `samples` reports the damage
            raise_unanswered(error)
    words = sorted(label for label in found if isinstance(label, str))
    numbers = [label for label in found if isinstance(label, int) and label >= 0]
    return words or numbered_classes(max(numbers, default=-1), f"{folder.url}: the labels of the samples")


source = WebDataset()
