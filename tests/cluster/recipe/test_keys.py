"""The list of keys, the page of them, and the JSON schema that editors use."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from cluster.recipe.keys import markdown, recipe_keys, recipe_schema
from perceiver.cli import cli

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes" / "train").glob("*.yaml"))


def test_the_page_of_keys_is_up_to_date() -> None:
    """`perceiver keys --markdown > docs/keys.md` makes it."""
    assert (ROOT / "docs" / "keys.md").read_text() == markdown()


def test_keys_have_type_default_range_and_meaning() -> None:
    keys = {key.name: key for key in recipe_keys()}
    assert keys["optim.lr"].type == "number > 0 <= 1000000" and keys["optim.lr"].default == "0.001"
    assert keys["data.mixture.*.weight"].default == "" and keys["optim.schedule.kind"].default == '"constant"'
    assert [key.name for key in recipe_keys() if not key.description and not key.name.endswith("kind")] == []
    gamma = next(key for key in recipe_keys("optim.schedule") if key.name.endswith("gamma"))
    assert gamma.where == ("optim.schedule.kind=step",)


def test_every_leaf_of_every_recipe_is_a_key() -> None:
    known = {key.name for key in recipe_keys()}
    for path in RECIPES:
        tree = yaml.safe_load(path.read_text())
        for section, value in tree.items():
            for name in value if isinstance(value, dict) else ():
                full = f"{section}.{name}"
                assert name == "preset" or any(key == full or key.startswith(f"{full}.") for key in known), (path, full)


def numbers(node: Any) -> Any:
    """Return a tree with texts such as `3e-3` as numbers, which they are for editors (YAML 1.2)."""
    if isinstance(node, dict):
        return {key: numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [numbers(value) for value in node]
    return float(node) if isinstance(node, str) and re.fullmatch(r"[\d.]+e[+-]?\d+", node) else node


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_recipes_and_refuses_mistakes(path: Path) -> None:
    tree = numbers(yaml.safe_load(path.read_text()))
    check = jsonschema.Draft202012Validator(recipe_schema())
    assert [error.message for error in check.iter_errors(tree)] == []
    assert list(check.iter_errors({**tree, "optim": {**tree["optim"], "learning_rate": 1}}))
    assert list(check.iter_errors({**tree, "model": {"preset": "no_such_preset"}}))


def test_the_commands() -> None:
    shown = CliRunner().invoke(cli, ["keys", "optim.schedule"], standalone_mode=False)
    assert "optim.schedule.milestones  (list of number" in shown.output and "[optim.schedule.kind=step]" in shown.output
    rows = CliRunner().invoke(cli, ["keys", "seed", "--json"], standalone_mode=False).output.splitlines()
    assert [json.loads(row)["name"] for row in rows] == ["seed"]
    assert json.loads(CliRunner().invoke(cli, ["schema"], standalone_mode=False).output)["title"] == "Recipe"
    printed = CliRunner().invoke(cli, ["models", "perceiver_modelnet40", "--recipe"], standalone_mode=False).output
    assert yaml.safe_load(printed)["model"]["inputs"]["kind"] == "points"
    assert "no section or key 'optin'" in str(CliRunner().invoke(cli, ["keys", "optin"]).exception)
