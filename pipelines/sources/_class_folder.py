"""Folders of files with a folder per class, or with a table of labels: what image_folder, audio_folder, video_folder
and points_folder have in common.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder
from pipelines.features import Feature, LabelFeature, LabelsFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, item_seed, shuffled_units, source_folder
from pipelines.sources._files import Found, look, unreadable
from pipelines.sources._layout import class_files, hold_out_classes
from pipelines.sources._metadata import METADATA, labelled_files
from pipelines.transforms import BadSample

OPTIONS = ("held_out", "splits", "label", "labels", "separator")

Probe = Callable[[Folder, Sequence[str], Mapping[str, str]], tuple[str, Feature]]
"""Returns name and feature of the files, by looking at some, and the options."""
Read = Callable[[str, bytes, Mapping[str, str], int], Any]
"""Returns what is stored of a file, by its name, bytes, the options and a seed, or raises `BadSample`."""


@dataclass(frozen=True)
class ClassFolder:
    """A source of files in folders of classes; the layouts of `_layout.class_files` and `_metadata.labelled_files`.

    Without a split by name, a seeded, stratified share is held out as split `test`.

    Attributes:
        name: of the source.
        title: its line in the list of sources.
        suffixes: lower-case endings of its files.
        probe: see `Probe`.
        options: further options of the source.
        read: see `Read`; None stores files unchanged.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    probe: Probe
    options: tuple[str, ...] = ()
    read: Read | None = None

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the files below `src`."""
        refuse_options(options, (*OPTIONS, *self.options))
        folder = source_folder(self.name, src, f"one folder of files per class ({', '.join(self.suffixes)})")
        found = look(folder, (*self.suffixes, *METADATA))
        tables = take_tables(found)
        if not found.names:
            others = ", ".join(self.suffixes[1:])
            raise UserError(
                f"no files for {self.name} below {folder.url}: wanted CLASS/*{self.suffixes[0]} (or {others}) in it"
            )
        rng = random.Random(seed)
        files = labelled_files(folder, found, tables, options) if tables else class_files(folder, found, options)
        files = hold_out_classes(files, folder, options, "0.2", rng)
        first = [name for name, _ in next(iter(files.splits.values()))]
        several = any(not isinstance(label, int) for members in files.splits.values() for _, label in members)
        name, feature = self.probe(folder, first, options)
        content = {"src": src, "feature": name, "seed": seed, "options": dict(options)}
        return Listing(
            name=base_name(str(src)),
            features={name: feature, "label": LabelsFeature() if several else LabelFeature()},
            classes=tuple(files.classes),
            licence="not stated: the user's own data",
            origin=str(src),
            units=shuffled_units(files.splits, rng, shard_rows, **content),
            notes=(*files.notes, *found.notes()),
            rejected=tuple(found.rejected),
            versions=found.versions,
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's files."""
        content = unit.content
        folder = open_folder(content["src"])
        for name, label in unit.content["items"]:
            try:
                value = folder.fs.cat_file(folder.file(name))
                if self.read:
                    value = self.read(name, value, content["options"], item_seed(content["seed"], name))
                yield {"key": name, content["feature"]: value, "label": label}
            except BadSample as error:
                yield Rejected(name, str(error))
            except OSError as error:
                yield unreadable(name, error)


def take_tables(found: Found) -> list[str]:
    """Remove the tables of labels from the files and return them."""
    tables = [name for name in found.names if name.rsplit("/", 1)[-1].lower() in METADATA]
    found.names = [name for name in found.names if name not in set(tables)]
    return tables
