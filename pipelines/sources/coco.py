"""COCO and VQA v2 as tasks in words: describe, ask, locate and classify, as GPV-1 trains on them (§4 there).

Layout, anywhere below SRC: `instances_SPLIT.json`, `captions_SPLIT.json` (2014 or 2017), VQA's
`v2_OpenEnded_mscoco_SPLIT_questions.json` with `v2_mscoco_SPLIT_annotations.json`, and the images by their names. Files
that are missing leave their skills out. An image is in the split of the instances or captions that list it, and
questions follow their image, since the validation images of 2014 are training images of 2017.

- describe: each caption; in `val` each image, all its captions as `answers`; one of 14 phrasings of the task;
- ask: each question; an answer that at least three of ten people gave, in training drawn among them, else the first; in
  `val` all people's answers as `answers`;
- locate: all boxes of a category in an image; 18 phrasings. Images with a region of many are left out;
- classify: each box that is not one of many: the image cropped to the box and 20 % around it, as a JPEG; 4 phrasings.
"""

import io
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder
from pipelines.features import (
    AnswerFeature,
    AnswersFeature,
    BoxesFeature,
    Feature,
    FlagFeature,
    ImageFeature,
    LabelFeature,
    TextFeature,
)
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._coco import (
    IMAGES,
    NUMBERED,
    SKILLS,
    Annotations,
    Task,
    load,
    mentioned,
    read_captions,
    read_instances,
    read_pairs,
    read_questions,
    together,
    worded,
)
from pipelines.sources._common import base_name, item_seed, number, shuffled_units, source_folder
from pipelines.sources._files import look, read_file, unreadable
from pipelines.transforms import BadSample
from pipelines.transforms.decode import decode_image, to_image

LIST = re.compile(r"(?:instances|captions)_(train|val)(?:2014|2017)\.json$")
QUESTIONS = re.compile(r"v2_OpenEnded_mscoco_(train|val)2014_questions\.json$")
ANSWERS = "v2_mscoco_{}2014_annotations.json"
OPTIONS = ("answer_bytes", "boxes", "held_out")
MARGIN = 0.2
"""Share of a box's size that a crop shows on each side of it."""
QUALITY = 95
PEOPLE = 10
"""Answers to a question of VQA."""
LICENCE = "annotations CC BY 4.0 (COCO, VQA v2); the images under their own terms on Flickr"


class Coco:
    """The source.

    Options: `held_out` (a CSV file below SRC with lines `skill,category`: such samples are left out of `train` and
    marked in `val`), `answer_bytes` (128) and `boxes` (100): samples with more are unreadable raw items.
    """

    title = "COCO and VQA v2 (instances_*.json, captions_*.json, v2_*_questions.json, images): four tasks in words"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the tasks of the annotation files that are found."""
        refuse_options(options, OPTIONS)
        folder = source_folder("coco", src, "annotations/instances_train2017.json, captions, questions and images")
        found = look(folder, (*IMAGES, ".json"))
        annotations = read_all(folder, found.names)
        pairs = read_pairs(folder, options["held_out"], annotations.categories) if "held_out" in options else set()
        limits = number(options, "answer_bytes", 128), number(options, "boxes", 100)
        paths = {name.rsplit("/", 1)[-1]: name for name in reversed(found.names) if name.lower().endswith(IMAGES)}
        if not paths:
            raise UserError(f"no images below {folder.url}: wanted files such as train2017/000000000009.jpg")
        chooser = _Chooser(annotations, paths, pairs, limits, seed)
        items = {split: list(chooser.items(split)) for split in ("train", "val")}
        items = {split: rows for split, rows in items.items() if rows}
        if "train" not in items:
            reasons = "; ".join(dict.fromkeys(one.reason for one in chooser.rejected[:3]))
            raise UserError(f"{folder.url}: no training sample can be used ({reasons or 'no train file'})")
        notes = [f"left out of train, as held out: {chooser.hidden:,}"] * bool(pairs)
        notes += [f"left out: regions of many objects: {annotations.crowds:,}"] * bool(annotations.crowds)
        long = f"left out of answers: texts of more than answer_bytes={limits[0]} bytes: {chooser.long:,}"
        notes += [long] * bool(chooser.long)
        every = [row for rows in items.values() for row in rows]
        return Listing(
            base_name(str(src)),
            features(every),
            SKILLS,
            LICENCE,
            str(src),
            shuffled_units(items, random.Random(seed), shard_rows, src=src),
            notes=(*notes, *found.notes()),
            rejected=(*found.rejected, *annotations.rejected, *chooser.rejected),
            versions=found.versions,
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's images; those to classify are cropped."""
        folder = open_folder(unit.content["src"])
        for item in unit.content["items"]:
            row = {name: value for name, value in item.items() if name not in ("path", "crop")}
            try:
                encoded = read_file(folder, item["path"])
                yield {**row, "image": cropped(encoded, item["crop"]) if item["crop"] else encoded}
            except (BadSample, ValueError) as error:
                yield Rejected(item["key"], str(error))
            except OSError as error:
                yield unreadable(item["key"], error)


def features(rows: Sequence[Mapping[str, Any]]) -> dict[str, Feature]:
    """Return the features of such samples."""
    longest = max(len(text.encode()) for row in rows for text in (row["answer"], *row["answers"]))
    most = max(len(row["answers"]) for row in rows)
    return {
        "image": ImageFeature(channels=3),
        "text": TextFeature(),
        "answer": AnswerFeature(longest=longest),
        "answers": AnswersFeature(most=max(PEOPLE, most)),
        "boxes": BoxesFeature(most=max(len(row["boxes"] or ()) for row in rows), located=(SKILLS.index("locate"),)),
        "label": LabelFeature(),
        "held_out": FlagFeature(),
    }


def read_all(folder: Folder, names: Sequence[str]) -> Annotations:
    """Return the content of all annotation files; instances and captions first, which list the images."""
    found, by_base = Annotations(), {name.rsplit("/", 1)[-1]: name for name in names}
    lists = {base: match[1] for base in sorted(by_base, reverse=True) if (match := LIST.match(base))}
    for base, split in lists.items():
        read = read_instances if base.startswith("instances") else read_captions
        read(found, load(folder, by_base[base]), split, base)
    questions = {base: match[1] for base in sorted(by_base) if (match := QUESTIONS.match(base))}
    for base, split in questions.items():
        answers = ANSWERS.format(split)
        if answers not in by_base:
            raise UserError(f"{folder.file(by_base[base])}: no file {answers}: VQA's questions need their answers")
        read_questions(found, load(folder, by_base[base]), load(folder, by_base[answers]), split, base)
    if not lists and not questions:
        raise UserError(
            f"no annotation files below {folder.url}: wanted instances_train2017.json, captions_train2017.json or"
            " v2_OpenEnded_mscoco_train2014_questions.json"
        )
    return found


class _Chooser:
    """Turns tasks into items of units: finds their images, words and splits.

    Attributes:
        rejected: tasks that cannot be used.
        hidden: training samples that are left out as held out.
        long: right texts of evaluations that are left out as too long.
    """

    def __init__(
        self,
        annotations: Annotations,
        paths: Mapping[str, str],
        pairs: set[tuple[str, int]],
        limits: tuple[int, int],
        seed: int,
    ) -> None:
        self.annotations, self.paths, self.pairs, self.limits, self.seed = annotations, paths, pairs, limits, seed
        self.numbered = {int(match[1]): path for base, path in paths.items() if (match := NUMBERED.search(base))}
        self.rejected: list[Rejected] = []
        self.hidden = self.long = 0

    def items(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the items of a split."""
        tasks = (
            task
            for listed, tasks in self.annotations.tasks.items()
            for task in tasks
            if self.annotations.splits.get(task.image, listed) == split
        )
        for task in tasks if split == "train" else together(tasks):
            item = self._item(task, split)
            if isinstance(item, Rejected):
                self.rejected.append(item)
            elif item["held_out"] and split == "train":
                self.hidden += 1
            else:
                yield item

    def _item(self, task: Task, split: str) -> dict[str, Any] | Rejected:
        key, rng = f"{split}/{task.key}", random.Random(item_seed(self.seed, task.key))
        path = self._path(task.image)
        if path is None:
            return Rejected(key, "no image of its name")
        if len(task.boxes or ()) > self.limits[1]:
            return Rejected(key, f"more than boxes={self.limits[1]} boxes")
        answer = (rng.choice(task.answers) if split == "train" else task.answers[0]) if task.answers else ""
        given = [] if split == "train" else [text for text in task.given if len(text.encode()) <= self.limits[0]]
        if task.skill == "describe" and given:
            answer = given[0]
        if len(answer.encode()) > self.limits[0]:
            return Rejected(key, f"an answer of more than answer_bytes={self.limits[0]} bytes")
        self.long += len(task.given) - len(given) if split != "train" else 0
        text = worded(task, self.annotations.categories, rng)
        said = " ".join(task.given) if task.skill == "describe" and given else answer
        return {
            "key": key,
            "path": path,
            "crop": task.crop,
            "text": text,
            "answer": answer,
            "answers": given,
            "boxes": None if task.boxes is None else [list(box) for box in task.boxes],
            "label": SKILLS.index(task.skill),
            "held_out": self._held_out(task, f"{text} {said}"),
        }

    def _path(self, image: int) -> str | None:
        name = self.annotations.files.get(image, ("", (0, 0)))[0]
        return self.paths.get(name.rsplit("/", 1)[-1]) or self.numbered.get(image)

    def _held_out(self, task: Task, words: str) -> bool:
        if not any(skill == task.skill for skill, _ in self.pairs):
            return False
        about = mentioned(words, self.annotations.categories) if task.categories is None else task.categories
        return any((task.skill, category) in self.pairs for category in about)


def cropped(encoded: bytes, box: Sequence[float]) -> bytes:
    """Return the part of an image around a box [x, y, width, height] as a JPEG.

    Raises:
        BadSample: the image cannot be decoded, or the box is outside of it.
    """
    picture = decode_image(encoded, 3)
    x, y, width, height = box
    left, top = max(0, round(x - MARGIN * width)), max(0, round(y - MARGIN * height))
    right, bottom = round(x + (1 + MARGIN) * width), round(y + (1 + MARGIN) * height)
    part = picture[top : max(bottom, top + 1), left : max(right, left + 1)]
    if not part.size:
        raise BadSample(f"a box at {x:g}, {y:g}, outside of the image of {picture.shape[1]}x{picture.shape[0]}")
    stream = io.BytesIO()
    to_image(part).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


source = Coco()
