"""Boxes, answers and marks: they move with their image, are padded and masked, and damage is a bad sample."""

import base64
import io
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from perceiver.config import UserError
from perceiver.storage import open_folder
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
from pipelines.features.base import ViewConfig
from pipelines.features.boxes import decode_boxes, placed_boxes
from pipelines.feed.ingest import DataConfig, EvalShare, TrainShare, batch_shapes, eval_batches, train_batches
from pipelines.inspect.inspection import inspect
from pipelines.inspect.page import write_page
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, load_manifest, save_manifest
from pipelines.shards.quarantine import Quarantine
from tests.pipelines.toys import png

IMAGE = ImageFeature(channels=1)
SKILLS = ("classify", "locate")
FEATURES: dict[str, Feature] = {
    "image": ImageFeature(channels=1, size=(12, 16)),
    "text": TextFeature(),
    "answer": AnswerFeature(),
    "boxes": BoxesFeature(located=(1,)),
    "label": LabelFeature(),
    "held_out": FlagFeature(),
}


def sample(key: str, **changes: Any) -> dict[str, Any]:
    plain = {"text": "what is this?", "answer": "ünf", "boxes": None, "label": 0, "held_out": False}
    picture = np.random.default_rng(len(key)).integers(0, 256, (12, 16), dtype=np.uint8)
    return {"key": key, "image": png(picture), **plain, **changes}


def write(folder: Path, rows: list[dict[str, Any]], features: dict[str, Feature] = FEATURES) -> Manifest:
    target = open_folder(str(folder))
    with ShardWriter(target, "a.arrow", arrow_schema(features), 4) as writer:
        writer.write(rows)
        shard = writer.close()
    assert shard is not None
    facts = {"name": "boxes", "classes": SKILLS, "licence": "", "source": ""}
    save_manifest(Manifest(features=features, splits={"train": Split(shards=(shard,))}, **facts), target)
    return load_manifest(str(folder))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    height=st.integers(24, 60),
    width=st.integers(24, 60),
    size=st.tuples(st.integers(24, 60), st.integers(24, 60)),
    augment=st.sampled_from(
        [
            {},
            {"flip": True},
            {"crop": {}},
            {"crop": {"draw": "side"}, "flip": True},
            {"shift": 9},
            {"flip": True, "rotate": 30, "scale": (0.7, 1.3), "shear": 10, "shift": 5},
        ]
    ),
    stretch=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_a_box_stays_around_what_it_surrounds(
    height: int, width: int, size: tuple[int, int], augment: dict[str, Any], stretch: bool, training: bool, seed: int
) -> None:
    """A bright rectangle in a dark picture: the bright part of any view is the view's box."""
    rng = np.random.default_rng(seed)
    tall, wide = int(rng.integers(10, height // 2 + 1)), int(rng.integers(10, width // 2 + 1))
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    picture = np.zeros((height, width, 1), np.uint8)
    picture[top : top + tall, left : left + wide] = 255
    view = ViewConfig.model_validate({"image_size": size, "augment": augment, "stretch": stretch})
    shown, place = IMAGE.show_placed("image", picture, view, training, partial(np.random.default_rng, seed))
    pixels = shown["image"][0] > 127
    found = placed_boxes(decode_boxes([[left, top, wide, tall]], 1), place)
    assert found.shape in ((0, 4), (1, 4)) and found.dtype == np.float32
    if not len(found):
        # The centre is outside, so that bright pixels do not reach beyond the middle of the view on both axes.
        rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
        assert (
            not rows.size
            or min(rows.min(), columns.min()) <= 1
            or max(rows.max() - size[0], columns.max() - size[1]) >= -2
        )
        return
    (cx, cy, w, h), (rows, columns) = found[0].tolist(), np.nonzero(pixels)
    assert cx - w / 2 + 1e-6 >= 0 and cx + w / 2 <= 1 + 1e-6 and cy - h / 2 + 1e-6 >= 0 and cy + h / 2 <= 1 + 1e-6
    edges = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * np.tile(size[::-1], 2)
    bright = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    # Half a pixel where the border is interpolated; a turned corner is thinner than a pixel.
    assert np.abs(edges - bright).max() <= (3.5 if "rotate" in augment and training else 1.6)


def test_views_are_the_same_with_and_without_boxes(tmp_path: Path) -> None:
    rows = [sample(str(number), boxes=[[2, 2, 8, 6]], label=1) for number in range(12)]
    view = {"executor": "inline", "text_length": 20, "augment": {"crop": {}, "flip": True}}
    bare = {name: feature for name, feature in FEATURES.items() if name != "boxes"}
    found = []
    for name, features in (("with", FEATURES), ("without", bare)):
        manifest = write(tmp_path / name, [{k: row[k] for k in ("key", *features)} for row in rows], features)
        data = DataConfig.model_validate({"url": str(tmp_path / name), **view})
        found.append(next(train_batches(data, manifest, TrainShare(0, 12, 12, 0, 1), "cpu"))["image"])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ([[0, 0, 0, 5]], "0x5 pixels"),
        ([[0, 0, 5, -1]], "5x-1"),
        ([[0, 0, 5]], "3 numbers"),
        ([[0, 0, 5, 5, 5]], "5 numbers"),
        ([None], "0 numbers"),
        ([[0, 0, 5, math.nan]], "NaN"),
        ([[0, 0, math.inf, 5]], "NaN, infinity"),
        ([[0, None, 5, 5]], "null"),
        ([[-3, 0, 5, 5]], "outside"),
        ([[0, 0, 1, 1]] * 17, "17 boxes, wanted up to data.boxes = 16"),
        ([[0, 0, 18, 5]], "outside of the image of 16x12"),
        ([[16.5, 0, 0.2, 5]], "outside of the image"),
    ],
)
def test_damaged_boxes_are_bad_samples(tmp_path: Path, stored: Any, reason: str) -> None:
    manifest = write(tmp_path, [sample("good", boxes=[[0, 0, 1, 1]]), sample("bad", boxes=stored)])
    data = DataConfig(url=str(tmp_path), executor="inline", text_length=16)
    quarantine = Quarantine(1.0)
    (batch,) = eval_batches(data, manifest, EvalShare("train", 2), "cpu", quarantine)
    assert batch["valid"].tolist() == [True, False]
    (problem,) = quarantine.problems.values()
    assert problem.key == "bad" and reason in problem.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": 1}, "no boxes, wanted a list"),
        ({"label": 2}, "label 2 is not one of 2 classes"),
        ({"answer": "x" * 32}, "answer of 32 bytes, wanted fewer than data.answer_length = 32"),
        ({"answer": "ü" * 16}, "answer of 32 bytes"),
        ({"held_out": None}, "the mark None"),
    ],
)
def test_samples_that_contradict_their_skill_are_bad(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    manifest = write(tmp_path, [sample("good"), sample("bad", **changes)])
    data = DataConfig(url=str(tmp_path), executor="inline", text_length=16)
    quarantine = Quarantine(1.0)
    (batch,) = eval_batches(data, manifest, EvalShare("train", 2), "cpu", quarantine)
    assert batch["valid"].tolist() == [True, False] and reason in next(iter(quarantine.problems.values())).reason
    # In training another sample takes its place.
    quarantine = Quarantine(1.0)
    batch = next(train_batches(data, manifest, TrainShare(0, 2, 2, 0, 1), "cpu", quarantine))
    assert batch["valid"].tolist() == [True, True] and batch["sample_id"].tolist() == [0, 0]


def test_batches_have_padded_boxes_answers_and_marks(tmp_path: Path) -> None:
    rows = [
        sample("a"),
        sample("b", label=1, boxes=[], answer=""),
        sample("c", label=1, boxes=[[0, 0, 8, 6], [8, 6, 8, 6]], answer=None, held_out=True),
        sample("d", boxes=[[-0.5, 3, 16.9, 6]], answer="x" * 7),
    ]
    data = DataConfig(url=str(tmp_path), executor="inline", text_length=16, boxes=3, answer_length=8)
    manifest = write(tmp_path, rows)
    shapes = {
        "boxes": (3, 4),
        "boxes_mask": (3,),
        "boxes_count": (),
        "answer": (8,),
        "answer_mask": (8,),
        "held_out": (),
    }
    assert {key: shape for key, shape in batch_shapes(data, manifest).items() if key in shapes} == shapes
    (batch,) = eval_batches(data, manifest, EvalShare("train", 4), "cpu")
    assert {str(batch[key].dtype) for key in ("boxes_mask", "answer_mask", "held_out")} == {"torch.bool"}
    assert batch["boxes"].dtype == torch.float32 and batch["boxes_count"].dtype == batch["answer"].dtype == torch.int64
    assert batch["boxes_count"].tolist() == [-1, 0, 2, 1] and batch["boxes_mask"].sum(1).tolist() == [0, 0, 2, 1]
    assert batch["boxes"][2].tolist() == [[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0, 0, 0, 0]]
    assert batch["boxes"][3, 0].tolist() == [0.5, 0.5, 1, 0.5]
    assert batch["held_out"].tolist() == [False, False, True, False]
    ids = [byte + 6 for byte in "ünf".encode()]
    assert batch["answer"][0].tolist() == [*ids, 5, 0, 0, 0] and batch["answer_mask"].sum(1).tolist() == [5, 0, 0, 8]
    assert batch["answer"][3].tolist() == [ord("x") + 6] * 7 + [5] and not batch["answer"][1:3].any()


def test_several_right_answers(tmp_path: Path) -> None:
    features = {**FEATURES, "answers": AnswersFeature(most=2)}
    texts: list[Any] = [["ünf", "x"], [], None, ["a"] * 3, [""], [None], ["x" * 8], ["a"]]
    manifest = write(tmp_path, [sample(str(n), answers=some) for n, some in enumerate(texts)], features)
    data = DataConfig(url=str(tmp_path), executor="inline", text_length=16, answer_length=8)
    assert batch_shapes(data, manifest)["answers"] == (2, 8)
    quarantine = Quarantine(1.0)
    (batch,) = eval_batches(data, manifest, EvalShare("train", 8), "cpu", quarantine)
    assert batch["valid"].tolist() == [True] * 3 + [False] * 4 + [True] and batch["answers"].dtype == torch.int64
    ids = [*(byte + 6 for byte in "ünf".encode()), 5, 0, 0, 0]
    assert batch["answers"][0].tolist() == [ids, [ord("x") + 6, 5, *[0] * 6]] and not batch["answers"][1:3].any()
    reasons = {problem.key: problem.reason for problem in quarantine.problems.values()}
    assert "3 answers, wanted up to 2" in reasons["3"] and "8 bytes" in reasons["6"]
    assert "empty, null" in reasons["4"] and "empty, null" in reasons["5"]


def test_what_the_manifest_knows_is_refused_before_training(tmp_path: Path) -> None:
    features = {**FEATURES, "answer": AnswerFeature(longest=32), "boxes": BoxesFeature(most=17)}
    manifest = write(tmp_path, [sample("a")], features)
    for more, key in (({}, "data.answer_length to at least 33"), ({"answer_length": 33}, "data.boxes = 16.*17 boxes")):
        with pytest.raises(UserError, match=key):
            batch_shapes(DataConfig.model_validate({"url": str(tmp_path), **more}), manifest)
    fits = DataConfig(url=str(tmp_path), answer_length=33, boxes=17)
    assert batch_shapes(fits, manifest)["answer"] == (33,)
    moving = fits.model_copy(update={"augment": ViewConfig.model_validate({"augment": {"rand_augment": {}}}).augment})
    with pytest.raises(UserError, match="rand_augment"):
        batch_shapes(moving, manifest)


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [(BoxesFeature(image="photo"), "features.boxes.image: got 'photo'"), (BoxesFeature(located=(2,)), "located")],
)
def test_boxes_belong_to_an_image_and_to_classes(tmp_path: Path, boxes: BoxesFeature, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        write(tmp_path, [sample("a")], {**FEATURES, "boxes": boxes})


def test_inspect_draws_boxes_and_names_damage(tmp_path: Path) -> None:
    dark = png(np.zeros((40, 60), np.uint8))
    rows = [
        sample("many", image=dark, label=1, boxes=[[10, 10, 20, 16]] * 17, answer="<seven>" * 9),
        sample("none", image=dark, held_out=True),
        sample("outside", image=dark, boxes=[[50, 10, 20, 16]]),
        sample("missing", image=dark, label=1),
    ]
    features = {**FEATURES, "image": ImageFeature(channels=1, size=(40, 60))}
    write(tmp_path, rows, features)
    found = inspect(str(tmp_path))
    report = found.splits["train"]
    assert report.unreadable == 2 and [row.split(":")[1] for row in report.unreadable_samples] == [
        " outside",
        " missing",
    ]
    assert report.sizes["boxes"].most == 17 and report.sizes["answer bytes"].most == 63
    page = write_page(found, tmp_path / "page.html").read_text()
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(part))) for part in re.findall(r"data:image/\w+;base64,([^\"]+)", page)
    ]
    drawn = [np.asarray(picture.convert("RGB"), int) for picture in pictures if picture.size == (60, 40)]
    ys, xs = np.nonzero(np.abs(drawn[0] - (255, 0, 255)).sum(-1) < 90)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (9, 9, 30, 26) and not drawn[1].any()
    assert "17 boxes" in page and "&lt;seven&gt;" in page and "<b>classify, held_out</b>" in page
    assert "no boxes, wanted a list" in page and "outside of the image of 60x40" in page
