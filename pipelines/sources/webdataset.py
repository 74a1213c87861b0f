"""WebDataset tars: `SRC/train-000000.tar`, ...; members that share a name up to the first dot are one sample.

If several complete samples share such a name, as `22.05.jpg`, `22.05.cls`, `22.06.jpg`, `22.06.cls` do, the last dot
counts.

Kinds of member: .jpg .jpeg .png .webp (image), .flac .wav .ogg .mp3 (audio), .mp4 .mkv .webm .avi (video), .txt
(text), .cls (class as a number or name), .json (its `label`, or the key that the option `label` names). A tar is read
sequentially and never unpacked. Members with `..` or an absolute path, links, devices and pickles are never opened:
each is listed with key and reason in the quarantine; the other members of its sample are used.
"""

import contextlib
import io
import json
import random
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, raise_unanswered
from pipelines.features import AudioFeature, Feature, LabelFeature, TextFeature, VideoFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import (
    MAX_FILE,
    TAR_ERRORS,
    base_name,
    decode_utf8,
    item_seed,
    numbered_classes,
    shuffled_units,
    source_folder,
    tar_members,
)
from pipelines.sources._files import Found, hidden, look
from pipelines.sources._labels import label_number
from pipelines.sources._layout import class_notes, held_out_share, split_notes, splits_of_files
from pipelines.sources._probe import PROBE, image_feature

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
OPTIONS = ("classes", "label", "channels", "held_out", "splits")
PROBE_MEMBERS = 256
MOST_PARTS = 100
"""Incomplete samples of one group that are kept in memory."""
NUMBER = re.compile(r"-?[0-9]{1,18}")
DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class Member(NamedTuple):
    """A safe member: its name up to the first dot, its name up to the last one, the suffix after it, the content."""

    group: str
    name: str
    suffix: str
    content: bytes


class WebDataset:
    """The source.

    Options: `classes` (names with commas), `label` (key of the .json), `channels` of images (1 or 3; default: as
    found), `held_out` (share of the samples, 0.2 if no tar is named after a split), `splits` (`names` or `none`, see
    `_layout.splits_of_files`).
    """

    title = "WebDataset tars (SRC/train-*.tar, SRC/val-*.tar) of images, sound, video or texts, with .cls or .json"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the tars below `src`; each becomes one shard, two if a share of its samples is held out."""
        refuse_options(options, OPTIONS)
        folder, found = self._found(src)
        if not found.names:
            raise UserError(f"no .tar files below {folder.url}: wanted train-000000.tar, ...")
        splits = splits_of_files(folder, found.names, options)
        key = options.get("label", "label")
        probed = probe(folder, next(iter(splits.values()))[0], key)
        kinds = {"audio": AudioFeature(), "video": VideoFeature(), "text": TextFeature(), "label": LabelFeature()}
        features: dict[str, Feature] = {
            "image": image_feature(options, [partial(io.BytesIO, image) for image in probed.images]),
            **kinds,
        }
        named = options["classes"].split(",") if "classes" in options else None
        classes = (named or class_names(folder, found.names, probed.labels, key)) if probed.labels else []
        held_out = held_out_share(splits, folder, options, "0.2")
        tars = {split or "train": names for split, names in splits.items()}
        tars |= {"test": tars["train"]} if held_out else {}
        content = {
            "src": folder.url,
            "reading": [probed.kinds, probed.labels, key, classes],
            "held_out": held_out,
            "seed": seed,
        }
        return Listing(
            name=base_name(folder.url),
            features={kind: features[kind] for kind in features if kind in probed.kinds},
            classes=tuple(classes),
            licence="not stated: see the source",
            origin=folder.url,
            units=shuffled_units(tars, random.Random(seed), 1, **content),
            notes=(
                f"kinds: {', '.join(probed.kinds)}",
                *(class_notes(classes) if probed.labels else ()),
                *split_notes(splits, held_out),
                *found.notes(),
            ),
            rejected=tuple(found.rejected),
            versions=found.versions,
        )

    def versions(self, src: str | None) -> Mapping[str, str]:
        """Return those of a listing without reading the labels."""
        return self._found(src)[1].versions

    @staticmethod
    def _found(src: str | None) -> tuple[Folder, Found]:
        folder = source_folder("webdataset", src, "*.tar")
        return folder, look(folder, (".tar", ".tar.gz", ".tgz"))

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's tar."""
        content = unit.content
        folder, share = open_folder(content["src"]), content["held_out"]
        kinds, labels, label_key, classes = content["reading"]
        layout = SampleLayout(kinds, labels, label_key, len(classes), {name: i for i, name in enumerate(classes)})
        for name in content["items"]:
            keys: set[str] = set()
            for found in samples_of(members(folder, name), layout):
                rejected = isinstance(found, Rejected)
                own = found.key if rejected else found["key"]
                key = f"{name}/{own}" if own else name
                if share and (item_seed(content["seed"], key) < share * 2**64) != (unit.split == "test"):
                    continue  # in the other split, which reads the same tar
                if rejected:
                    yield Rejected(key, found.reason)
                elif key in keys:
                    yield Rejected(key, "a second sample of this name in the tar")
                else:
                    keys.add(key)
                    yield {**found, "key": key}


def members(folder: Folder, name: str) -> Iterator[Member | Rejected]:
    """Yield the members of a tar in order; unsafe ones and the place of damage as `Rejected`."""
    try:
        with folder.fs.open(folder.file(name), "rb") as stream:
            for archive, member in tar_members(stream, forward=True):
                if member.isdir() or hidden(member.name):
                    continue
                reason = unsafe(member)
                if reason:
                    yield Rejected(member.name, reason)
                    continue
                inside = archive.extractfile(member)
                assert inside is not None, "a regular file"
                above, _, file = member.name.rpartition("/")
                above += "/" if above else ""
                name_, _, suffix = file.rpartition(".") if "." in file else (file, "", "")
                yield Member(above + file.split(".")[0], above + name_, suffix.lower(), inside.read())
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
    group = Group("", layout)
    for member in found:
        if isinstance(member, Rejected):
            yield member
            continue
        if member.group != group.name:
            yield from group.finished()
            group = Group(member.group, layout)
        kind = layout.kind(member)
        if kind is not None:
            yield from group.add(member, kind)
    yield from group.finished()


@dataclass(frozen=True)
class SampleLayout:
    """The members of a sample.

    Attributes:
        kinds: of the members; all are required.
        labels: suffix of the member with the label, cls or json.
        key: of the label in a .json.
        classes: number of classes.
        index: their numbers by name.
    """

    kinds: Sequence[str]
    labels: str
    key: str
    classes: int
    index: Mapping[str, int]

    def kind(self, member: Member) -> str | None:
        """Return the kind of a wanted member, else None."""
        if member.suffix in LABELS:
            return "label" if "label" in self.kinds and member.suffix == self.labels else None
        kind = KIND_OF.get(member.suffix)
        return kind if kind in self.kinds else None

    def value(self, member: Member, kind: str) -> Any:
        """Return what is stored of a member, or raise `ValueError` with the reason for the quarantine."""
        if kind == "text":
            return decode_utf8(member.content).strip()
        if kind == "label":
            return label_number(raw_label(member, self.key), self.index, self.classes)
        return member.content

    def sample(self, name: str, parts: Mapping[str, Any]) -> Sample | Rejected:
        """Return a sample of its parts by kind; `Rejected` if one is missing or an error."""
        errors = [str(value) for value in parts.values() if isinstance(value, ValueError)]
        missing = [kind for kind in self.kinds if kind not in parts]
        if errors or missing:
            return Rejected(name, errors[0] if errors else f"a sample without {' and '.join(missing)}")
        return {"key": name, **parts}


class Group:
    """Consecutive members that share their name up to the first dot: usually one sample.

    Args:
        name: that part of the name.
        layout: the members of a sample.
    """

    def __init__(self, name: str, layout: SampleLayout) -> None:
        self.name, self.layout = name, layout
        self._incomplete: dict[str, dict[str, Any]] = {}
        self._complete: set[str] = set()
        self._last: tuple[str, dict[str, Any]] | None = None

    def add(self, member: Member, kind: str) -> Iterator[Sample | Rejected]:
        """Add a member; yield the samples that are complete, except for the last one."""
        if member.name in self._complete or kind in self._incomplete.get(member.name, {}):
            yield Rejected(f"{member.name}.{member.suffix}", f"a second {kind} of its sample")
            return
        parts = self._incomplete.setdefault(member.name, {})
        try:
            parts[kind] = self.layout.value(member, kind)
        except ValueError as error:
            parts[kind] = error
        if len(parts) == len(self.layout.kinds):
            del self._incomplete[member.name]
            self._complete.add(member.name)
            if self._last:
                yield self.layout.sample(*self._last)
            self._last = member.name, parts
        elif len(self._incomplete) > MOST_PARTS:
            first = next(iter(self._incomplete))
            yield self.layout.sample(first, self._incomplete.pop(first))

    def finished(self) -> Iterator[Sample | Rejected]:
        """Yield the remaining samples.

        If no sample is complete by the last dot, all members are one sample, whose suffixes have several parts. Next to
        the sample `x`, members such as `x.mask.png` belong to it and are not used.
        """
        if self.name and not self._last and not self._incomplete:
            # Its members are of other kinds.
            yield self.layout.sample(self.name, {})
        if self._last:
            single = len(self._complete) == 1 and not self._incomplete
            yield self.layout.sample(self.name if single else self._last[0], self._last[1])
            if self._complete == {self.name}:
                return
        kinds = [kind for parts in self._incomplete.values() for kind in parts]
        if kinds and not self._last and len(set(kinds)) == len(kinds):
            yield self.layout.sample(
                self.name, {kind: value for parts in self._incomplete.values() for kind, value in parts.items()}
            )
            return
        for name, parts in self._incomplete.items():
            yield self.layout.sample(name, parts)


def raw_label(member: Member, key: str) -> str | int:
    """Return the label as written in a .cls or .json, or raise `ValueError`."""
    text = decode_utf8(member.content).strip()
    if member.suffix == "json":
        try:
            value = json.loads(text)[key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no JSON object with '{key}'") from error
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise ValueError(f"'{key}' is neither a number nor a string")
        return value
    return int(text) if NUMBER.fullmatch(text) else text


class Probed(NamedTuple):
    """The kinds of the first samples of a tar, the suffix of their label (empty without), and some images."""

    kinds: list[str]
    labels: str
    images: list[bytes]


def probe(folder: Folder, name: str, key: str) -> Probed:
    """Look at the first members of a tar.

    Raises:
        UserError: none is of a known kind.
    """
    kinds: set[str] = set()
    labels, images = "", []
    for member in islice(members(folder, name), PROBE_MEMBERS):
        if isinstance(member, Rejected):
            continue
        if member.suffix not in LABELS:
            kind = KIND_OF.get(member.suffix)
            kinds |= {kind} if kind else set()
            images += [member.content] if kind == "image" and len(images) < PROBE else []
        elif labels != "cls":
            with contextlib.suppress(ValueError):
                raw_label(member, key)
                labels = member.suffix
    if not kinds:
        raise UserError(
            f"{folder.url}/{name} has no images, sound, video or texts at its beginning: wanted members such as"
            " 000000.jpg and 000000.cls"
        )
    return Probed([*sorted(kinds), *(["label"] if labels else [])], labels, images)


def _labels(folder: Folder, name: str, suffix: str, key: str) -> Iterator[str | int]:
    """Yield the labels of a tar; those that cannot be read are left out."""
    with folder.fs.open(folder.file(name), "rb") as stream:
        for archive, info in tar_members(stream):
            wanted = info.name.lower().endswith(f".{suffix}") and not hidden(info.name) and not unsafe(info)
            inside = archive.extractfile(info) if wanted else None
            if inside:
                with contextlib.suppress(ValueError):
                    yield raw_label(Member("", "", suffix, inside.read()), key)


def class_names(folder: Folder, names: Iterable[str], labels: str, key: str) -> list[str]:
    """Return the names of the classes by the labels of all tars: numbers up to the largest, or the strings in order."""
    found: set[str | int] = set()
    for name in names:
        try:
            found.update(_labels(folder, name, labels, key))
        except TAR_ERRORS as error:  # `samples` reports the damage
            raise_unanswered(error)
    words = sorted(label for label in found if isinstance(label, str))
    if words and len(words) < len(found):
        number = next(label for label in found if isinstance(label, int))
        raise UserError(
            f"{folder.url}: the labels of the samples are texts ({words[0]}) and numbers ({number}): convert them to"
            " one kind, or give --option classes=NAME,..."
        )
    numbers = [label for label in found if isinstance(label, int) and label >= 0]
    return words or numbered_classes(max(numbers, default=-1), f"{folder.url}: the labels of the samples")


source = WebDataset()
