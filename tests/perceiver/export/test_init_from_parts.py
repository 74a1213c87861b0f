"""`train.init_from` of parts: each from weights of its own, and one clear error if they are others."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from cluster.recipe.config import build_recipe, for_workers
from cluster.recipe.preflight import describe_start
from cluster.run.worker import first_model
from perceiver.config import UserError
from perceiver.export.parts import load_parts, plan_parts
from perceiver.factory import build_model, model_config

MEL = {"kind": "mel", "samples": 1600, "rate": 16_000, "window": 64, "hop": 32, "bins": 8, "layout": "grid"}
MODEL: dict[str, Any] = {
    "kind": "segment_pool",
    "inputs": {**MEL, "positions": {"kind": "none"}},
    "front": {"frames": 10, "widths": [4], "depths": [1], "hidden": [6], "channels": 5},
    "widths": [7, 7],
}
CLASSES = ("cat", "dog")


def made(seed: int, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(model_config({**MODEL, **changes}), classes=2)


def saved(path: Path, model: torch.nn.Module, values: dict[str, Any] | None = None) -> str:
    metadata = {"model": json.dumps(values or MODEL), "classes": json.dumps(CLASSES)}
    safetensors.torch.save_file(model.state_dict(), path, metadata)
    return str(path)


def test_each_part_is_that_of_its_weights(tmp_path: Path) -> None:
    first, second, new, untouched = made(0), made(1), made(2), made(2)
    alone = saved(tmp_path / "b.safetensors", second.get_submodule("layers"))
    load_parts(new, {"front": saved(tmp_path / "a.safetensors", first), "layers": alone}, CLASSES)
    for name, tensor in new.state_dict().items():
        origin = {"front": first, "layers": second}.get(name.split(".")[0], untouched)
        assert torch.equal(tensor, origin.state_dict()[name]), name


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"back": "a"}, r"train\.init_from\.back: .*no part 'back'; wanted one as front, layers"),
        ({"front": "a", "front.linear": "a"}, r"train\.init_from: got front and front\.linear"),
        ({"front": "wide"}, r"train\.init_from\.front: .*wide.* has linear\.2\.weight of shape \[9, 6\].*\[5, 6\]"),
        ({"front": "half"}, r"train\.init_from\.front: .*half.* lacks linear\.2\.weight"),
        ({"pools": "max"}, r"train\.init_from\.pools: .*max.* lacks 0\.says\.weight"),
        ({"front": "none"}, r"none: got nothing"),
    ],
)
def test_weights_of_another_part_are_refused(tmp_path: Path, places: dict[str, str], message: str) -> None:
    front = {**MODEL["front"], "channels": 9}
    saved(tmp_path / "a", made(0))
    saved(tmp_path / "wide", made(0, front=front))
    saved(tmp_path / "max", made(0, pool="max"))
    state = {name: tensor for name, tensor in made(0).state_dict().items() if not name.startswith("front.linear.2")}
    safetensors.torch.save_file(state, tmp_path / "half")
    with torch.device("meta"):
        model = made(1)
    with pytest.raises(UserError, match=message):
        plan_parts(model, {part: str(tmp_path / name) for part, name in places.items()}, CLASSES)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(made(0).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt"):
        plan_parts(made(1), {"front": str(tmp_path / "weights.pt")})


def test_workers_get_absolute_paths() -> None:
    start = {"front": "runs/a", "layers": "s3://bucket/b"}
    sections = {
        "data": {"url": "x"},
        "task": {"kind": "tagging"},
        "optim": {},
        "train": {"steps": 1, "init_from": start},
    }
    recipe = build_recipe({"name": "r", "model": MODEL, **sections})
    assert recipe.train.initial_places() == {f"train.init_from.{part}": place for part, place in start.items()}
    found = for_workers(recipe)["train"]["init_from"]
    assert found == {"front": str(Path("runs/a").resolve()), "layers": "s3://bucket/b"}


def test_a_run_starts_from_its_parts_or_is_refused_before_a_worker_starts(tmp_path: Path) -> None:
    old = made(0)
    places = {"front": saved(tmp_path / "a.safetensors", old), "layers": str(tmp_path / "a.safetensors")}
    sections = {"data": {"url": "x"}, "task": {"kind": "tagging"}, "optim": {}}
    tree = {"name": "r", "model": MODEL, **sections, "train": {"steps": 1, "init_from": places}}
    model, untouched = first_model(build_recipe(tree), 2, CLASSES), first_model(build_recipe(tree), 2, restored=True)
    for name, tensor in model.state_dict().items():
        origin = old if name.startswith(("front.", "layers.")) else untouched
        assert torch.equal(tensor, origin.state_dict()[name]), name
    data: Any = SimpleNamespace(classes=CLASSES)
    line = describe_start(build_recipe(tree), data)
    assert "front starts from 6 tensors" in line and "layers starts from 4 tensors" in line
    places["pools"] = saved(tmp_path / "b.safetensors", made(0, pool="max"))
    with pytest.raises(UserError, match=r"train\.init_from\.pools"):
        describe_start(build_recipe(tree), data)
