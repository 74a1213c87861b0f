"""Numbers, several labels, several tasks and masks, from prepared data to predictions, exports and served answers."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from cluster.predict.inference import predict
from cluster.predict.scoring import check_labels, open_scoring
from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.preflight import check_model
from cluster.recipe.targets import check_feature, takes_from_data, with_targets
from cluster.record.run_folder import RunFolder
from cluster.run.report import build_report
from perceiver.config import UserError
from perceiver.export.checkpoint_model import CheckpointModel
from perceiver.export.formats import export_onnx, model_card
from perceiver.export.weights import open_weights
from perceiver.train.checkpoint.store import CheckpointStore
from pipelines.features import AudioFeature
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import load_manifest
from tests.cluster.predict.test_scoring import rows, write_run

CLASSES = ("dark", "light")
INPUTS = {"kind": "image", "channels": 1, "size": [8, 8], "mean": [0.5], "std": [0.3]}
SMALL = {"latents": 4, "latent_channels": 16, "self_attends_per_block": 1, "heads": 2}
PLAIN = {"kind": "perceiver", "cross_attends": 1, **SMALL}
IO = {"kind": "perceiver_io", "blocks": 1, "query_residual": False, **SMALL}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the URLs of 24 prepared images with numbers, labels and masks."""
    root = tmp_path_factory.mktemp("targets")
    rng = np.random.default_rng(0)
    src = root / "src"
    src.mkdir()
    table = []
    for number in range(24):
        pixels = rng.integers(0, 256, (8, 8)).astype(np.uint8)
        for name, values in (("i", pixels), ("m", (pixels > 127).astype(np.uint8))):
            Image.fromarray(values).save(src / f"{name}{number}.png")
        price, light = 100 + float(pixels.mean()), "light" if number % 2 else "dark"
        table.append(
            [f"i{number}.png", price, number, light, "round" * (number % 3 == 0), f"{light};x", f"m{number}.png"]
        )
    with (src / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["photo", "price", "width", "hue", "form", "tags", "seg"], *table])
    options = {
        "numbers": {"target": "price,width"},
        "several": {"target": "price", "label": "hue,form"},
        "tags": {"labels": "tags"},
        "masks": {"mask": "seg", "classes": ",".join(CLASSES)},
    }
    for name, given in options.items():
        config = PrepareConfig(parallel="off", options={"image": "photo", "held_out": "0.25", **given})
        prepare("csv", str(src), str(root / name), config)
    return {name: str(root / name) for name in options}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, Path], str]:
    """Return a function from a recipe and its predictions to the report's page."""
    monkeypatch.setattr(CheckpointStore, "steps", lambda self: [1])
    history = json.dumps({"step": 1, "train/loss": 1.0}) + "\n"
    monkeypatch.setattr(CheckpointStore, "history", lambda self, step: history)

    def build(found: Recipe, predictions: Path) -> str:
        place = tmp_path / "reports" / "small-001" / "predictions"
        shutil.copytree(predictions, place)
        run = RunFolder(str(tmp_path / "reports"), "small-001")
        return Path(build_report(found, run, load_manifest(found.data.url), {}, {})).read_text()

    return build


def recipe(folder: Path, url: str, task: dict[str, Any], model: dict[str, Any]) -> Recipe:
    """Return a recipe with what its task takes from the data."""
    tree = {
        "name": "small",
        "output": str(folder / "runs"),
        "data": {"url": url, "executor": "inline"},
        "model": {"inputs": {**INPUTS, "positions": {"kind": "fourier", "bands": 3}}, **model},
        "task": task,
        "optim": {"lr": 0.01},
        "train": {"epochs": 1, "global_batch": 4},
    }
    found = build_recipe(tree)
    check_model(found, load_manifest(url))
    return with_targets(found, load_manifest(url))


def trained(folder: Path, found: Recipe, classes: int) -> Path:
    """Return the folder of a run of a recipe with random weights and the facts of its data."""
    run = write_run(folder / "runs" / "small-001", json.loads(found.model_dump_json()), classes)
    names = load_manifest(found.data.url).classes
    facts = {"name": "x", "licence": "", "source": "", "classes": names}
    (run / "run.json").write_text(json.dumps({"data": facts}))
    return run


def onnx(run: Path, folder: Path) -> tuple[Any, list[np.ndarray]]:
    """Export to ONNX; return the session and its outputs for two black images."""
    saved = open_weights(str(run))
    folder.mkdir()
    written = export_onnx(saved, folder)
    assert "```python" in model_card(saved, written, saved.data)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return session, session.run(None, {"image": np.zeros((2, 1, 8, 8), np.uint8)})


def test_regression(data: dict[str, str], tmp_path: Path, page: Any) -> None:
    found = recipe(tmp_path, data["numbers"], {"kind": "regression"}, PLAIN)
    assert not takes_from_data(found)
    run = trained(tmp_path, found, 2)
    scoring = open_scoring(str(run))
    check_labels(scoring)
    figures = scoring.metrics()
    predict(scoring, str(tmp_path / "out"))
    table = rows(tmp_path / "out")
    errors = [abs(row["prediction_price"] - row["target_price"]) for row in table]
    assert len(table) == 6 and figures["mae_price"] == pytest.approx(np.mean(errors), rel=1e-4)
    session, outputs = onnx(run, tmp_path / "onnx")
    served = CheckpointModel(str(run)).predict({"image": np.zeros((2, 1, 8, 8), np.uint8)})
    assert json.loads(session.get_modelmeta().custom_metadata_map["targets"]) == ["price", "width"]
    np.testing.assert_allclose(outputs[0][:, 1], served["prediction_width"], rtol=1e-4)
    assert "Predicted and true values" in page(found, tmp_path / "out")


def test_targets_of_other_data_are_refused(data: dict[str, str], tmp_path: Path) -> None:
    found = recipe(tmp_path, data["numbers"], {"kind": "regression"}, PLAIN)
    run = trained(tmp_path, found, 2)
    for other, message in (("several", "has the targets price"), ("tags", "no feature 'target'")):
        with pytest.raises(UserError, match=message):
            check_labels(open_scoring(str(run), data[other]))
    assert predict(open_scoring(str(run), data["tags"]), str(tmp_path / "unlabelled")) == 6


def test_tagging(data: dict[str, str], tmp_path: Path) -> None:
    task = {"kind": "tagging", "class_weights": "balanced"}
    found = recipe(tmp_path, data["tags"], task, PLAIN)
    section: Any = found.task
    assert len(section.class_weights) == 3 and section.class_weights[2] == 1.0  # all samples have x
    run = trained(tmp_path, found, 3)
    scoring = open_scoring(str(run))
    check_labels(scoring)
    predict(scoring, str(tmp_path / "out"))
    row = rows(tmp_path / "out")[0]
    assert row["classes"] == [name for name, on in zip(("dark", "light", "x"), row["prediction"], strict=True) if on]
    session, outputs = onnx(run, tmp_path / "onnx")
    assert outputs[0].shape == (2, 3) and "dark" in session.get_modelmeta().custom_metadata_map["classes"]


def test_several_tasks(data: dict[str, str], tmp_path: Path, page: Any) -> None:
    task = {
        "kind": "multitask",
        "tasks": {"hue": 1.0, "form": 0.5, "price": 2.0},
        "class_weights": {"hue": "balanced"},
    }
    decoder = {"kind": "multitask", "tasks": {"hue": 2, "form": 1, "price": 1}}
    found = recipe(tmp_path, data["several"], task, {**IO, "decoder": decoder})
    run = trained(tmp_path, found, 0)
    scoring = open_scoring(str(run))
    check_labels(scoring)
    figures = scoring.metrics()
    predict(scoring, str(tmp_path / "out"))
    table = rows(tmp_path / "out")
    right = [row["prediction_hue"] == row["label_hue"] for row in table]
    shown = page(found, tmp_path / "out")
    assert "hue: where it is right and wrong" in shown and shown.count('<table class="confusion">') == 2
    assert f"{100 * np.mean(right):.1f} % of 6 samples" in shown and "form: where it is right" in shown
    assert figures["accuracy_hue"] == pytest.approx(np.mean(right))
    assert {row["class_hue"] for row in table} <= set(CLASSES) and {row["class_form"] for row in table} == {"round"}
    errors = [abs(row["prediction_price"] - row["target_price"]) for row in table]
    assert figures["mae_price"] == pytest.approx(np.mean(errors), rel=1e-4)
    session, outputs = onnx(run, tmp_path / "onnx")
    served = CheckpointModel(str(run)).predict({"image": np.zeros((2, 1, 8, 8), np.uint8)})
    assert [output.name for output in session.get_outputs()] == ["form", "hue", "price"]
    np.testing.assert_allclose(outputs[2], served["prediction_price"], rtol=1e-4)
    assert set(served["class_hue"]) <= set(CLASSES)


@pytest.mark.parametrize(
    ("tasks", "sizes", "message"),
    [
        ({"hue": 1.0, "weight": 1.0}, {"hue": 2, "weight": 1}, "needs 'label_weight'"),
        ({"hue": 1.0}, {"hue": 3}, "hue has 2 classes: set it to 2"),
        ({"price": 1.0}, {"price": 2}, "price is a number: set it to 1"),
    ],
)
def test_tasks_that_do_not_fit_the_data(
    tasks: dict[str, float], sizes: dict[str, int], message: str, data: dict[str, str], tmp_path: Path
) -> None:
    model = {**IO, "decoder": {"kind": "multitask", "tasks": sizes}}
    with pytest.raises(UserError, match=message):
        recipe(tmp_path, data["several"], {"kind": "multitask", "tasks": tasks}, model)


def test_weights_of_a_number_are_refused(data: dict[str, str], tmp_path: Path) -> None:
    task = {"kind": "multitask", "tasks": {"price": 1.0}, "class_weights": {"price": "balanced"}}
    with pytest.raises(UserError, match="task.class_weights has price, which is a number"):
        recipe(tmp_path, data["several"], task, {**IO, "decoder": {"kind": "multitask", "tasks": {"price": 1}}})


def test_clips_of_several_tasks_are_refused(data: dict[str, str], tmp_path: Path) -> None:
    model = {**IO, "decoder": {"kind": "multitask", "tasks": {"hue": 2}}}
    found = recipe(tmp_path, data["several"], {"kind": "multitask", "tasks": {"hue": 1.0}}, model)
    clip = found.data.clip.model_copy(update={"eval_clips": 4})
    clips = found.model_copy(update={"data": found.data.model_copy(update={"clip": clip})})
    manifest = load_manifest(data["several"])
    sound = manifest.model_copy(update={"features": {**manifest.features, "audio": AudioFeature()}})
    check_feature(clips, manifest)
    with pytest.raises(UserError, match="data.clip.eval_clips = 4"):
        check_feature(clips, sound)


def test_segmentation(data: dict[str, str], tmp_path: Path, page: Any) -> None:
    found = recipe(tmp_path, data["masks"], {"kind": "segmentation"}, {**IO, "decoder": {"kind": "pixels"}})
    run = trained(tmp_path, found, 2)
    scoring = open_scoring(str(run))
    check_labels(scoring)
    assert {"loss", "pixel_accuracy", "mean_iou"} == set(scoring.metrics())
    predict(scoring, str(tmp_path / "out"))
    masks = [np.array(Image.open(io.BytesIO(row["prediction"]))) for row in rows(tmp_path / "out")]
    assert len(masks) == 6 and all(mask.shape == (8, 8) and mask.max() < 2 for mask in masks)
    _, outputs = onnx(run, tmp_path / "onnx")
    served = CheckpointModel(str(run)).predict({"image": np.zeros((2, 1, 8, 8), np.uint8)})
    assert outputs[0].shape == (2, 2, 8, 8) and served["prediction"].shape == (2, 8, 8)
    assert page(found, tmp_path / "out").count('class="strip"') == 6


def test_a_segmentation_needs_masks_and_pixels(data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="segmentation_folder"):
        recipe(tmp_path, data["numbers"], {"kind": "segmentation"}, {**IO, "decoder": {"kind": "pixels"}})
    with pytest.raises(UserError, match="wanted|decoder of kind 'pixels'"):
        recipe(tmp_path, data["masks"], {"kind": "segmentation"}, IO)


def test_queries_need_an_input_for_each_pixel_of_the_mask(data: dict[str, str], tmp_path: Path) -> None:
    inputs = {**INPUTS, "front_end": "patch", "patch": 2, "positions": {"kind": "fourier", "bands": 3}}
    model = {**IO, "decoder": {"kind": "pixels"}}
    recipe(tmp_path, data["masks"], {"kind": "segmentation", "queries": 9}, model)
    with pytest.raises(UserError, match="task.queries = 9 .* 8 x 8, but model.inputs has 4 x 4"):
        recipe(tmp_path, data["masks"], {"kind": "segmentation", "queries": 9}, {**model, "inputs": inputs})


def test_balanced_weights_need_counts(data: dict[str, str], tmp_path: Path) -> None:
    manifest = load_manifest(data["tags"]).model_copy(update={"class_counts": {}})
    model = PLAIN
    found = recipe(tmp_path, data["tags"], {"kind": "tagging"}, model)
    weighted = found.model_copy(update={"task": found.task.model_copy(update={"class_weights": "balanced"})})
    with pytest.raises(UserError, match="class_weights = balanced"):
        with_targets(weighted, manifest)
