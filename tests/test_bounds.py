"""Every numeric key of a file that a user writes has a lower and an upper bound in its type."""

import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from cluster.capacity.calibrate import Calibration
from cluster.deploy.settings import Settings
from cluster.recipe.config import Recipe
from cluster.runtime.hardware import Hardware
from cluster.runtime.local_cluster import NodesConfig
from perceiver import registry
from perceiver.config import Config
from pipelines.prepare import PrepareConfig
from tune.config import SearchConfig
from tune.tables.config import TableConfig

FILES = (Recipe, SearchConfig, TableConfig, Settings, NodesConfig, Hardware, Calibration, PrepareConfig)
IMPOSSIBLE = (math.nan, math.inf, -math.inf, 1e30, -1e30, 10**30, -(10**30), 1 << 64)


def configs(node: Any, found: dict[type[BaseModel], None]) -> dict[type[BaseModel], None]:
    """Collect the configuration classes of a type, those of its fields included."""
    if isinstance(node, type) and issubclass(node, BaseModel) and node not in found:
        found[node] = None
        for field in node.model_fields.values():
            configs(field.annotation, found)
    for part in typing.get_args(node):
        configs(part, found)
    return found


def numbers(node: Any, bounds: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield each number in a type, with its bounds."""
    if typing.get_origin(node) is Annotated:
        inner, *more = typing.get_args(node)
        yield from numbers(inner, (*bounds, *more))
    elif node in (int, float):
        yield Annotated[(node, *bounds)] if bounds else node
    elif typing.get_origin(node) in (typing.Union, types.UnionType):
        for part in typing.get_args(node):
            yield from numbers(part, bounds)
    else:
        for part in typing.get_args(node):
            yield from numbers(part)


def keys() -> list[tuple[str, Any]]:
    modalities = registry.members("perceiver.modalities").values()
    found: dict[type[BaseModel], None] = {}
    for node in (*FILES, *modalities):
        configs(node, found)
    return [
        (f"{config.__name__}.{name}", number)
        for config in found
        if issubclass(config, Config)
        for name, field in config.model_fields.items()
        for number in numbers(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)
    ]


def test_all_numeric_keys_are_found() -> None:
    names = {name for name, _ in keys()}
    assert {"Recipe.seed", "OptimConfig.betas", "ImageConfig.std", "MixturePart.weight", "Uniform.low"} <= names
    assert len(names) > 200


@pytest.mark.parametrize("value", IMPOSSIBLE, ids=str)
def test_no_numeric_key_accepts_an_impossible_value(value: float) -> None:
    accepting = []
    for name, number in keys():
        try:
            TypeAdapter(number).validate_python(value)
        except ValidationError:
            continue
        accepting.append(name)
    assert not accepting


class _Numbers(Config):
    pair: tuple[float, float] = (0.0, 1.0)
    rows: tuple[tuple[int, ...], ...] = ()
    named: dict[str, float] | None = None
    either: bool | int = 0
    flags: tuple[bool, ...] = ()


@pytest.mark.parametrize("tree", [{"pair": [True, 1]}, {"rows": [[1], [False]]}, {"named": {"a": True}}])
def test_true_and_false_are_no_numbers_in_lists_and_sections(tree: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(tree))} has (true|false), wanted a number"):
        _Numbers.model_validate(tree)


def test_true_and_false_stay_where_they_are_wanted() -> None:
    found = _Numbers.model_validate({"either": True, "flags": [True, False], "pair": [0, 1]})
    assert found.either is True and found.flags == (True, False)


def test_bounds_are_in_the_schema() -> None:
    schema = Recipe.model_json_schema()
    lr = schema["$defs"]["OptimConfig"]["properties"]["lr"]
    assert lr["exclusiveMinimum"] == 0 and lr["maximum"] == 1e6
