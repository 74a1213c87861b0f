"""COCO and VQA v2 in their files' real form, made small by the test."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perceiver.config import UserError
from pipelines.features.base import ViewConfig
from pipelines.feed.ingest import DataConfig, EvalShare, eval_batches
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import Reader
from pipelines.sources import coco
from pipelines.sources._coco import CLASSIFYING, DESCRIBING, LOCATING

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 18, "name": "dog"}]


def image(number: int, width: int = 64, height: int = 48) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg", "width": width, "height": height}


def instance(number: int, picture: int, category: int, box: list[float], crowd: int = 0) -> dict[str, Any]:
    return {"id": number, "image_id": picture, "category_id": category, "bbox": box, "iscrowd": crowd}


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_id": number} for number, text in enumerate(texts, 1)]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Images 1 to 3 to train on, 4 to validate on; the question about image 3 is in VQA's val2014."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for split, numbers in (("train2017", (1, 2, 3)), ("val2017", (4,))):
        (folder / split).mkdir()
        for number in numbers:
            Image.fromarray(pixels + np.uint8(number)).save(folder / split / f"{number:012d}.jpg")
    train = [
        instance(10, 1, 18, [8, 8, 16, 12]),
        instance(11, 1, 18, [40.5, 20, 20, 20]),
        instance(12, 1, 1, [0, 0, 10, 10]),
        instance(13, 2, 1, [0, 0, 60, 40], crowd=1),
    ]
    document("instances_train2017", folder, images=[image(n) for n in (1, 2, 3)], annotations=train)
    document("instances_val2017", folder, images=[image(4)], annotations=[instance(14, 4, 1, [10, 10, 30, 20])])
    captions = [{"id": 20, "image_id": 2, "caption": " A cat sleeps. "}, {"id": 21, "image_id": 3, "caption": "Grass."}]
    document("captions_train2017", folder, images=[image(n) for n in (1, 2, 3)], annotations=captions)
    for split, picture, given in (("train", 1, ["red"] * 6 + ["blue"] * 4), ("val", 3, ["a", "b", "b", "c"])):
        question = {"question_id": picture * 1000, "image_id": picture, "question": "What colour is the dog?"}
        (folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json").write_text(json.dumps({"questions": [question]}))
        entry = {"question_id": picture * 1000, "image_id": picture, "answers": answers(*given)}
        (folder / f"v2_mscoco_{split}2014_annotations.json").write_text(json.dumps({"annotations": [entry]}))
    return folder


def document(name: str, folder: Path, **content: Any) -> None:
    path = folder / "annotations" / f"{name}.json"
    path.write_text(json.dumps({"info": {}, "categories": CATEGORIES, **content}))


def run(src: Path, **options: str) -> tuple[Manifest, dict[str, dict[str, dict[str, Any]]]]:
    """Prepare; return the manifest and the samples of each split by key."""
    dst = src.parent / f"prepared{len(list(src.parent.iterdir()))}"
    config = PrepareConfig(parallel="off", options=options, max_bad_fraction=1)
    manifest = prepare("coco", str(src), str(dst), config)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for split, part in manifest.splits.items():
        reader = Reader.of(str(dst), manifest, part)
        for shard, group, row in reader.locate(np.arange(part.samples)):
            rows = reader.row_groups({(shard, group)})[shard, group]
            sample = {name: rows.value(name, row) for name in ("key", *manifest.features)}
            found.setdefault(split, {})[sample["key"]] = sample
    return manifest, found


def quarantined(src: Path) -> dict[str, str]:
    table = pq.read_table(src.parent / max(p.name for p in src.parent.glob("prepared*")) / "quarantine.parquet")
    return dict(zip(table["key"].to_pylist(), table["reason"].to_pylist()))


def test_all_four_tasks_with_their_answers_boxes_and_splits(src: Path) -> None:
    manifest, found = run(src)
    assert manifest.classes == coco.SKILLS and manifest.rejected == 0
    assert sorted(found["val"]) == ["val/classify/14", "val/locate/4/1"]
    train = found["train"]
    # The region of many cats in image 2 is no task; the question of val2014 is about a training image of 2017.
    assert sorted(train) == [
        *(f"train/ask/{number}" for number in (1000, 3000)),
        *(f"train/classify/{number}" for number in (10, 11, 12)),
        *(f"train/describe/{number}" for number in (20, 21)),
        *(f"train/locate/1/{number}" for number in (1, 18)),
    ]
    assert train["train/ask/1000"]["answer"] in ("red", "blue") and train["train/ask/3000"]["answer"] == "b"
    assert train["train/ask/1000"]["text"] == "What colour is the dog?"
    caption = train["train/describe/20"]
    assert caption["answer"] == "A cat sleeps." and caption["text"] in DESCRIBING and caption["boxes"] is None
    dogs = train["train/locate/1/18"]
    assert dogs["boxes"] == [[8, 8, 16, 12], [40.5, 20, 20, 20]] and dogs["answer"] == ""
    assert dogs["text"] in [text.format("dog") for text in LOCATING]
    assert bytes(dogs["image"]) == (src / "train2017" / "000000000001.jpg").read_bytes()
    named = train["train/classify/11"]
    assert named["answer"] == "dog" and named["text"] in CLASSIFYING
    # The box and 20 % of it on each side, as far as the image goes: 36.5 to 64 and 16 to 44.
    assert Image.open(io.BytesIO(named["image"])).size == (64 - 36, 44 - 16)
    assert (len(set(DESCRIBING)), len(set(LOCATING)), len(set(CLASSIFYING))) == (14, 18, 4)


def test_evaluations_have_all_captions_of_an_image_and_all_answers_to_a_question(src: Path) -> None:
    texts = ["A cat.", "x" * 129, "One cat sits.", " A cat. ", "A dog."]
    captions = [{"id": 40 + number, "image_id": 4, "caption": text} for number, text in enumerate(texts)]
    document("captions_val2017", src, images=[image(4)], annotations=captions)
    given = ["yes"] * 2 + ["no"] * 7 + [""]
    question = {"question_id": 4000, "image_id": 4, "question": "Is it a cat?"}
    entry = {"question_id": 4000, "image_id": 4, "answers": answers(*given)}
    (src / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": [question]}))
    (src / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": [entry]}))
    (src / "pairs.csv").write_text("describe,dog\n")
    manifest, found = run(src, held_out="pairs.csv")
    described = found["val"]["val/describe/4"]
    assert described["answers"] == ["A cat.", "One cat sits.", "A cat.", "A dog."] and described["answer"] == "A cat."
    assert described["held_out"], "one of its captions is about a dog"
    asked = found["val"]["val/ask/4000"]
    assert asked["answers"] == ["yes"] * 2 + ["no"] * 7 and asked["answer"] == "no"
    assert found["val"]["val/locate/4/1"]["answers"] == [] == found["train"]["train/describe/20"]["answers"]
    notes = " ".join(coco.source.listing(str(src), seed=0, shard_rows=9, options={}).notes)
    assert "texts of more than answer_bytes=128 bytes: 1" in notes and manifest.rejected == 0


def test_batches_show_the_whole_image_with_stretch(src: Path) -> None:
    manifest, _ = run(src)
    data = DataConfig.model_validate(
        {"url": str(src.parent / "prepared1"), "executor": "inline", "image_size": [32, 32], "stretch": True}
    )
    assert isinstance(data, ViewConfig)
    batch = next(eval_batches(data, manifest, EvalShare("val", 2), "cpu"))
    (place,) = (batch["boxes_count"] == 1).nonzero().tolist()
    assert batch["boxes"][place][0, 0].tolist() == pytest.approx([25 / 64, 20 / 48, 30 / 64, 20 / 48])


def test_pairs_that_the_user_holds_out(src: Path) -> None:
    (src / "pairs.csv").write_text("skill,category\nlocate,cat\nask,dog\ndescribe, cat\n")
    _, found = run(src, held_out="pairs.csv")
    gone = {"train/locate/1/1", "train/ask/1000", "train/ask/3000", "train/describe/20"}
    assert not gone & set(found["train"]) and not any(one["held_out"] for one in found["train"].values())
    assert {key: one["held_out"] for key, one in found["val"].items()} == {
        "val/locate/4/1": True,
        "val/classify/14": False,
    }


@pytest.mark.parametrize(
    ("entry", "key", "reason"),
    [
        (instance(30, 9, 1, [0, 0, 5, 5]), "instances_train2017.json#annotations/0", "unknown image 9"),
        (instance(30, 1, 7, [0, 0, 5, 5]), "instances_train2017.json#annotations/0", "unknown category 7"),
        (instance(30, 1, 1, [0, 0, 5, 0]), "instances_train2017.json#30", "5x0 pixels"),
        (instance(30, 1, 1, [60, 0, 9, 9]), "instances_train2017.json#30", "outside of the image of 64x48"),
        (instance(30, 1, 1, [0, 0, 9]), "instances_train2017.json#30", "3 numbers"),
        ({"id": 30, "image_id": 1}, "instances_train2017.json#annotations/0", "wanted id, image_id"),
    ],
)
def test_annotations_that_cannot_be_used_are_quarantined(src: Path, entry: Any, key: str, reason: str) -> None:
    document("instances_train2017", src, images=[image(1)], annotations=[entry, instance(31, 1, 1, [1, 1, 5, 5])])
    manifest, found = run(src)
    problems = quarantined(src)
    assert manifest.rejected == len(problems) and reason in problems[key]
    # The other cat can be named, but not all cats can be found if one of their boxes is damaged.
    assert "train/classify/31" in found["train"]
    assert ("train/locate/1/1" in found["train"]) == (entry.get("bbox") is None or "unknown" in reason)


def test_missing_images_and_long_answers_are_quarantined(src: Path) -> None:
    (src / "train2017" / "000000000002.jpg").unlink()
    (src / "train2017" / "000000000003.jpg").write_bytes(b"no image")
    _, found = run(src, answer_bytes="3", boxes="1")
    problems = quarantined(src)
    assert "no image of its name" in problems["train/describe/20"]
    assert "answer_bytes=3" in problems["train/describe/21"] and "boxes=1" in problems["train/locate/1/18"]
    assert "train/ask/3000" in found["train"]  # stored unchanged: training quarantines it


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg"])
def test_names_that_leave_the_folder_are_quarantined(src: Path, name: str) -> None:
    (src.parent / "secret.jpg").write_bytes((src / "train2017" / "000000000001.jpg").read_bytes())
    document(
        "captions_train2017",
        src,
        images=[{**image(50), "file_name": name}],
        annotations=[{"id": 51, "image_id": 50, "caption": "x"}],
    )
    _, found = run(src)
    problems = quarantined(src)
    assert "below the table's folder" in problems["captions_train2017.json#images/0"]
    assert "unknown image 50" in problems["captions_train2017.json#annotations/0"]
    assert not any("describe" in key for key in found["train"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda src: (src / "v2_mscoco_val2014_annotations.json").unlink(), "v2_mscoco_val2014_annotations.json"),
        (lambda src: (src / "annotations/instances_val2017.json").write_text("[]"), "wanted an object"),
        (lambda src: (src / "annotations/instances_val2017.json").write_text('{"images": 3}'), "wanted a list"),
        (lambda src: [path.unlink() for path in src.rglob("*.jpg")], "no images"),
        (lambda src: [path.unlink() for path in src.rglob("*.json")], "no annotation files"),
    ],
)
def test_data_of_another_form_is_refused(src: Path, change: Any, reason: str) -> None:
    change(src)
    with pytest.raises(UserError, match=reason):
        run(src)


@pytest.mark.parametrize(
    ("line", "reason"), [("find,cat", "classify, locate, ask"), ("ask,unicorn", "unicorn"), ("ask", "SKILL,CATEGORY")]
)
def test_unknown_skills_and_categories_are_refused(src: Path, line: str, reason: str) -> None:
    (src / "pairs.csv").write_text(line)
    with pytest.raises(UserError, match=f"pairs.csv: line 1: .*{reason}"):
        run(src, held_out="pairs.csv")
    with pytest.raises(UserError, match="held_out="):
        run(src, held_out="../pairs.csv")
