"""A recipe: the typed configuration of a run, read from a YAML file with dotted overrides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from cluster.recipe.file import explain, read_tree
from cluster.recipe.resources import ClusterConfig
from perceiver.config import Config, Location, Name, Seed, UserError
from perceiver.factory import ModelConfig
from perceiver.optim.config import OptimConfig
from perceiver.storage import absolute
from perceiver.tasks import TaskConfig
from perceiver.tracking.runs import TrackingConfig
from perceiver.train.config import TrainConfig
from perceiver.train.engine.deepspeed_config import DeepSpeedConfig, read_config
from perceiver.train.offered_hooks import HookConfig
from pipelines.feed.ingest import DataConfig


class Recipe(Config):
    """Everything that a run depends on. Each section is defined next to the code that it configures."""

    name: Name = Field(description="run folders are named after it")
    seed: Seed = Field(default=0, description="seed of the initial weights, the sample order and the augmentations")
    output: Location = Field(default="runs", description="folder or fsspec URL below which each run gets a folder")
    data: DataConfig = Field(description="the prepared data and its augmentation")
    model: ModelConfig = Field(description="the model")
    task: TaskConfig = Field(description="targets, loss and metrics")
    optim: OptimConfig = Field(description="optimizer and learning-rate schedule")
    train: TrainConfig = Field(description="length, batch, evaluation and checkpoints")
    deepspeed: DeepSpeedConfig = Field(default=DeepSpeedConfig(), description="ZeRO stage and other settings")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="workers and their resources")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="MLflow")
    hooks: tuple[HookConfig, ...] = Field(
        default=(), max_length=100, description="what installed packages do after each step, in this order"
    )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides such as ``optim.lr=2e-3``.

    Raises:
        UserError: no such file, broken YAML, an unknown key (with the nearest name), a wrong type or value.
    """
    return build_recipe(read_tree(path, overrides), source=str(path))


def build_recipe(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a tree of settings.

    Raises:
        UserError: the message names the key, the value and what was wanted.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Recipe)}") from None


def for_workers(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's tree independent of the current folder: absolute paths, the DeepSpeed JSON inlined."""
    tree = recipe.model_dump(mode="json")
    tree["output"] = absolute(recipe.output)
    for place in (tree["data"], *tree["data"]["mixture"]):
        place["url"] = absolute(place["url"])
    start = recipe.train.init_from
    if isinstance(start, dict):
        tree["train"]["init_from"] = {part: absolute(place) for part, place in start.items()}
    elif start:
        tree["train"]["init_from"] = absolute(start)
    reader: Any = getattr(recipe.model, "reader", None)
    if getattr(reader, "pieces_file", None):
        tree["model"]["reader"]["pieces_file"] = absolute(reader.pieces_file)
    tree["deepspeed"]["config"] = read_config(recipe.deepspeed) or None
    return tree


def kind_of(section: Config | None) -> str:
    """Return the ``kind`` of a section, empty if it has none."""
    return str(getattr(section, "kind", ""))


def zero_stage(recipe: Recipe) -> int:
    """Return the ZeRO stage of a recipe: its own key, otherwise the DeepSpeed JSON's, otherwise 1."""
    given = read_config(recipe.deepspeed).get("zero_optimization", {}).get("stage", "auto")
    if recipe.deepspeed.zero_stage is not None:
        return recipe.deepspeed.zero_stage
    return 1 if given == "auto" else int(given)


def eval_rows(recipe: Recipe, world: int) -> int:
    """Return the samples per forward pass of an evaluation by ``world`` workers: as many clips as in training."""
    return recipe.data.clip.eval_rows(recipe.train.micro(world))
