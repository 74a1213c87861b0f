"""Scenes of digits with tasks in words. The package of digits comes from the cache after the first time."""

import functools
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perceiver.config import UserError
from pipelines.feed.ingest import DataConfig, TrainShare, train_batches
from pipelines.prepare import PrepareConfig, prepare
from pipelines.sources import digits, scenes
from pipelines.sources._scenes import COLOURS, NAMES, PLURALS, Digit, count, describe, left_of, presence

SMALL = {"scenes": "40", "test_scenes": "16"}


@functools.cache
def samples(seen: str = "some", seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the samples of both splits."""
    listing = scenes.source.listing(None, seed=seed, shard_rows=400, options={**SMALL, "seen": seen})
    return {unit.split: [dict(one) for one in scenes.source.samples(unit)] for unit in listing.units}


def of_skill(split: list[dict[str, Any]], skill: str) -> list[dict[str, Any]]:
    return [sample for sample in split if sample["label"] == scenes.SKILLS.index(skill)]


@functools.cache
def archive() -> tuple[np.ndarray, np.ndarray]:
    return digits.read_archive(str(digits.fetch(digits.PACKAGE)))


def labels_of(sample: dict[str, Any]) -> list[int]:
    """Return the classes of a scene's digits, by the rows that the key names."""
    return [int(archive()[1][int(row)]) for row in sample["key"].rsplit("/", 1)[1].split("+")]


def test_samples_are_the_same_each_time_and_of_each_skill_alike() -> None:
    first = samples()
    again = scenes.source.listing(None, seed=0, shard_rows=7, options=SMALL)
    unit = next(iter(again.units))
    assert [dict(one) for one in scenes.source.samples(unit)] == first["train"][:7]
    assert Counter(one["label"] for one in first["train"]) == dict.fromkeys(range(4), 40)
    assert len({one["key"] for split in first.values() for one in split}) == 4 * 56
    kept, held = (set(part) for part in digits.stratified_split(archive()[1], 0).values())
    for split, rows in (("train", kept), ("test", held)):
        used = {int(row) for one in first[split] for row in one["key"].rsplit("/", 1)[1].split("+")}
        assert used <= rows


def test_some_skills_have_the_same_samples_as_among_all() -> None:
    listing = scenes.source.listing(None, seed=0, shard_rows=400, options={**SMALL, "skills": "ask,locate"})
    for unit in listing.units:
        found = {one["key"] for one in scenes.source.samples(unit)}
        whole = samples()[unit.split]
        assert found == {one["key"] for skill in ("locate", "ask") for one in of_skill(whole, skill)}
    with pytest.raises(UserError, match=r"option skills=ask,find: got 'find'; wanted some of classify,"):
        scenes.source.listing(None, seed=0, shard_rows=400, options={"skills": "ask,find"})


def test_answers_and_boxes_are_right() -> None:
    """By the classes of the digits in the key, and by the colours of the pixels in the boxes."""
    found = [one for split in samples().values() for one in split]
    for one in of_skill(found, "classify"):
        assert one["answer"] in [NAMES[label] for label in labels_of(one)] and one["boxes"] is None
    for one in of_skill(found, "describe"):
        assert Counter(part.split()[2] for part in one["answer"].split(", ")) == Counter(
            NAMES[label] for label in labels_of(one)
        )
        assert len(one["answer"].encode()) <= 30
    kinds = Counter[str]()
    for one in of_skill(found, "locate"):
        words, pixels = one["text"].split(), np.asarray(Image.open(io.BytesIO(one["image"]))).astype(float)
        kinds[words[1]] += 1
        colours = {words[2]} if words[1] == "every" else set(COLOURS)
        if words[-1] in PLURALS:
            assert len(one["boxes"]) == labels_of(one).count(PLURALS.index(words[-1]))
        elif words[2] == "largest":
            assert len(one["boxes"]) == 1
        for x, y, width, height in one["boxes"]:
            assert min(x, y) >= 0 and max(x + width, y + height) <= 64 and 12 <= max(width, height) <= 28
            inside = pixels[int(y) : int(y + height), int(x) : int(x + width)]
            near = min(np.abs(inside - np.array(COLOURS[name])).sum(-1).min() for name in colours)
            assert near < 60
    assert len(kinds) == 2 and {len(one["boxes"]) for one in of_skill(found, "locate")} >= {0, 1}


def named(sample: dict[str, Any], digit: int) -> bool:
    words = sample["text"].replace("?", "").split() + sample["answer"].replace(",", "").split()
    return NAMES[digit] in words or PLURALS[digit] in words


def test_pairs_are_hidden_from_training_and_a_quarter_of_the_test() -> None:
    hidden, everything = samples(), samples("all")
    for skill, digit in scenes.HIDDEN.items():
        assert not any(named(one, digit) or one["held_out"] for one in of_skill(hidden["train"], skill))
        test = of_skill(hidden["test"], skill)
        assert [named(one, digit) for one in test] == [one["held_out"] for one in test]
        assert sum(one["held_out"] for one in test) == 4
    # The digits occur in the other skills.
    assert any(named(one, 4) for one in of_skill(hidden["train"], "classify") + of_skill(hidden["train"], "locate"))
    assert any(named(one, 9) for one in of_skill(hidden["train"], "ask") + of_skill(hidden["train"], "describe"))
    assert everything["test"] == hidden["test"]
    for one in everything["train"]:
        assert one["held_out"] == (one["label"] > 0 and named(one, scenes.HIDDEN[scenes.SKILLS[one["label"]]]))
    assert any(one["held_out"] for one in everything["train"])


def digit(label: int, colour: str, left: int, side: int = 20) -> Digit:
    return Digit(label, colour, left, 0, 10, side, 0)


def test_questions_by_hand() -> None:
    row = [digit(7, "red", 30), digit(3, "blue", 2), digit(7, "red", 50, 28)]
    assert describe(row[:2], 2) == ("describe the picture", "a blue three, a red seven", None, {3, 7}, {3, 7}, None)
    assert describe(row, 2) is None and describe([row[0], digit(1, "pink", 33)], 2) is None
    asked = {
        (question.text, question.answer)
        for seed in range(200)
        for kind in (count, presence, left_of)
        if (question := kind(row, np.random.default_rng(seed)))
    }
    for text, answer in {
        "how many sevens are there?": "two",
        "how many red digits are there?": "two",
        "how many pink digits are there?": "zero",
        "is there a three?": "yes",
        "is there an eight?": "no",
        "is there a blue digit?": "yes",
    }.items():
        assert (text, answer) in asked
    # Only one class occurs once, so nothing can be compared. Four of a kind are not counted.
    assert not any("left of" in text for text, _ in asked)
    four = [count([digit(7, "red", 0)] * 4, np.random.default_rng(seed)) for seed in range(50)]
    assert {question.answer for question in four if question} == {"zero"} and None in four
    both = [row[0], row[1]]
    answers = {q.text: q.answer for seed in range(20) if (q := left_of(both, np.random.default_rng(seed)))}
    assert answers == {"is the three left of the seven?": "yes", "is the seven left of the three?": "no"}


def test_prepared_scenes_become_batches(tmp_path: Path) -> None:
    options = {"scenes": "6", "test_scenes": "2"}
    manifest = prepare("scenes", None, str(tmp_path), PrepareConfig(parallel="off", options=options))
    assert manifest.classes == scenes.SKILLS and manifest.rejected == 0
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 24, "test": 8}
    data = DataConfig(url=str(tmp_path), executor="inline", text_length=64)
    batch = next(train_batches(data, manifest, TrainShare(0, 24, 24, 0, 1), "cpu"))
    locate = batch["label"] == 1
    assert batch["valid"].all() and (batch["boxes_count"][locate] >= 0).all()
    assert (batch["boxes_count"][~locate] == -1).all() and batch["answer_mask"].any(1).equal(~locate)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"described": "5"}, "described=5"),
        ({"seen": "none"}, "seen=none"),
        ({"scenes": "0"}, "scenes=0"),
        ({"x": "1"}, "x"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        scenes.source.listing(None, seed=0, shard_rows=8, options=options)


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=digits.PACKAGE.file):
        scenes.source.listing(str(tmp_path), seed=0, shard_rows=8, options={})
