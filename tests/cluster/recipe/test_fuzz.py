"""Recipes are untrusted: any change of a valid one is accepted, or refused in one line before a worker starts."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.recipe.config import Recipe, build_recipe, load_recipe
from cluster.recipe.file import known_keys
from cluster.recipe.preflight import check
from cluster.record.run_folder import choose_run
from perceiver.config import UserError
from perceiver.yaml_reader import parse_yaml
from tests.cluster.recipes import prepare_images, small_tree

SHIPPED = [load_recipe(path).model_dump(mode="json") for path in sorted(Path("recipes/train").glob("*.yaml"))]
FUZZ = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, 16, 100, 1000, 10**6, 1 << 24, 10**9, (1 << 63) - 1, 1 << 64, 10**30, -1, -(10**30)]
    + [0.1, 0.5, 0.999, 1e-300, 1e-12, 1e-6, 1e30, math.inf, -math.inf, math.nan, -0.5]
)
TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            "x",
            "auto",
            "none",
            "/",
            "..",
            "train",
            "plain",
            "inline",
            "a" * 5000,
            "%s{0}",
            "$HOME",
            "env:X",
            "\n\x1b[31m",
        ]
        + ["s3://", "zip://", "nope://x", "memory://x", "http://[", "http://u:p/w@h:port/", "sqlite:///", "a\0b"]
    ),
    st.text(max_size=20),
)
NESTED = st.recursive(
    st.one_of(NUMBERS, TEXTS, st.booleans(), st.none()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "preset", "a"]), inner, max_size=2)
    ),
    max_leaves=6,
)


def similar(value: Any) -> st.SearchStrategy[Any]:
    """Return values of the type of a value, most of them unusual."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return NUMBERS
    if isinstance(value, str):
        return TEXTS
    if isinstance(value, list):
        return st.lists(NUMBERS, max_size=4)
    return st.one_of(NUMBERS, TEXTS, st.lists(NUMBERS, max_size=3))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@st.composite
def changes(draw: st.DrawFn, tree: dict[str, Any]) -> dict[str, Any]:
    """Draw new values of one to three keys of a recipe: of their type or any, also of unknown keys."""
    own, every = dict(leaves(tree)), sorted(known_keys(Recipe))
    changed = {}
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(own)) if draw(st.integers(0, 4)) else st.sampled_from(every))
        changed[key] = draw(similar(own[key]) if key in own and draw(st.integers(0, 3)) else NESTED)
    return changed


def changed(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    for key, value in values.items():
        node, (*parents, leaf) = tree, key.split(".")
        for name in parents:
            node[name] = node[name] if isinstance(node.get(name), dict) else {}
            node = node[name]
        node[leaf] = value
    return tree


def one_line(error: UserError) -> bool:
    return str(error).isprintable() and len(str(error)) < 2000


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)  # a changed `output` may be a relative path, whose folder is made
        yield build_recipe(small_tree(folder, prepare_images(folder))).model_dump(mode="json")


@settings(FUZZ, max_examples=150)
@given(data=st.data())
def test_a_changed_recipe_passes_all_checks_or_is_refused_in_one_line(resolved: dict[str, Any], data: Any) -> None:
    values = data.draw(changes(resolved))
    values.pop("cluster.address", None)  # asks a server
    try:
        recipe = build_recipe(changed(resolved, values))
        check(recipe, choose_run(recipe.output, recipe.name, False, None), False)
    except UserError as error:
        assert one_line(error), error


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_a_refused_value_is_named(data: Any) -> None:
    tree = data.draw(st.sampled_from(SHIPPED))
    key, value = data.draw(st.sampled_from(sorted(leaves(tree), key=lambda leaf: leaf[0])))
    new = data.draw(st.one_of(similar(value), NESTED))
    try:
        build_recipe(changed(tree, {key: new}))
    except UserError as error:
        assert one_line(error), error
        section, _, leaf = key.rpartition(".")
        assert leaf in str(error) or section in str(error), error


@settings(FUZZ, max_examples=300)
@given(
    text=st.one_of(
        st.text(alphabet="ab:{}[],&*!<?|>-'\"#% \n\t0159.~=@\\", max_size=60),
        st.binary(max_size=40),
        st.text(max_size=40),
    )
)
def test_any_text_is_read_or_refused_in_one_line(text: str | bytes) -> None:
    try:
        parse_yaml(text, "f.yaml")
    except UserError as error:
        assert one_line(error), error
