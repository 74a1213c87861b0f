"""A recipe: the YAML file that names data, model, task and training; typed, with dotted overrides."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from cluster.recipe.file import read_tree
from cluster.recipe.resources import ClusterConfig
from perceiver.config import Config, UserError
from perceiver.factory import ModelConfig
from perceiver.optim.config import OptimConfig
from perceiver.tasks import TaskConfig
from perceiver.tracking.runs import TrackingConfig
from perceiver.train.engine.deepspeed_config import DeepSpeedConfig, read_config
from perceiver.train.loop import TrainConfig
from pipelines.feed.ingest import DataConfig


class Recipe(Config):
    """Everything that a run depends on. Each section stands beside the code that it configures."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run folders are named after it")
    seed: int = Field(
        default=0, ge=0, description="seed of the initial weights, the sample order and the augmentations"
    )
    output: str = Field(default="runs", description="folder or fsspec URL below which each run gets a folder")
    data: DataConfig = Field(description="the prepared data and its augmentation")
    model: ModelConfig = Field(description="the model")
    task: TaskConfig = Field(description="targets, loss and metrics")
    optim: OptimConfig = Field(description="optimizer and learning-rate schedule")
    train: TrainConfig = Field(description="length, batch, evaluation and checkpoints")
    deepspeed: DeepSpeedConfig = Field(default=DeepSpeedConfig(), description="ZeRO stage and other settings")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="workers and their resources")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="MLflow")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides such as ``optim.lr=2e-3``.

    Raises:
        UserError: no such file, broken YAML, an unknown key (with the nearest name), a wrong type or value.
    """
    return build_recipe(read_tree(path, overrides), source=str(path))


def build_recipe(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a tree of settings.

    Raises:
        UserError: one line that names the key, what was got and what was wanted.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def for_workers(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's tree that means the same in any folder: absolute paths, the DeepSpeed JSON inlined."""
    tree = recipe.model_dump(mode="json")
    tree["output"] = absolute(recipe.output)
    for place in (tree["data"], *tree["data"]["mixture"]):
        place["url"] = absolute(place["url"])
    if recipe.train.init_from:
        tree["train"]["init_from"] = absolute(recipe.train.init_from)
    tree["deepspeed"]["config"] = read_config(recipe.deepspeed) or None
    return tree


def absolute(url: str) -> str:
    """Return a local path as an absolute one, a URL as it is."""
    return url if "://" in url else str(Path(url).resolve())


def kind_of(section: Config | None) -> str:
    """Return the ``kind`` of a section that is one of several."""
    return str(getattr(section, "kind", ""))


def zero_stage(recipe: Recipe) -> int:
    """Return the ZeRO stage that a recipe comes to: its own key, else its DeepSpeed JSON's, else 1."""
    given = read_config(recipe.deepspeed).get("zero_optimization", {}).get("stage", "auto")
    if recipe.deepspeed.zero_stage is not None:
        return recipe.deepspeed.zero_stage
    return 1 if given == "auto" else int(given)


def eval_rows(recipe: Recipe, world: int) -> int:
    """Return the samples of one forward pass of an evaluation by ``world`` workers: as many clips as in training."""
    return recipe.data.clip.eval_rows(recipe.train.micro(world))


def _explain(error: ValidationError) -> str:
    """Turn pydantic's list into one line about the first mistake, with a count of the others."""
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in _key_path(first["loc"]))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return _unknown_key(key) + more
    if first["type"] == "missing":
        return f"the key {key} is missing{more}"
    if first["type"] == "union_tag_not_found":
        return f"the key {key}.kind is missing{more}"
    if first["type"] == "value_error":
        reason = first["msg"].removeprefix("Value error, ")
        return reason + (f" (at {key})" if key else "") + more
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"


def _unknown_key(key: str) -> str:
    known = list(_known_keys(Recipe))
    if key in known:
        return f"the key {key} does not go with the chosen kind or preset: leave it out"
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1] for k in known], 1)
        near = [k for k in known if near and k.rsplit(".", 1)[-1] == near[0]][:1]
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")


def _key_path(location: Sequence[int | str]) -> Iterator[int | str]:
    """Drop from an error's location the tags of unions, which are no keys of the file."""
    node: Any = Recipe
    for part in location:
        variants = _variants(node)
        tags = {_tag(variant) for variant in variants}
        if len(variants) > 1 and part in tags:
            node = next(v for v in variants if _tag(v) == part)
            continue
        if any(part == v.__name__ for v in variants):
            continue
        yield part
        fields = {name: f for v in variants for name, f in v.model_fields.items()}
        node = fields[str(part)].annotation if str(part) in fields else None


def _known_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield each dotted key that a section type knows."""
    for variant in _variants(node):
        for name, field in variant.model_fields.items():
            yield prefix + name
            yield from _known_keys(field.annotation, f"{prefix}{name}.")


def _variants(node: Any) -> list[type[BaseModel]]:
    """Return the configuration classes that an annotation admits."""
    if isinstance(node, type) and issubclass(node, BaseModel):
        return [node]
    if typing.get_origin(node) in (typing.Union, types.UnionType, typing.Annotated):
        return [variant for part in typing.get_args(node) for variant in _variants(part)]
    return []


def _tag(variant: type[BaseModel]) -> Any:
    kind = variant.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind and typing.get_args(kind.annotation) else variant.__name__
