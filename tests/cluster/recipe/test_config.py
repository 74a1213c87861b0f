"""Recipes: types, overrides, and one-line errors that name the key."""

from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.config import absolute, build_recipe, for_workers, load_recipe, zero_stage
from cluster.recipe.file import read_tree
from perceiver.config import UserError
from perceiver.storage import cache_folder
from perceiver.tracking.redaction import resolve
from tests.cluster.recipes import write_recipe


def refused(tmp_path: Path, tree: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(write_recipe(tmp_path, tree), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_are_typed(tmp_path: Path, tree: dict[str, Any]) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tree), ["optim.lr=2e-3", "train.epochs=3", "data.augment.shift=1"])
    assert recipe.optim.lr == 2e-3
    assert recipe.train.epochs == 3
    assert recipe.data.augment.shift == 1


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("optimm.lr=1", "unknown key optimm; did you mean optim?"),
        ("model.latent=8", "unknown key model.latent; did you mean model.latents?"),
        ("model.inputs.chanels=1", "unknown key model.inputs.chanels; did you mean model.inputs.channels?"),
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, tree: dict[str, Any], override: str, wanted: str) -> None:
    assert wanted in refused(tmp_path, tree, override)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochs=three", ["train.epochs = 'three'", "number"]),
        ("train.global_batch=1.5", ["train.global_batch = 1.5", "integer"]),
        ("train.global_batch=-8", ["train.global_batch = -8", "greater than 0"]),
        ("cluster.workers=[1, 2]", ["cluster.workers = [1, 2]", "integer"]),
        ("model.kind=transformer9", ["model", "transformer9"]),
        ("name=../x", ["name = '../x'"]),
        ("train.compile=7", [": train.compile = 7: ", "boolean", "or input should be 'auto'"]),
        ("train.checkpoint_every=often", [": train.checkpoint_every = 'often': ", "number", "'auto'"]),
        ("data.mixture=[{url: 3}]", ["data.mixture.0.url = 3: "]),
        ("train.steps=5", ["train.epochs", "train.steps"]),
        ("optim.schedule.kind=cosin", ["optim.schedule", "cosin"]),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, tree: dict[str, Any], override: str, parts: list[str]) -> None:
    message = refused(tmp_path, tree, override)
    assert all(part in message for part in parts), message


def test_a_missing_section_is_named(tmp_path: Path, tree: dict[str, Any]) -> None:
    del tree["model"]
    assert "key model " in refused(tmp_path, tree)


@pytest.mark.parametrize(
    ("override", "part"),
    [("optim.lr", "'optim.lr'"), ("name.x=1", "'name.x=1'"), ("a={", "override of a:")],
)
def test_a_malformed_override_is_named(tmp_path: Path, tree: dict[str, Any], override: str, part: str) -> None:
    assert part in refused(tmp_path, tree, override)


def test_a_missing_file_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"quickstrt.yaml.* recipes/train/quickstart.yaml"):
        read_tree("recipes/train/quickstrt.yaml")


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [1", "broken.yaml, line 1: .*YAML"), ("- 1", "broken.yaml .*list.*mapping"), ("", "broken.yaml is empty")],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=part):
        read_tree(path)


def test_yaml_cannot_name_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="evil.yaml"):
        read_tree(path)


@pytest.mark.parametrize("path", sorted(Path("recipes/train").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name


def test_workers_get_absolute_paths_and_the_deepspeed_json(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 2}}')
    tree["deepspeed"] = {"config": str(config)}
    tree["output"] = "runs"
    recipe = build_recipe(tree)
    sent = for_workers(recipe)
    assert Path(sent["output"]).is_absolute()
    assert sent["deepspeed"]["config"] == {"zero_optimization": {"stage": 2}}
    assert zero_stage(recipe) == zero_stage(build_recipe(sent)) == 2


def test_a_leading_tilde_is_the_home_folder_in_every_path(
    tree: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec expands it and pathlib does not: a run would have two folders."""
    tree |= {"output": "~/runs", "deepspeed": {"config": "~/ds.json"}}
    tree["data"] |= {"url": "~/data", "files": ["~/files"], "mixture": [{"url": "~/more", "weight": 1}]}
    tree["train"]["init_from"] = "~/weights"
    tree["tracking"] = {"uri": "sqlite:///~/mlflow.db", "artifact_root": "~/artifacts"}
    recipe = build_recipe(tree)
    assert recipe.output == f"{home}/runs" and recipe.data.url == f"{home}/data"
    assert recipe.data.files == (f"{home}/files",) and recipe.data.mixture[0].url == f"{home}/more"
    assert recipe.train.init_from == f"{home}/weights" and recipe.tracking.artifact_root == f"{home}/artifacts"
    assert recipe.deepspeed.config == f"{home}/ds.json"
    assert recipe.tracking.store_uri(home) == f"sqlite:///{home}/mlflow.db"
    (home / "secret").write_text("x")
    assert resolve("file:~/secret") == "x"
    monkeypatch.setenv("PERCEIVER_CACHE", "~/cache")
    assert cache_folder("a") == home / "cache" / "a"
    assert absolute(f"file://{home}/x") == absolute(f"{home}/x") == f"{home}/x"


def test_what_is_no_home_folder_stays(tree: dict[str, Any]) -> None:
    for place in ("./~/runs", "s3://bucket/~x", "runs~"):
        assert build_recipe({**tree, "output": place}).output == place
