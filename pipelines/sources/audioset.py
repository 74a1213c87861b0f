"""AudioSet: segment lists, class names and media files; clips of ten seconds with any number of 527 classes.

Layout, anywhere below SRC: `balanced_train_segments.csv`, `unbalanced_train_segments.csv`, `eval_segments.csv`;
`class_labels_indices.csv`, or `ontology.json` for the names of the classes in the lists; media files named after the
video, as the usual downloaders do: `ID.mp4`, `YID.wav`, `ID_30000.flac`, `ID_30.000_40.000.m4a`. A file contains the
clip alone and is stored unchanged. Segments without a file (deleted videos) are rejected: raise `--max-bad-fraction` to
the share that may be missing.
"""

import csv
import json
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder
from pipelines.features import AudioFeature, Feature, LabelsFeature, MediaFeature, VideoFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import choice, read_list, shuffled_units, source_folder
from pipelines.sources._files import Found, look, whole_file

SOUND = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".m4a", ".aac")
VIDEO = (".mp4", ".mkv", ".webm", ".avi", ".mov")
LISTS = {
    "balanced_train_segments.csv": ("train", "balanced"),
    "unbalanced_train_segments.csv": ("train", "unbalanced"),
    "eval_segments.csv": ("test", ""),
}
LABELS, ONTOLOGY = "class_labels_indices.csv", "ontology.json"
KINDS: Mapping[str, tuple[str, Feature, tuple[str, ...]]] = {
    "audio": ("audio", AudioFeature(), SOUND + VIDEO),
    "video": ("video", VideoFeature(), VIDEO),
    "both": ("media", MediaFeature(), VIDEO),
}
"""By the option `media`: the feature's name, the feature, and the suffixes of its files."""
OPTIONS = ("media", "train")
FILE_NAME = re.compile(r"Y?([\w-]{11})(?:_(\d+(?:\.\d+)?))?(?:_\d+(?:\.\d+)?)?\.\w+$")


class Segment(NamedTuple):
    """A line of a list: video, start in seconds, classes."""

    video: str
    start: float
    labels: list[int]


class AudioSet:
    """The source. Options: `media` (both, audio or video), `train` (all, balanced or unbalanced)."""

    title = "AudioSet: segment lists (*_segments.csv), class_labels_indices.csv and media files named after the videos"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the segments of the lists that are found."""
        refuse_options(options, OPTIONS)
        folder = source_folder("audioset", src, "eval_segments.csv, class_labels_indices.csv and media files")
        media = choice(options, "media", KINDS, "both")
        part = choice(options, "train", ("all", "balanced", "unbalanced"), "all")
        name, feature, suffixes = KINDS[media]
        found = look(folder, (".csv", ".json", *suffixes))
        lists = {base: path for path in found.names if (base := path.rsplit("/", 1)[-1]) in (*LISTS, LABELS, ONTOLOGY)}
        wanted = [base for base, (_, half) in LISTS.items() if base in lists and part in ("all", half or part)]
        if not wanted:
            raise UserError(f"no segment lists below {folder.url}: wanted {', '.join(LISTS)}")
        classes = read_classes(folder, lists)
        files = media_files(found, suffixes)
        if not files:
            raise UserError(f"no media files below {folder.url}: wanted {', '.join(suffixes)} named after the videos")
        splits: dict[str, list[Any]] = {}
        for base in wanted:
            segments = read_segments(folder, lists[base], {mid: number for number, mid in enumerate(classes)})
            splits.setdefault(LISTS[base][0], []).extend(_item(segment, files) for segment in segments)
        used = {path for items in splits.values() for _, path, _ in items}
        for path in sorted({path for paths in files.values() for path in paths} - used):
            found.ignore("media files of no segment in these lists, or a second file of one", path)
        units = shuffled_units(splits, random.Random(seed), shard_rows, src=src, feature=name)
        licence = "labels CC BY 4.0 (Google), the clips under their own terms on YouTube"
        features = {name: feature, "label": LabelsFeature()}
        return Listing(
            "audioset",
            features,
            tuple(classes.values()),
            licence,
            str(src),
            units,
            notes=(f"lists: {', '.join(lists[base] for base in wanted)}", *found.notes()),
            rejected=tuple(found.rejected),
            versions=found.versions,
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's files unchanged."""
        folder = open_folder(unit.content["src"])
        for key, path, labels in unit.content["items"]:
            if path and not labels:
                yield Rejected(key, "no known label")
            else:
                yield whole_file(folder, key, path, unit.content["feature"], labels)


def read_classes(folder: Folder, lists: Mapping[str, str]) -> dict[str, str]:
    """Return class names by machine id (`/m/09x0r`), in the order of their indices."""
    try:
        if LABELS in lists:
            rows = list(csv.DictReader(read_list(folder, lists[LABELS]).splitlines()))
            return {row["mid"]: row["display_name"] for row in sorted(rows, key=lambda row: int(row["index"]))}
        if ONTOLOGY in lists:
            hidden = {"abstract", "blacklist"}
            return {
                entry["id"]: entry["name"]
                for entry in json.loads(read_list(folder, lists[ONTOLOGY]))
                if not hidden & set(entry.get("restrictions", ()))
            }
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot read the class names below {folder.url} ({error!r}): wanted {LABELS} with the columns"
            " index, mid, display_name"
        ) from error
    raise UserError(f"no class names below {folder.url}: wanted {LABELS}, or {ONTOLOGY}")


def read_segments(folder: Folder, path: str, classes: Mapping[str, int]) -> Iterator[Segment]:
    """Yield the segments of a list; labels of unknown classes are left out."""
    lines = csv.reader(read_list(folder, path).splitlines(), skipinitialspace=True)
    for number, line in enumerate(lines, 1):
        if not line or line[0].startswith("#"):
            continue
        try:
            video, start, _, labels = line
            yield Segment(video, float(start), [classes[mid] for mid in labels.split(",") if mid in classes])
        except ValueError as error:
            where = f"{folder.file(path)}: line {number}"
            raise UserError(f'{where}: wanted video, start, end, "labels", got {line}') from error


def media_files(found: Found, suffixes: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the paths of the media files by video; others are counted as left out."""
    files: dict[str, list[str]] = {}
    for path in found.names:
        match = FILE_NAME.match(path.rsplit("/", 1)[-1])
        if match and path.lower().endswith(suffixes):
            files.setdefault(match[1], []).append(path)
        elif path.lower().endswith(suffixes):
            found.ignore("media files that are not named after a video", path)
    return files


def _item(segment: Segment, files: Mapping[str, list[str]]) -> tuple[str, str, list[int]]:
    """Return key, path (empty: missing) and classes. A file named after the start takes precedence over one without."""
    found = files.get(segment.video, [])
    path = next((path for path in found if _start(path) in (segment.start, 1000 * segment.start)), None)
    path = path or next((path for path in found if _start(path) is None or len(found) == 1), "")
    return f"{segment.video}_{segment.start:.3f}", path, segment.labels


def _start(path: str) -> float | None:
    """Return the start in a file's name, in seconds or milliseconds."""
    match = FILE_NAME.match(path.rsplit("/", 1)[-1])
    return float(match[2]) if match and match[2] else None


source = AudioSet()
