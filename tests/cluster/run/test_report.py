"""The report of a run shows samples of any kind with the keys of the data."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
from PIL import Image

from cluster.predict.outputs import parquet
from cluster.recipe.config import Recipe, build_recipe
from cluster.record.run_folder import WEIGHTS, RunFolder
from cluster.run.report import build_report
from cluster.run.samples import read_samples
from perceiver.factory import build_model
from perceiver.storage import open_folder
from perceiver.train.checkpoint.store import CheckpointStore
from pipelines.features import (
    AudioFeature,
    Feature,
    LabelFeature,
    LabelsFeature,
    MediaFeature,
    PointsFeature,
    TextFeature,
)
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, load_manifest, save_manifest
from tests.perceiver.report.pages import Page
from tests.pipelines.recordings import media_file, ramp, sound_file

KINDS: dict[str, tuple[Feature, Any]] = {
    "text": (TextFeature(), lambda n: f"the words of {n}"),
    "audio": (AudioFeature(), lambda n: sound_file(np.full(800, n, np.int16), 8000)),
    "points": (PointsFeature(), lambda n: np.random.default_rng(n).normal(size=(20, 3)).astype("<f4").tobytes()),
}


def written(folder: Path, kind: str, tree: dict[str, Any], label: Feature, count: int = 6) -> tuple[Recipe, Manifest]:
    """Write data of one kind with two classes; return a recipe of it."""
    feature, make = KINDS[kind]
    target, features = open_folder(str(folder / "data")), {kind: feature, "label": label}
    rows = [
        {"key": f"{kind}/{n}.raw", kind: make(n), "label": n % 2 if label.kind == "label" else [n % 2]}
        for n in range(count)
    ]
    with ShardWriter(target, "a.arrow", arrow_schema(features), 2) as writer:
        writer.write(rows)
        shard = writer.close()
    assert shard is not None
    splits = {"test": Split(shards=(shard,))}
    save_manifest(
        Manifest(name="x", features=features, classes=("no", "yes"), splits=splits, licence="", source=""), target
    )
    tree["data"] = {"url": str(folder / "data"), "executor": "inline"}
    return build_recipe(tree), load_manifest(str(folder / "data"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Return a run's folder with a checkpoint's history."""
    monkeypatch.setattr(CheckpointStore, "steps", lambda self: [1])
    monkeypatch.setattr(
        CheckpointStore, "history", lambda self, step: json.dumps({"step": 1, "train/loss": 1.0}) + "\n"
    )
    (tmp_path / "runs").mkdir()
    return RunFolder(str(tmp_path / "runs"), "small-001")


def predict(folder: RunFolder, **columns: Any) -> None:
    folder.write("predictions/part-00000.parquet", parquet(pa.table(columns)))


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_of_every_kind_are_shown_with_their_keys(
    kind: str, folder: RunFolder, tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe, manifest = written(tmp_path, kind, tree, LabelFeature())
    predict(
        folder,
        sample_id=list(range(6)),
        label=[0, 1] * 3,
        prediction=[0, 1, 1, 1, 0, 1],
        probability=[[0.5, 0.5]] * 6,
    )
    build_report(recipe, folder, manifest, {}, {})
    found = Page((folder.local / "report" / "index.html").read_text())
    assert sorted(word for tag, word in found.texts if tag == "bdi") == [f"{kind}/{n}.raw" for n in range(6)]
    assert len([row for row in found.all("figure") if row.get("class") == "card wrong"]) == 1
    what = {"text": lambda: "the words of 2" in found.words, "audio": lambda: found.count("audio") == 6}
    assert what.get(kind, lambda: found.count("canvas") == 6)()


def test_a_tagging_run_has_a_table_of_its_classes(folder: RunFolder, tree: dict[str, Any], tmp_path: Path) -> None:
    tree["task"] = {"kind": "tagging"}
    recipe, manifest = written(tmp_path, "text", tree, LabelsFeature())
    labels = [[1.0, 0.0], [0.0, 1.0]] * 3
    predict(folder, sample_id=list(range(6)), label=labels, prediction=[[True, False]] * 6, probability=labels)
    build_report(recipe, folder, manifest, {}, {})
    assert (folder.local / "report" / "per_class.csv").read_text().splitlines()[1].startswith("no,1.0,1.0,1.0,3")


@pytest.mark.parametrize("clips", [1, 3])
def test_attention_to_sound_is_drawn_as_a_spectrogram(
    clips: int, folder: RunFolder, tree: dict[str, Any], tmp_path: Path
) -> None:
    """A tagging run, too; of several clips per sample the first one is shown."""
    tree["task"] = {"kind": "tagging"}
    tree["model"]["inputs"] = {"kind": "mel", "samples": 800, "rate": 8000, "window": 64, "hop": 100, "bins": 5} | {
        "low": 100, "high": 4000, "positions": {"kind": "fourier", "bands": 2}
    }  # fmt: skip
    recipe, manifest = written(tmp_path, "audio", tree, LabelsFeature())
    view = {"audio": {"rate": 8000, "samples": 800}, "clip": {"eval_clips": clips}}
    recipe = build_recipe({**tree, "data": {**tree["data"], **view}})
    model = build_model(recipe.model, classes=2)
    folder.write(WEIGHTS, safetensors.torch.save(model.state_dict()))
    labels = [[1.0, 0.0], [0.0, 1.0]] * 3
    predict(folder, sample_id=list(range(6)), label=labels, prediction=[[True, False]] * 6, probability=labels)
    build_report(recipe, folder, manifest, {}, {})
    found = Page((folder.local / "report" / "index.html").read_text())
    rows = {word for tag, word in found.texts if tag == "th" and word.startswith("cross-attend")}
    attends = sorted({1, recipe.model.cross_attends})  # type: ignore[attr-defined]
    assert rows == {f"cross-attend {number}: {kind}" for number in attends for kind in ("scores", "weights")}
    drawn = next(row["src"] for row in found.all("img") if row["alt"] == "attention map")
    with Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2]))) as image:
        assert image.size == (8, 5), "time to the right, frequency upwards"


@pytest.mark.parametrize(
    ("streams", "kinds"),
    [("both", ["strip", "strip", "audio"]), ("audio", ["strip", "audio"]), ("video", ["strip"])],
)
def test_of_a_recording_those_streams_are_shown_that_the_model_reads(
    streams: str, kinds: list[str], tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = media_file([0, 100, 200, 300], [10, 20, 30, 40], sound=ramp(0.4, 16_000))
    monkeypatch.setitem(KINDS, "media", (MediaFeature(channels=1, size=(32, 32)), lambda _: film))
    recipe, manifest = written(tmp_path, "media", tree, LabelFeature())
    shown = {"clip": {"show": streams}, "audio": {"rate": 16_000, "samples": 4800}, "video": {"frames": 3, "fps": 10}}
    recipe = build_recipe(tree | {"data": tree["data"] | shown})
    samples = read_samples(recipe, manifest, [0, 3])
    assert [[part.kind for part in samples[number].parts] for number in (0, 3)] == [kinds, kinds]


def test_images_are_shown_as_the_model_reads_them(tree: dict[str, Any]) -> None:
    """The last sample of a split, too; a damaged one is left out by its id."""
    tree["data"]["image_size"] = [6, 6]
    recipe = build_recipe(tree)
    manifest = load_manifest(recipe.data.url)
    last = manifest.split("test").samples - 1
    found = read_samples(recipe, manifest, {0, last})
    assert sorted(found) == [0, last]
    for sample in found.values():
        assert sample.image is not None and sample.image.shape == (6, 6, 1) and sample.key.endswith(".png")
