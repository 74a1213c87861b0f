"""`base:` in recipes, and recipes that come with the package."""

from pathlib import Path
from typing import Any

import pytest

from cluster.jobs import package
from cluster.jobs.config import Submission
from cluster.jobs.submit import training
from cluster.recipe.config import load_recipe
from cluster.recipe.file import base_files, packaged, packaged_recipes, read_tree
from cluster.recipe.keys import recipe_schema
from perceiver.config import UserError
from tests.cluster.recipes import write_recipe


def write(path: Path, text: str) -> Path:
    """Write a file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_recipe_changes_its_base(tmp_path: Path, tree: dict[str, Any]) -> None:
    base = load_recipe(write_recipe(tmp_path, tree))
    mine = write(tmp_path / "mine.yaml", "base: small.yaml\ntrain: {epochs: 7}\noptim: {kind: lamb, lr: 0.5}\n")
    recipe = load_recipe(mine, ["train.log_every=3"])
    assert (recipe.train.epochs, recipe.train.log_every, recipe.optim.kind, recipe.optim.lr) == (7, 3, "lamb", 0.5)
    assert recipe.train.global_batch == base.train.global_batch and recipe.model == base.model
    assert "base" not in recipe.model_dump()


def test_bases_have_bases_by_their_own_folder(tmp_path: Path) -> None:
    write(tmp_path / "sub/first.yaml", "a: {x: 1, y: 1}\nb: 1\n")
    write(tmp_path / "sub/second.yaml", "base: first.yaml\na: {x: 2}\n")
    third = write(tmp_path / "third.yaml", "base: sub/second.yaml\na: {z: 3}\nc: {}\n")
    assert read_tree(third, ["b=5"]) == {"a": {"x": 2, "y": 1, "z": 3}, "b": 5, "c": {}}
    assert [Path(file).name for file in base_files(third)] == ["second.yaml", "first.yaml"]


def test_an_empty_section_and_one_of_a_kind_replace_the_base(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "a: {x: 1}\nb: {kind: one, x: 1}\nc: {preset: p, x: 1}\n")
    mine = write(tmp_path / "mine.yaml", "base: base.yaml\na: {}\nb: {kind: two}\nc: {y: 2}\n")
    assert read_tree(mine) == {"a": {}, "b": {"kind": "two"}, "c": {"preset": "p", "x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ("mine.yaml", "mine.yaml -> .*mine.yaml is a cycle"),
        ("loop.yaml", "is a cycle"),
        ("gone.yaml", "no such file; wanted one in"),
        ("../other.yaml", "outside .*copy the file into it"),
        ("/etc/hosts.yaml", "outside"),
        ("link.yaml", "outside"),
        ("s3://bucket/a.yaml", "wanted the path of a .yaml file"),
        (".env", "wanted the path of a .yaml file"),
        ("3", "wanted the path of a .yaml file"),
        ("list.yaml", "list.yaml is a list, wanted a mapping"),
        ("a" * 300 + ".yaml", "base = aaa.* cannot be found"),
        ("self.yaml", "base = self.yaml cannot be found"),
    ],
)
def test_a_wrong_base_is_refused(tmp_path: Path, base: str, line: str) -> None:
    write(tmp_path / "other.yaml", "a: 1\n")
    mine = write(tmp_path / "folder/mine.yaml", f"base: {base}\n")
    write(tmp_path / "folder/loop.yaml", "base: mine.yaml\n")
    write(tmp_path / "folder/list.yaml", "[1]\n")
    (tmp_path / "folder/link.yaml").symlink_to(tmp_path / "other.yaml")
    (tmp_path / "folder/self.yaml").symlink_to("self.yaml")
    with pytest.raises(UserError, match=line) as error:
        read_tree(mine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("outside", [False, True])
def test_bases_travel_with_a_job(
    tmp_path: Path, tree: dict[str, Any], outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "recipes"
    place.mkdir()
    write_recipe(place, tree)
    mine = write(place / "mine.yaml", "base: small.yaml\ntrain: {epochs: 7}\n")
    here, target = tmp_path / "here" if outside else tmp_path, tmp_path / "package"
    here.mkdir(exist_ok=True)
    target.mkdir()
    monkeypatch.chdir(here)
    work = training(Submission(recipe=str(mine)))
    package.build_package(target, work.files)
    assert read_tree(target / package.path_in_package(str(mine))) == read_tree(mine)


def test_a_base_that_would_not_be_found_in_a_job_is_refused(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there/sub").mkdir(parents=True)
    write_recipe(tmp_path / "there/sub", tree)
    mine = write(tmp_path / "there/mine.yaml", "base: sub/small.yaml\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=f"another folder: submit from {tmp_path / 'there'}"):
        package.recipe_files(str(mine))


@pytest.mark.parametrize("base", ["link.yaml", "linked/small.yaml"])
def test_a_base_that_is_a_link_does_not_travel(
    tmp_path: Path, tree: dict[str, Any], base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    small = write_recipe(tmp_path / "sub", tree)
    (tmp_path / "link.yaml").symlink_to(small)
    (tmp_path / "linked").symlink_to("sub")
    mine = write(tmp_path / "mine.yaml", f"base: {base}\n")
    monkeypatch.chdir(tmp_path)
    assert read_tree(mine) == read_tree(small)
    with pytest.raises(UserError, match=f"{base} is a link to {small}: name that file"):
        package.recipe_files(str(mine))


def test_the_schema_knows_the_key() -> None:
    assert recipe_schema()["properties"]["base"]["type"] == "string"


def test_recipes_of_the_package_are_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "recipes/train/quickstart.yaml" in packaged_recipes()
    assert load_recipe("recipes/train/quickstart.yaml").name == "quickstart"
    with pytest.raises(UserError, match="did you mean recipes/train/quickstart.yaml"):
        read_tree("recipes/train/quickstrat.yaml")
    mine = write(tmp_path / "recipes/train/quickstart.yaml", "name: mine\n")
    assert packaged("recipes/train/quickstart.yaml").resolve() == mine.resolve()
    with pytest.raises(UserError, match="no recipe file"):
        read_tree("recipes/../recipes/train/imagenet_perceiver.yaml")
