"""Kinetics (400, 600, 700, 700-2020): lists of clips with a class each, and video files of ten seconds.

Layout, anywhere below SRC: lists with the columns `label`, `youtube_id`, `time_start` and `time_end` whose names
contain their split (`train.csv`, `kinetics700_2020/validate.csv`, `test.csv`); files named as the usual downloaders do,
`ID_000010_000020.mp4`, in any folders. Files contain the clip alone and are stored unchanged. Clips without a file
(deleted videos) are rejected: raise `--max-bad-fraction` to the share that may be missing. Without lists, in folders of
classes: source `video_folder`.
"""

import csv
import random
import re
from collections.abc import Iterator, Mapping

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder
from pipelines.features import LabelFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import choice, read_list, shuffled_units, source_folder
from pipelines.sources._files import Found, look, whole_file
from pipelines.sources.video_folder import KINDS

VIDEO = (".mp4", ".mkv", ".webm", ".avi", ".mov")
SPLITS = {"train": "train", "validate": "val", "val": "val", "validation": "val", "test": "test"}
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
FILE_NAME = re.compile(r"(.{11})_(\d{1,6})_(\d{1,6})\.\w+$")

Clip = tuple[str, int, int]
"""Video, start and end in seconds."""


class Kinetics:
    """The source. Option: `media` (both, video or audio)."""

    title = "Kinetics: lists (train.csv, validate.csv, test.csv) and clips named ID_000010_000020.mp4"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the clips of the lists that are found."""
        refuse_options(options, ("media",))
        folder = source_folder("kinetics", src, "train.csv, validate.csv and clips")
        name, feature = KINDS[choice(options, "media", KINDS, "both")]
        found = look(folder, (".csv", *VIDEO))
        lists = find_lists(folder, found)
        rows = {split: list(read_clips(folder, path)) for split, path in lists.items()}
        classes = sorted({label for part in rows.values() for label, _ in part})
        files = clip_files(found)
        if not files:
            raise UserError(f"no clips below {folder.url}: wanted files such as ID_000010_000020.mp4")
        number = {label: index for index, label in enumerate(classes)}
        splits = {
            split: [(_key(clip), files.get(clip, ""), number[label]) for label, clip in part]
            for split, part in rows.items()
        }
        for path in sorted(set(files.values()) - {path for items in splits.values() for _, path, _ in items}):
            found.ignore("clips of no list", path)
        return Listing(
            "kinetics",
            {name: feature, "label": LabelFeature()},
            tuple(classes),
            "lists CC BY 4.0 (Google), the clips under their own terms on YouTube",
            str(src),
            shuffled_units(splits, random.Random(seed), shard_rows, src=src, feature=name),
            notes=(f"lists: {', '.join(lists.values())}", *found.notes()),
            rejected=tuple(found.rejected),
            versions=found.versions,
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's files unchanged."""
        folder = open_folder(unit.content["src"])
        for key, path, label in unit.content["items"]:
            yield whole_file(folder, key, path, unit.content["feature"], label)


def find_lists(folder: Folder, found: Found) -> dict[str, str]:
    """Return the list of each split."""
    lists: dict[str, str] = {}
    for path in found.names:
        words = re.split(r"[^a-z]+", path.rsplit("/", 1)[-1].lower()) if path.lower().endswith(".csv") else []
        named = {SPLITS[word] for word in words if word in SPLITS}
        if len(named) != 1:
            if words:
                found.ignore("tables not named after one split", path)
            continue
        (split,) = named
        if split in lists:
            raise UserError(f"{folder.url}: {lists[split]} and {path} are both lists of {split}: remove one")
        lists[split] = path
    if "train" not in lists:
        raise UserError(f"no list of the training clips below {folder.url}: wanted train.csv, validate.csv, test.csv")
    return lists


def read_clips(folder: Folder, path: str) -> Iterator[tuple[str, Clip]]:
    """Yield class and place of each clip of a list."""
    lines = csv.DictReader(read_list(folder, path).splitlines())
    if missing := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
        raise UserError(
            f"{folder.file(path)} has no column {', '.join(missing)}; it has {', '.join(lines.fieldnames or ())}:"
            f" wanted {', '.join(COLUMNS)}"
        )
    for row in lines:
        try:
            label = row["label"].strip()
            clip = row["youtube_id"], int(float(row["time_start"])), int(float(row["time_end"]))
            if not label:
                raise ValueError("no label")
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{folder.file(path)}: line {lines.line_num}: wanted {', '.join(COLUMNS)} with whole seconds, got"
                f" {[row[name] for name in COLUMNS]}"
            ) from error
        yield label, clip


def clip_files(found: Found) -> dict[Clip, str]:
    """Return the path of each clip's file, the first one of several; others are counted as left out."""
    files: dict[Clip, str] = {}
    for path in found.names:
        if not path.lower().endswith(VIDEO):
            continue
        match = FILE_NAME.match(path.rsplit("/", 1)[-1])
        if match is None:
            found.ignore("files not named after a clip", path)
        elif files.setdefault((match[1], int(match[2]), int(match[3])), path) != path:
            found.ignore("second files of a clip", path)
    return files


def _key(clip: Clip) -> str:
    return f"{clip[0]}_{clip[1]:06d}_{clip[2]:06d}"


source = Kinetics()
