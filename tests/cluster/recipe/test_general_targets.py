"""What a general task takes from its data, and what does not fit: skills, words, queries."""

from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.config import Recipe, build_recipe, for_workers
from cluster.recipe.file import read_tree
from cluster.recipe.preflight import evaluation_metrics
from cluster.recipe.targets import check_targets, with_targets
from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines.features import AnswerFeature, BoxesFeature, FlagFeature, ImageFeature, LabelFeature, TextFeature
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, save_manifest

SKILLS = ("classify", "locate", "ask", "describe")
SHAPES: dict[str, tuple[int, ...]] = {"boxes": (16, 4), "answer": (32,), "label": ()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    """Return data of three samples and their manifest."""
    folder = tmp_path_factory.mktemp("scenes")
    features: dict[str, Any] = {
        "image": ImageFeature(channels=3, size=(64, 64)),
        "text": TextFeature(),
        "answer": AnswerFeature(),
        "boxes": BoxesFeature(),
        "label": LabelFeature(),
        "held_out": FlagFeature(),
    }
    answers = ["a red seven, a blue two", "a red one", None]
    row = {"image": b"", "text": "what is this?", "boxes": None, "label": 0, "held_out": False}
    store = open_folder(str(folder))
    with ShardWriter(store, "train-000000.arrow", arrow_schema(features), 2) as out:
        out.write({"key": str(number), "answer": answer, **row} for number, answer in enumerate(answers))
        shard = out.close()
    assert shard is not None
    split = Split(shards=(shard,))
    facts: dict[str, Any] = {"licence": "none", "source": "made up"}
    manifest = Manifest(name="scenes", features=features, classes=SKILLS, splits={"train": split}, **facts)
    save_manifest(manifest, store)
    return str(folder), manifest


def recipe(name: str, url: str, *overrides: str) -> Recipe:
    path = Path(f"recipes/train/{name}.yaml")
    return build_recipe(read_tree(path, [f"data.url={url}", *overrides]))


def test_skills_and_words_are_those_of_the_data(data):
    url, manifest = data
    found: Any = with_targets(recipe("gpv1", url), manifest)
    assert found.task.skills == SKILLS
    assert found.model.words == (",", "a", "blue", "one", "red", "seven", "two")
    assert with_targets(found, manifest) == found
    often: Any = with_targets(recipe("gpv1", url, "model.least_count=2"), manifest)
    assert often.model.words == ("a", "red")
    check_targets(found, manifest, SHAPES)


def test_a_run_can_keep_the_best_by_cider(data):
    url, manifest = data
    known = evaluation_metrics(with_targets(recipe("general", url), manifest), len(SKILLS))
    assert {"cider_describe", "cider_describe_held_out", "accuracy_ask", "ap50_locate_seen", "general"} <= set(known)


def test_word_pieces_are_those_of_the_file(data, tmp_path):
    url, manifest = data
    file = tmp_path / "vocab.txt"
    file.write_bytes("[PAD]\n[UNK]\n[CLS]\n[SEP]\nfind\n\u2028\n".encode())
    bert = "model.reader.kind=bert", f"model.reader.pieces_file={file}"
    found: Any = with_targets(recipe("gpv1", url, *bert, "model.reader.vocabulary=6"), manifest)
    assert found.model.reader.pieces == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "find", "\u2028")
    assert found.model.reader.pieces_file is None and with_targets(found, manifest) == found
    with pytest.raises(UserError, match=r"vocab.txt.* got 6 word pieces; wanted vocabulary = 30,522"):
        with_targets(recipe("gpv1", url, *bert), manifest)
    with pytest.raises(UserError, match="model.reader.kind = bert without word pieces: set model.reader.pieces_file"):
        with_targets(recipe("gpv1", url, bert[0]), manifest)
    file.write_bytes(b"\xff")
    for name in (str(file), str(tmp_path), str(tmp_path / "none.txt")):
        with pytest.raises(UserError, match="model.reader.pieces_file.*cannot be read.*wanted a text file"):
            with_targets(recipe("gpv1", url, bert[0], f"model.reader.pieces_file={name}"), manifest)


def test_workers_get_the_absolute_path_of_the_file(data):
    found = recipe("gpv1", data[0], "model.reader.kind=bert", "model.reader.pieces_file=bert/vocab.txt")
    assert for_workers(found)["model"]["reader"]["pieces_file"] == str(Path("bert/vocab.txt").resolve())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("general", "task.weights={count: 1}", "task.weights has count.*classify, locate, ask, describe"),
        ("general", "task.weights={classify: 0, locate: 0, ask: 0, describe: 0}", "task.weights is 0 for all"),
        ("gpv1", "model.length=7", "model.length = 7.*answers of 7 words.*at least 8"),
        ("gpv1", "model.least_count=9", "0 different words.*model.least_count"),
        ("general", "model.decoder.boxes=9", r"data\.boxes = 16.*model\.decoder\.boxes = 9"),
        ("general", "model.decoder.length=20", r"data\.answer_length = 32.*model\.decoder\.length = 20"),
        ("gpv1", "model.detector.queries=8", r"data\.boxes = 16.*model\.detector\.queries = 8"),
        ("general", "task={kind: classification}", "reads the outputs of a decoder of kind 'class'"),
        ("gpv1", "task={kind: classification}", "has those of kind 'general'"),
    ],
)
def test_what_does_not_fit_is_refused(data, name, change, message):
    url, manifest = data
    with pytest.raises(UserError, match=message):
        check_targets(with_targets(recipe(name, url, change), manifest), manifest, SHAPES)


def test_data_without_boxes_or_of_other_skills_are_refused(data):
    url, manifest = data
    found = with_targets(recipe("general", url), manifest)
    with pytest.raises(UserError, match="needs 'boxes'"):
        check_targets(found, manifest, {name: shape for name, shape in SHAPES.items() if name != "boxes"})
    with pytest.raises(UserError, match="has the skills count, task.skills are classify"):
        check_targets(found, manifest.model_copy(update={"classes": ("count",)}), SHAPES)
