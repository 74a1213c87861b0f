"""Presets in recipes, and the command that lists them."""

import json

import pytest
from click.testing import CliRunner

from cluster.recipe.config import build_recipe
from perceiver.cli import cli
from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from perceiver.presets import PRESETS, list_models


def recipe(model):
    sections = {"data": {"url": "x"}, "task": {"kind": "classification"}, "optim": {}, "train": {"epochs": 1}}
    return build_recipe({"name": "r", "model": model, **sections})


@pytest.mark.parametrize("name", list_models())
def test_every_preset_is_a_models_section(name):
    assert recipe({"preset": name}).model == model_config(PRESETS[name].model)


def test_overrides_are_merged_and_the_resolved_recipe_is_complete():
    made = recipe({"preset": "perceiver_digits", "latents": 5, "inputs": {"positions": {"bands": 3}}})
    tree = made.model_dump(mode="json")
    assert tree["model"]["latents"] == 5 and tree["model"]["kind"] == "perceiver" and "preset" not in tree["model"]
    assert tree["model"]["inputs"]["positions"] == {"kind": "fourier", "bands": 3, "max_resolution": [28.0, 28.0]}
    assert build_recipe(tree) == made
    assert build_model(made.model, classes=10).latents.shape == (5, 64)


def test_a_baseline_by_preset_with_other_inputs():
    made = recipe({"preset": "vit_b16_ff", "patch": 8, "inputs": {"size": [32, 32], "positions": {"kind": "none"}}})
    assert made.model.patch == 8 and made.model.inputs.positions.kind == "none"


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ({"preset": "perceiver_imagnet"}, "did you mean 'perceiver_imagenet'"),
        ({"preset": "resnet50", "latents": 3}, r"model\.latents"),
        ({"preset": "resnet50", "kind": "vit"}, r"model\.kind.*'vit'"),
        ({"preset": "perceiver_imagenet", "latentz": 3}, r"did you mean model\.latents"),
        ({"preset": "perceiver_imagenet", "latents": "many"}, r"model\.latents = 'many'"),
    ],
)
def test_mistakes_are_named(model, wanted):
    with pytest.raises(UserError, match=wanted):
        recipe(model)


def test_the_verb_lists_names_counts_and_sources():
    result = CliRunner().invoke(cli, ["models", "perceiver_[id]*1cross", "--flops", "--json"])
    (line,) = result.output.splitlines()
    row = json.loads(line)
    assert row["name"] == "perceiver_imagenet_1cross" and row["parameters"] == 42_135_859 and row["classes"] == 1000
    assert row["gflop"] == pytest.approx(404.3, rel=0.01) and "Table 6" in row["source"]
    result = CliRunner().invoke(cli, ["models", "perceiver_digits"])
    assert "106,188 parameters" in result.output
    assert isinstance(CliRunner().invoke(cli, ["models", "zzz"]).exception, UserError)
