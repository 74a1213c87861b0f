"""The learning rates and weight decays of groups of parameters; the engines' tests train with them."""

from typing import Any

import pytest
import torch

from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from perceiver.optim.config import OptimConfig, build_optimizer
from perceiver.train.engine.protocol import set_learning_rate

IMAGE = {"kind": "image", "size": [8, 8], "positions": {"kind": "learned", "channels": 4}}
SMALL = {"inputs": IMAGE, "latents": 4, "latent_channels": 8, "heads": 2, "self_attends_per_block": 2}


def factors(model: torch.nn.Module, **optim: Any) -> dict[str, tuple[float, float]]:
    """Return the learning rate of a step at half the peak and the weight decay of each parameter, by its name."""
    optimizer = build_optimizer(OptimConfig.model_validate({"lr": 2.0, "weight_decay": 0.1, **optim}), model)
    set_learning_rate(optimizer, 1.0)
    names = {id(param): name for name, param in model.named_parameters()}
    found = {
        names[id(param)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for param in group["params"]
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    return found


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "lamb"])
def test_a_group_has_its_own_rate_and_decay_and_biases_have_none(kind: str) -> None:
    model = build_model(model_config({"kind": "perceiver", **SMALL}), classes=3)
    found = factors(model, kind=kind, groups=[{"match": "head.*", "lr_factor": 4, "weight_decay": 0.5}])
    assert found["head.weight"] == (4.0, 0.5) and found["head.bias"] == (4.0, 0.0)
    rest = {values for name, values in found.items() if not name.startswith("head.")}
    assert rest == {(1.0, 0.1), (1.0, 0.0)} and found["latents"] == (1.0, 0.1)


@pytest.mark.parametrize(
    ("values", "order"),
    [
        (
            {"kind": "perceiver", "cross_attends": 3, "share": "paper"},
            ["latents inputs", "cross_attends.0", "blocks.0.0", "blocks.0.1", "cross_attends.1", "head"],
        ),
        (
            {"kind": "perceiver", "cross_attends": 2, "share": "none"},
            ["latents inputs", "cross_attends.0", "blocks.0.0", "blocks.0.1"]
            + ["cross_attends.1", "blocks.1.0", "blocks.1.1", "head"],
        ),
        (
            {"kind": "perceiver_io", "blocks": 4},
            ["latents inputs", "encoder", "blocks.0.0", "blocks.0.1", "decoder answer"],
        ),
    ],
)
def test_layer_decay_counts_layers_from_the_head(values: dict[str, Any], order: list[str]) -> None:
    """A layer is a cross-attend or a self-attend; shared weights count where they are first applied."""
    model = build_model(model_config({**SMALL, **values}), classes=3)
    found = factors(model, layer_decay=0.5)
    assert {name: rate for name, (rate, _) in found.items()} == {
        name: 0.5 ** (len(order) - 1 - depth)
        for name, _ in model.named_parameters()
        for depth, prefixes in enumerate(order)
        if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes.split())
    }


def test_layer_decay_multiplies_with_the_factor_of_a_group() -> None:
    model = build_model(model_config({"kind": "perceiver_io", **SMALL}), classes=3)
    found = factors(model, layer_decay=0.5, groups=[{"match": "latents", "lr_factor": 10}])
    assert found["latents"][0] == 10 * 0.5**4


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({"kind": "vit", "layers": 2, "heads": 2, "width": 8, "patch": 4, "inputs": IMAGE}, 2),
        ({"kind": "resnet", "inputs": IMAGE}, 16),
        ({"kind": "transformer", "layers": 3, "width": 8, "heads": 2, "inputs": IMAGE}, 3),
        ({"kind": "pointnet2", "inputs": {"kind": "points"}}, 3),
    ],
)
def test_layers_of_the_baselines(values: dict[str, Any], layers: int) -> None:
    with torch.device("meta"):
        model = build_model(model_config(values), classes=3)
    names = model.layer_names()  # type: ignore[operator]
    assert len(names) == layers and all(list(model.get_submodule(name).parameters()) for name in names)
    rates = {rate for rate, _ in factors(model, layer_decay=0.5).values()}
    assert {0.5**power for power in range(layers + 1)} <= rates


def test_layer_decay_of_a_model_without_named_layers_is_refused() -> None:
    with pytest.raises(UserError, match="optim.layer_decay = 0.7.*Linear.*optim.groups"):
        build_optimizer(OptimConfig(layer_decay=0.7), torch.nn.Linear(2, 2))
