"""A late fusion: the runs its branches start from read what the branches read, and weights are of its classifiers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from cluster.recipe.branches import other_inputs
from cluster.recipe.config import build_recipe
from cluster.recipe.inputs import input_sections
from cluster.recipe.preflight import check_recipe, describe_start
from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from tests.cluster.predict.test_scoring import write_sounds

NONE = {"kind": "none"}
MEL = {"kind": "mel", "samples": 64, "rate": 1000, "window": 16, "hop": 8, "bins": 4, "low": 50, "high": 450}
SOUND = {"kind": "audio_resnet", "inputs": {**MEL, "layout": "grid", "positions": NONE}, "stem": 2, "simple": 4}
NET: dict[str, Any] = {**SOUND, "simple_blocks": 1, "depths": [1], "widths": [8]}
RAW: dict[str, Any] = {
    "kind": "transformer",
    "inputs": {"kind": "audio", "samples": 64, "patch": 8, "positions": {"kind": "fourier", "bands": 2}},
    "width": 8,
    "layers": 1,
    "heads": 2,
}
CLASSES = ("bark", "meow")


def saved(path: Path, values: dict[str, Any]) -> str:
    torch.manual_seed(0)
    model = build_model(model_config(values), classes=2)
    metadata = {"model": json.dumps(values), "classes": json.dumps(CLASSES)}
    safetensors.torch.save_file(model.state_dict(), path, metadata)
    return str(path)


def start(places: dict[str, str]) -> str:
    model = {"kind": "late_fusion", "branches": {"mel": NET, "raw": RAW}}
    recipe = build_recipe({"name": "r", "model": model, "train": {"steps": 1, "init_from": places}, **SECTIONS})
    return describe_start(recipe, SimpleNamespace(classes=CLASSES))  # type: ignore[arg-type]


SECTIONS: dict[str, Any] = {
    "data": {"url": "x"},
    "task": {"kind": "tagging"},
    "optim": {"kind": "adamw", "lr": 1e-3},
}


def test_runs_of_the_branches_and_of_another_fusion_are_taken(tmp_path: Path) -> None:
    mel, raw = saved(tmp_path / "mel.safetensors", NET), saved(tmp_path / "raw.safetensors", RAW)
    line = start({"branches.mel": mel, "branches.raw": raw})
    assert line.startswith("branches.mel starts from 50 tensors") and "branches.raw starts from" in line
    fused = {"kind": "late_fusion", "branches": {"mel": NET, "other": RAW}, "combine": "average"}
    assert "branches.mel starts from" in start({"branches.mel": saved(tmp_path / "both.safetensors", fused)})


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"low": 60}, r"inputs\.low = 60\.0, model\.branches\.mel has 50\.0"),
        ({"std": 2}, r"inputs\.std = 2\.0, model\.branches\.mel has 1\.0"),
        ({"bins": 6}, r"inputs\.bins = 6, model\.branches\.mel has 4"),
    ],
)
def test_a_run_with_other_inputs_is_refused(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    """Whatever the shapes of its weights: here they are the same."""
    other = {**NET, "inputs": {**NET["inputs"], **changes}}
    with pytest.raises(UserError, match=r"train\.init_from\.branches\.mel: .*" + wanted) as caught:
        start({"branches.mel": saved(tmp_path / "mel.safetensors", other)})
    assert "\n" not in str(caught.value)


def test_a_run_of_another_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.init_from\.branches\.mel: .*inputs\.kind|inputs\.bins"):
        start({"branches.mel": saved(tmp_path / "raw.safetensors", RAW)})
    assert other_inputs(model_config(NET), model_config(NET)) is None


def test_the_inputs_of_each_branch_are_sections_of_their_own() -> None:
    model = model_config({"kind": "late_fusion", "branches": {"mel": NET, "raw": RAW}})
    assert [key for key, _ in input_sections(model)] == ["model.branches.mel.inputs", "model.branches.raw.inputs"]


@pytest.fixture
def fusion(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    write_sounds(tmp_path / "noise", 24, 3)
    place = {"url": str(tmp_path / "noise"), "train_split": "test", "eval_split": "test"}
    tree["data"] = {**place, "audio": {"rate": 1000, "samples": 64}}
    again = {**NET, "widths": [6]}
    tree["model"] = {"kind": "late_fusion", "branches": {"one": NET, "two": again}, "combine": "joint", "heads": True}
    tree["task"] = {"kind": "tagging", "blend": {"one": 1, "joint": 1}}
    return tree


@pytest.mark.parametrize(
    ("section", "changes", "wanted"),
    [
        (
            "task",
            {"blend": {"three": 1, "joint": 1}},
            "task.blend has three, but the model has the classifiers one, two",
        ),
        ("task", {"blend": None}, "set task.blend"),
        ("model", {"heads": False}, "the model has one classifier: set model.kind to late_fusion"),
        ("task", {"blend_split": "val"}, "val"),
        ("model", {"combine": "average", "heads": False}, "one classifier"),
    ],
)
def test_weights_of_other_classifiers_are_refused(
    section: str, changes: dict[str, Any], wanted: str, fusion: dict[str, Any]
) -> None:
    assert check_recipe(build_recipe(fusion)).parameters
    fusion[section] |= changes
    with pytest.raises(UserError) as caught:
        check_recipe(build_recipe(fusion))
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_mixup_needs_branches_that_are_trained(fusion: dict[str, Any]) -> None:
    fusion["task"]["mixup_alpha"] = 1.0
    fusion["train"]["global_batch"] = 8
    check_recipe(build_recipe(fusion))
    fusion["model"] |= {"combine": "average", "heads": False}
    fusion["task"]["blend"] = None
    with pytest.raises(UserError, match="frozen branches"):
        check_recipe(build_recipe(fusion))
