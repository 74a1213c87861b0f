"""Evaluation of the average of several checkpoints, against NumPy on the predictions of each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.predict.averaging import AVERAGES, Averaged
from cluster.predict.inference import predict
from cluster.predict.scoring import open_scoring
from cluster.recipe.config import build_recipe
from perceiver.api.models import evaluate
from perceiver.config import UserError
from perceiver.factory import build_model
from perceiver.optim.config import OptimConfig
from perceiver.train.checkpoint.store import CheckpointStore, Snapshot
from tests.cluster.predict.test_scoring import average_precision, call, rows, write_run, write_sounds
from tests.perceiver.train.engine.torch_engine import TorchEngine
from tests.perceiver.train.toy import ToyTask

STEPS = (5, 10, 15)


def write_checkpoints(folder: Path, tree: dict[str, Any], classes: int) -> Path:
    """Write a run with three checkpoints of random weights."""
    recipe = build_recipe(tree)
    write_run(folder, tree, classes)
    for step in STEPS:
        torch.manual_seed(step)
        model: Any = build_model(recipe.model, classes=classes)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        engine = TorchEngine(model, ToyTask(), OptimConfig(), lambda _: 1.0, device=torch.device("cpu"))
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        snapshot = Snapshot(step, 0, {}, shapes, recipe.model_dump(mode="json"), {}, "{}\n")
        CheckpointStore(str(folder / "checkpoints")).save(engine, snapshot)
    return folder


@pytest.fixture
def run(tree: dict[str, Any], tmp_path: Path) -> Path:
    """Return a classifier of images with three checkpoints."""
    tree["data"]["executor"] = "inline"
    return write_checkpoints(tmp_path / "small-001", tree, 2)


def predicted(run: Path, step: int, to: Path, *overrides: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities and labels of one checkpoint."""
    place = f"{run}/checkpoints/step-{step:08d}"
    predict(open_scoring(place, overrides=overrides), str(to / str(step)))
    found = rows(to / str(step))
    return np.array([row["probability"] for row in found]), np.array([row["label"] for row in found])


def test_classes(run: Path, tmp_path: Path) -> None:
    each = [predicted(run, step, tmp_path) for step in STEPS[1:]]
    scores, labels = np.mean([probability for probability, _ in each], 0), each[0][1]
    found = json.loads(call("evaluate", run, "--average", 2, "--json"))
    assert found["checkpoints"] == ["step-00000015", "step-00000010"]
    assert found["accuracy"] == pytest.approx((scores.argmax(1) == labels).mean())
    loss = -np.log(scores[np.arange(len(labels)), labels]).mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert evaluate(run, average=2)["loss"] == pytest.approx(loss, rel=1e-5) != evaluate(run, average=3)["loss"]
    assert "the average of step-00000015, step-00000010," in call("evaluate", run, "--average", 2)


@pytest.mark.filterwarnings("ignore:about 100%")
def test_tags_of_several_clips(tree: dict[str, Any], tmp_path: Path) -> None:
    write_sounds(tmp_path / "noise", 24, 3)
    tree["data"] = {"url": str(tmp_path / "noise"), "executor": "inline", "audio": {"rate": 1000, "samples": 64}}
    tree["model"]["inputs"] = {"kind": "audio", "samples": 64, "patch": 8, "positions": {"kind": "fourier", "bands": 2}}
    tree["task"] = {"kind": "tagging"}
    run, clips = write_checkpoints(tmp_path / "run", tree, 3), "data.clip.eval_clips=3"
    scores = np.mean([predicted(run, step, tmp_path, clips)[0] for step in STEPS], 0)
    found = evaluate(run, average=3, **{"data.clip.eval_clips": 3})
    labels = write_sounds(tmp_path / "again", 24, 3)[1]
    exact = np.mean([average_precision(scores[:, k], labels[:, k]) for k in range(3)])
    assert found["mean_average_precision"] == pytest.approx(exact, abs=found["mean_average_precision_error"] + 1e-9)
    assert found["loss"] == pytest.approx(-np.log(np.where(labels, scores, 1 - scores)).mean(), rel=1e-4)


def test_numbers() -> None:
    models: list[Any] = [nn.Linear(3, 2) for _ in range(3)]
    for model in models:
        model.input_keys, model.optional_keys = ("x",), ()
    x = torch.randn(4, 3)
    expected = (models[0](x) + models[1](x) + models[2](x)) / 3
    torch.testing.assert_close(Averaged(models, AVERAGES["regression"])(x), expected)


def test_what_cannot_be_averaged(run: Path, tmp_path: Path, tree: dict[str, Any]) -> None:
    for place, count in ((run, 4), (tmp_path / "nowhere", 2), (run / "checkpoints" / "step-00000005", 2)):
        with pytest.raises(UserError, match=f"--average {count}: .* has {3 if count == 4 else 0} intact checkpoints"):
            evaluate(place, average=count)
    shard = next((run / "checkpoints" / "step-00000015").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="has 2 intact"):
        evaluate(run, average=3)
    assert json.loads(call("evaluate", run, "--average", 2, "--json"))["checkpoints"] == [
        "step-00000010",
        "step-00000005",
    ]
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"kind":"classification"', '"kind":"segmentation"'))
        manifest.write_text(manifest.read_text().replace('"kind": "classification"', '"kind": "segmentation"'))
    with pytest.raises(UserError, match="'segmentation'; wanted a task"):
        evaluate(run, average=2)
