"""`train.init_from`: the head of saved weights belongs to their classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from perceiver.config import UserError
from perceiver.export.weights import load_weights, open_weights, plan_weights
from perceiver.factory import build_model, model_config

IMAGE = {"kind": "image", "channels": 1, "size": [8, 8], "mean": [0.0], "std": [1.0]}
MODEL: dict[str, Any] = {
    "kind": "perceiver",
    "inputs": {**IMAGE, "positions": {"kind": "fourier", "bands": 2}},
    "latents": 3,
    "latent_channels": 8,
    "cross_attends": 1,
    "self_attends_per_block": 1,
    "heads": 2,
}
CAT_DOG_EEL = ("cat", "dog", "eel")


def made(seed: int, classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_model(model_config(MODEL), classes=classes)
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    return model


def saved(folder: Path, classes: tuple[str, ...] | None) -> tuple[str, torch.nn.Module]:
    """Write weights as a run does; without classes as an earlier version did."""
    model, metadata = made(0), {"model": json.dumps(MODEL)}
    if classes:
        metadata["classes"] = json.dumps(classes)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", metadata)
    return str(folder / "model.safetensors"), model


def head(model: torch.nn.Module) -> torch.Tensor:
    return model.get_parameter("head.weight")


def test_the_same_classes_keep_the_head(tmp_path: Path) -> None:
    place, old = saved(tmp_path, CAT_DOG_EEL)
    new = made(1)
    start = load_weights(new, open_weights(place), CAT_DOG_EEL)
    assert not start.fresh and not start.remark and torch.equal(head(new), head(old))


def test_other_names_of_the_same_number_get_a_new_head(tmp_path: Path) -> None:
    place, old = saved(tmp_path, CAT_DOG_EEL)
    new, first = made(1), made(1)
    start = load_weights(new, open_weights(place), ("ant", "bee", "fly"))
    assert start.fresh == ("head.weight", "head.bias") and torch.equal(head(new), head(first))
    assert torch.equal(new.get_parameter("latents"), old.get_parameter("latents"))
    assert "cat, dog, eel" in start.describe(place) and "ant, bee, fly" in start.describe(place)


def test_the_same_names_in_another_order_are_reordered(tmp_path: Path) -> None:
    place, old = saved(tmp_path, CAT_DOG_EEL)
    new = made(1)
    start = load_weights(new, open_weights(place), ("eel", "cat", "dog"))
    assert torch.equal(head(new), head(old)[[2, 0, 1]]) and "reordered" in start.describe(place)


def test_unknown_names_are_said(tmp_path: Path) -> None:
    place, old = saved(tmp_path, None)
    new = made(1)
    start = load_weights(new, open_weights(place), CAT_DOG_EEL)
    assert torch.equal(head(new), head(old)) and "unknown" in start.describe(place)
    assert not plan_weights(made(1, classes=4), open_weights(place), ("a", "b", "c", "d")).remark


def test_the_names_of_a_run_are_those_of_its_folder(tmp_path: Path) -> None:
    place, _ = saved(tmp_path, None)
    data = {"name": "a", "licence": "b", "source": "c", "classes": CAT_DOG_EEL}
    (tmp_path / "run.json").write_text(json.dumps({"data": data}))
    assert plan_weights(made(1), open_weights(place), ("ant", "bee", "fly")).fresh


@pytest.mark.parametrize("text", ["{}", "[1]", "nothing"])
def test_damaged_names_are_refused(tmp_path: Path, text: str) -> None:
    metadata = {"model": json.dumps(MODEL), "classes": text}
    safetensors.torch.save_file(made(0).state_dict(), tmp_path / "model.safetensors", metadata)
    with pytest.raises(UserError, match="classes"):
        open_weights(str(tmp_path))


def test_weights_know_their_step_while_the_run_trains_on(tmp_path: Path) -> None:
    """run.json may be of a longer training that was stopped."""
    facts = {"step": 10, "evaluation": {"accuracy": 0.9}}
    metadata = {"model": json.dumps(MODEL), "facts": json.dumps(facts)}
    safetensors.torch.save_file(made(0).state_dict(), tmp_path / "model.safetensors", metadata)
    (tmp_path / "run.json").write_text(json.dumps({"status": "stopped", "step": 15, "evaluation": None}))
    assert open_weights(str(tmp_path)).facts == {"status": "stopped", **facts}
