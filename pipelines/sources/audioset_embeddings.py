"""AudioSet's released embeddings: 10 segments of 128 bytes per clip, with any number of 527 classes.

Layouts, anywhere below SRC: `bal_train/*.tfrecord`, `unbal_train/*.tfrecord`, `eval/*.tfrecord` as Google released them
(SequenceExamples with `video_id`, `labels` and `audio_embedding`), or `bal_train.h5`, `unbal_train.h5`, `eval.h5` as
Kong et al. packed them (`x` uint8 (n, 10, 128), `y` (n, 527), `video_id_list`). The names of the classes are in
`class_labels_indices.csv`; without it they are numbers.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np

from perceiver.config import UserError
from perceiver.storage import Folder, first_line, open_folder, raise_unanswered
from pipelines.features import EmbeddingsFeature, LabelsFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import choice, number, numbered_classes, source_folder
from pipelines.sources._files import Found, look, unreadable
from pipelines.sources._tfrecord import BadRecord, SequenceExample, parse_sequence_example, read_records
from pipelines.sources.audioset import LABELS, read_classes

RECORDS, PACKED = (".tfrecord",), (".h5", ".hdf5")
PARTS = {"bal_train": ("train", "balanced"), "unbal_train": ("train", "unbalanced"), "eval": ("test", "")}
"""By the name of a folder or packed file: the split, and the half of it."""
PART = re.compile(r"(?:^|/)(?:\w+_)?(?P<part>unbal_train|bal_train|eval)(?:_\w+)?(?:/|\.)")
ARRAYS = ("x", "y", "video_id_list")
CLASSES = 527


class AudioSetEmbeddings:
    """The source.

    Options: `train` (all, balanced or unbalanced), `segments` (10) and `channels` (128) of the embeddings, `feature`
    (audio_embedding, the name in TFRecords).
    """

    title = "AudioSet's released embeddings (bal_train, unbal_train, eval: TFRecords, or HDF5 as packed by Kong et al.)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the files; each TFRecord file becomes one shard, HDF5 files are divided."""
        refuse_options(options, ("train", "segments", "channels", "feature"))
        folder = source_folder("audioset_embeddings", src, "bal_train, unbal_train, eval and class_labels_indices.csv")
        part = choice(options, "train", ("all", "balanced", "unbalanced"), "all")
        feature = EmbeddingsFeature(segments=number(options, "segments", 10), channels=number(options, "channels", 128))
        found = look(folder, (*RECORDS, *PACKED, LABELS))
        files = _by_part(found, part)
        if not files:
            raise UserError(f"no embeddings below {folder.url}: wanted {', '.join(PARTS)} as TFRecords or HDF5 files")
        lists = {name: path for path in found.names if (name := path.rsplit("/", 1)[-1]) == LABELS}
        names = list(read_classes(folder, lists).values()) if lists else numbered_classes(CLASSES - 1, folder.url)
        content = {
            "src": folder.url,
            "size": [feature.segments, feature.channels],
            "classes": len(names),
            "feature": options.get("feature", "audio_embedding"),
        }
        units: list[Unit] = []
        for split, path in files:
            for rows in _row_ranges(folder, path, content, shard_rows):
                units.append(Unit(split, {**content, "file": path, "rows": rows}))
        order = np.random.default_rng(seed).permutation(len(units))
        return Listing(
            "audioset_embeddings",
            {"embeddings": feature, "label": LabelsFeature()},
            tuple(names),
            "CC BY 4.0 (Google)",
            folder.url,
            [units[place] for place in order],
            notes=(*(() if lists else (f"no {LABELS}: the classes are named by their numbers",)), *found.notes()),
            rejected=tuple(found.rejected),
            versions=found.versions,
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's file."""
        content = unit.content
        folder = open_folder(content["src"])
        try:
            with folder.fs.open(folder.file(content["file"]), "rb") as stream:
                if content["rows"] is None:
                    yield from _read_records(stream, content)
                else:
                    yield from _read_rows(stream, content)
        except OSError as error:
            raise_unanswered(error)
            yield unreadable(content["file"], error)


def _by_part(found: Found, part: str) -> list[tuple[str, str]]:
    """Return split and path of each file of embeddings; others are counted as left out."""
    files = []
    for path in found.names:
        match = PART.search(path)
        if path.rsplit("/", 1)[-1] == LABELS:
            continue
        if match is None:
            found.ignore(f"files that are not named after {', '.join(PARTS)}", path)
            continue
        split, half = PARTS[match["part"]]
        if part in ("all", half) or not half:
            files.append((split, path))
        else:
            found.ignore(f"files of the other half (train={part})", path)
    return files


def _row_ranges(folder: Folder, path: str, content: Mapping[str, Any], shard_rows: int) -> list[list[int] | None]:
    """Return the ranges of rows of an HDF5 file; None for a file of records.

    Raises:
        UserError: it is not HDF5, or its arrays have other shapes.
    """
    if path.endswith(RECORDS):
        return [None]
    segments, channels = content["size"]
    try:
        with folder.fs.open(folder.file(path), "rb") as stream, h5py.File(stream, "r") as file:
            arrays = [file.get(name) for name in ARRAYS]
            shapes = [array.shape if isinstance(array, h5py.Dataset) else None for array in arrays]
            types = [str(array.dtype) for array in arrays if isinstance(array, h5py.Dataset)]
    except OSError as error:
        raise UserError(f"{folder.file(path)} is not a readable HDF5 file: {first_line(error, 80)}") from error
    count = shapes[0][0] if shapes[0] else 0
    wanted = [(count, segments, channels), (count, content["classes"]), (count,)]
    if shapes != wanted or types[0] != "uint8":
        found = ", ".join(f"{name} {shape}" for name, shape in zip(ARRAYS, shapes, strict=True))
        raise UserError(
            f"{folder.file(path)} has {found}: wanted x (n, {segments}, {channels}) uint8, y "
            f"(n, {content['classes']}) and video_id_list (n,); --option segments=T and"
            " channels=D read embeddings of another size"
        )
    return [[start, min(start + shard_rows, count)] for start in range(0, count, shard_rows)]


def _read_rows(stream: Any, content: Mapping[str, Any]) -> Iterator[Sample | Rejected]:
    """Yield the rows of a range of an HDF5 file; segments of zeros at a clip's end are padding."""
    start, stop = content["rows"]
    with h5py.File(stream, "r") as file:
        x, y, names = (np.asarray(file[name][start:stop]) for name in ARRAYS)  # pyright: ignore[reportIndexIssue]
    for row, (values, labels, name) in enumerate(zip(x, y, names, strict=True), start):
        key = f"{_text(name)}#{content['file']}#{row}"
        there = np.flatnonzero(values.any(1))
        classes = np.flatnonzero(labels).tolist()
        if not classes or not len(there):
            yield Rejected(key, "no segments" if classes else "no known label")
        else:
            yield {"key": key, "embeddings": values[: there[-1] + 1].tobytes(), "label": classes}


def _read_records(stream: Any, content: Mapping[str, Any]) -> Iterator[Sample | Rejected]:
    for place, record in enumerate(read_records(stream)):
        key = f"{content['file']}#{place}"
        try:
            if isinstance(record, BadRecord):
                raise record
            yield _sample(key, parse_sequence_example(record), content)
        except BadRecord as error:
            yield Rejected(key, str(error))


def _sample(key: str, example: SequenceExample, content: Mapping[str, Any]) -> Sample:
    """Return the sample of a record; raise `BadRecord` if it has none."""
    segments, channels = content["size"]
    steps = [step[0] if step else b"" for step in example.lists.get(content["feature"], [])]
    if not steps:
        raise BadRecord(f"no {content['feature']}")
    if not all(isinstance(step, bytes) and len(step) == channels for step in steps):
        sizes = sorted({len(step) if isinstance(step, bytes) else 0 for step in steps})
        raise BadRecord(f"embeddings of {sizes[0] if sizes[0] != channels else sizes[-1]} bytes, wanted {channels}")
    if len(steps) > segments:
        raise BadRecord(f"{len(steps)} segments, wanted at most {segments}")
    labels = [label for label in example.context.get("labels", []) if isinstance(label, int)]
    known = sorted({label for label in labels if label < content["classes"]})
    if not known:
        raise BadRecord("no known label")
    video = [value for value in example.context.get("video_id", []) if isinstance(value, bytes)]
    name = f"{_text(video[0])}#{key}" if video else key
    return {"key": name, "embeddings": b"".join(step for step in steps if isinstance(step, bytes)), "label": known}


def _text(name: Any) -> str:
    """Return the id of a video, of ASCII characters."""
    return name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)


source = AudioSetEmbeddings()
