"""COCO's and VQA's annotation files: what they say about each image, as tasks in words."""

import csv
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from perceiver.config import UserError
from perceiver.storage import Folder, parse_json, refusing
from pipelines.features.boxes import decode_boxes, inside
from pipelines.sources import Rejected
from pipelines.sources._common import path_below, read_list
from pipelines.transforms import BadSample

SKILLS = ("classify", "locate", "ask", "describe")
AGREED = 3
"""People who gave an answer that may be taken for right (GPV-1 §4)."""
IMAGES = (".jpg", ".jpeg", ".png")
NUMBERED = re.compile(r"(\d{12})\.\w+$")
"""The end of the names of COCO's images: `000000000009.jpg`, `COCO_train2014_000000000009.jpg`."""

_NOUNS = ("image", "picture")
DESCRIBING = tuple(
    text.format(noun)
    for noun in _NOUNS
    for text in (
        "Describe the {}.",
        "Describe what is in the {}.",
        "Caption the {}.",
        "Write a caption for the {}.",
        "Write a description of the {}.",
        "What is in the {}?",
        "What does the {} show?",
    )
)
LOCATING = tuple(
    f"{verb} {what}{{}}{where}."
    for verb in ("Locate", "Find")
    for what in ("", "all ", "all instances of ")
    for where in ("", *(f" in the {noun}" for noun in _NOUNS))
)
CLASSIFYING = ("What is this?", "What object is this?", "What is this thing?", "What is the name of this?")


class Task(NamedTuple):
    """One sample: of which image, and what is asked and right.

    Attributes:
        key: of the sample.
        image: COCO's number of the image.
        skill: one of `SKILLS`.
        text: the task in words.
        answers: right ones, the best first; of several, training takes a random one. Empty: no words.
        boxes: [x, y, width, height] to find; None: nothing to find.
        crop: the box that the image is cropped to; None: all of it.
        categories: numbers of the categories that it is about; None: those whose names it contains.
        given: all answers that people gave, equal ones several times; empty: not known.
    """

    key: str
    image: int
    skill: str
    text: str
    answers: tuple[str, ...] = ()
    boxes: tuple[tuple[float, ...], ...] | None = None
    crop: tuple[float, ...] | None = None
    categories: tuple[int, ...] | None = None
    given: tuple[str, ...] = ()


@dataclass
class Annotations:
    """What the files of a data set contain.

    Attributes:
        tasks: by the split of the file that they come from.
        files: name and (height, width) of each image, by number.
        splits: of the images that instances or captions list, by number.
        categories: names by number.
        rejected: entries that cannot be used.
        crowds: regions of many objects, which are left out.
    """

    tasks: dict[str, list[Task]] = field(default_factory=dict)
    files: dict[int, tuple[str, tuple[int, int]]] = field(default_factory=dict)
    splits: dict[int, str] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    crowds: int = 0

    def add(self, split: str, task: Task) -> None:
        """Add a task of a file's split."""
        self.tasks.setdefault(split, []).append(task)

    def add_images(self, entries: Sequence[Any], split: str, where: str) -> None:
        """Take the images that a file of instances or captions lists."""
        for number, entry in enumerate(entries):
            try:
                size = _whole(entry["height"]), _whole(entry["width"])
                self.files[_whole(entry["id"])] = path_below(str(entry["file_name"])), size
                self.splits[_whole(entry["id"])] = split
            except (KeyError, TypeError, ValueError) as error:
                self.rejected.append(
                    Rejected(f"{where}#images/{number}", _reason(error, "id, file_name, height, width"))
                )


def read_instances(found: Annotations, document: Mapping[str, Any], split: str, where: str) -> None:
    """Add the tasks of `instances_*.json`: find all of a category, and name each object on a crop of it."""
    found.add_images(rows(document, "images", where), split, where)
    for entry in rows(document, "categories", where):
        try:
            found.categories[_whole(entry["id"])] = str(entry["name"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: a category {entry!r:.80}: wanted id and name") from error
    boxes: dict[tuple[int, int], list[tuple[float, ...]]] = {}
    spoilt: dict[tuple[int, int], str] = {}
    for number, entry in enumerate(rows(document, "annotations", where)):
        try:
            image, category = _whole(entry["image_id"]), _whole(entry["category_id"])
            key, box = f"{where}#{_whole(entry['id'])}", tuple(entry["bbox"])
            _known(found, image, category)
            if entry.get("iscrowd"):
                found.crowds += 1
                spoilt.setdefault((image, category), "")
                continue
        except (KeyError, TypeError, ValueError) as error:
            reason = _reason(error, "id, image_id, category_id, bbox")
            found.rejected.append(Rejected(f"{where}#annotations/{number}", reason))
            continue
        try:
            inside(decode_boxes([box], 1), found.files[image][1])
        except (BadSample, TypeError) as error:
            found.rejected.append(Rejected(key, str(error)))
            spoilt[image, category] = f"one of its boxes cannot be used: {error}"
            continue
        boxes.setdefault((image, category), []).append(box)
        name = (found.categories[category],)
        found.add(split, Task(f"classify/{entry['id']}", image, "classify", "", name, None, box, (category,)))
    for (image, category), all_boxes in boxes.items():
        key = f"locate/{image}/{category}"
        if (reason := spoilt.get((image, category))) is None:
            found.add(split, Task(key, image, "locate", "", (), tuple(all_boxes), None, (category,)))
        elif reason:
            found.rejected.append(Rejected(key, reason))


def read_captions(found: Annotations, document: Mapping[str, Any], split: str, where: str) -> None:
    """Add a task for each caption of `captions_*.json`."""
    found.add_images(rows(document, "images", where), split, where)
    for number, entry in enumerate(rows(document, "annotations", where)):
        try:
            image, caption = _whole(entry["image_id"]), str(entry["caption"]).strip()
            _known(found, image)
            if not caption:
                raise ValueError("an empty caption")
            found.add(split, Task(f"describe/{_whole(entry['id'])}", image, "describe", "", (caption,)))
        except (KeyError, TypeError, ValueError) as error:
            reason = _reason(error, "id, image_id, caption")
            found.rejected.append(Rejected(f"{where}#annotations/{number}", reason))


def read_questions(
    found: Annotations, questions: Mapping[str, Any], answers: Mapping[str, Any], split: str, where: str
) -> None:
    """Add a task for each question of VQA v2 that has answers."""
    given: dict[int, Any] = {}
    for entry in rows(answers, "annotations", where):
        if isinstance(entry, dict) and isinstance(entry.get("question_id"), int):
            given[entry["question_id"]] = entry
    for number, entry in enumerate(rows(questions, "questions", where)):
        try:
            question, image, text = _whole(entry["question_id"]), _whole(entry["image_id"]), str(entry["question"])
            if question not in given:
                raise ValueError("a question without answers")
            people = _people(given.pop(question))
            if not text.strip():
                raise ValueError("an empty question")
            found.add(split, Task(f"ask/{question}", image, "ask", text.strip(), _right(people), given=people))
        except (KeyError, TypeError, ValueError) as error:
            reason = _reason(error, "question_id, image_id, question, and its answers")
            found.rejected.append(Rejected(f"{where}#questions/{number}", reason))
    found.rejected += [Rejected(f"{where}#{question}", "answers without a question") for question in given]


def together(tasks: Iterable[Task]) -> Iterator[Task]:
    """Yield the tasks, of the captions of an image only the first, with all of them as `given`."""
    captions: dict[int, list[Task]] = {}
    for task in tasks:
        if task.skill == "describe":
            captions.setdefault(task.image, []).append(task)
        else:
            yield task
    for image, ours in captions.items():
        texts = tuple(task.answers[0] for task in ours)
        yield Task(f"describe/{image}", image, "describe", "", texts, given=texts)


def _people(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the answers of all people but empty ones."""
    found = tuple(answer for one in entry["answers"] if (answer := str(one["answer"]).strip()))
    if not found:
        raise ValueError("only empty answers")
    return found


def _right(given: Sequence[str]) -> tuple[str, ...]:
    """Return the answers that at least three people gave, the most frequent first; if none, the most frequent one."""
    counts = Counter(given)
    ranked = [answer for answer, _ in counts.most_common()]
    return tuple(answer for answer in ranked if counts[answer] >= AGREED) or (ranked[0],)


def load(folder: Folder, name: str) -> Mapping[str, Any]:
    """Return the object of a JSON file, which is parsed as a whole."""
    with refusing(folder.file(name), "check the access to it"):
        content = folder.fs.cat_file(folder.file(name))
    found = parse_json(content, folder.file(name))
    if not isinstance(found, dict):
        raise UserError(f"{folder.file(name)}: got {type(found).__name__}, wanted an object as COCO has it")
    return found


def rows(document: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """Return a list of a document, or raise `UserError`."""
    found = document.get(name)
    if not isinstance(found, list):
        raise UserError(f"{where}: got {type(found).__name__} for '{name}', wanted a list as COCO has it")
    return found


def read_pairs(folder: Folder, name: str, categories: Mapping[int, str]) -> set[tuple[str, int]]:
    """Return the pairs of a skill and a category that a CSV file with these two columns holds out.

    Raises:
        UserError: it cannot be read, or names an unknown skill or category.
    """
    try:
        path = path_below(name)
    except ValueError as error:
        raise UserError(f"option held_out={name[:80]}: {error}") from error
    numbers = {category: number for number, category in categories.items()}
    pairs: set[tuple[str, int]] = set()
    for number, line in enumerate(csv.reader(read_list(folder, path).splitlines(), skipinitialspace=True), 1):
        if not line or line == ["skill", "category"]:
            continue
        where = f"{folder.file(path)}: line {number}"
        if len(line) != 2 or line[0] not in SKILLS:
            raise UserError(
                f"{where}: got {','.join(line)[:80]}, wanted SKILL,CATEGORY with one of {', '.join(SKILLS)}"
            )
        if line[1] not in numbers:
            raise UserError(f"{where}: no category named {line[1][:80]!r} in the instances")
        pairs.add((line[0], numbers[line[1]]))
    return pairs


def mentioned(text: str, categories: Mapping[int, str]) -> Iterator[int]:
    """Yield the numbers of the categories whose name, or its plural with s or es, is in a text."""
    lower = text.lower()
    for number, name in categories.items():
        if re.search(rf"\b{re.escape(name.lower())}(s|es)?\b", lower):
            yield number


def worded(task: Task, categories: Mapping[int, str], rng: random.Random) -> str:
    """Return the words of a task; of those that have several phrasings a random one."""
    match task.skill:
        case "describe":
            return rng.choice(DESCRIBING)
        case "locate":
            return rng.choice(LOCATING).format(categories[(task.categories or (0,))[0]])
        case "classify":
            return rng.choice(CLASSIFYING)
    return task.text


def _known(found: Annotations, image: int, category: int | None = None) -> None:
    if image not in found.files:
        raise ValueError(f"an annotation of the unknown image {image}")
    if category is not None and category not in found.categories:
        raise ValueError(f"the unknown category {category}")


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"got {value!r:.40}, wanted a whole number")
    return value


def _reason(error: Exception, wanted: str) -> str:
    return str(error) if isinstance(error, ValueError) else f"wanted {wanted}"
