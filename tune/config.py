"""The search file: base recipe, space, search and scheduler; typed, with dotted overrides."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.file import explain
from perceiver.config import Config, Count, CountOrZero, Epochs, Name, Probability, Real, UserError
from tune.space.space import Choice, GridChoice, Space, flatten_space, fulfilling, look_up, ordered, with_values

KEPT = 4
"""Checkpoints of a trial in a population: those of its evaluation and of its last step before a pause, of the round of
the exchange and of the next round, which it may have trained before another trial takes over its weights."""

MOST_TRIALS = 100_000
Mode = Literal["max", "min"]
PARAMETERS = "parameters"
"""The metric that does not come from evaluations: the number of the model's parameters."""


class NoScheduler(Config):
    """Every trial runs to its end (`kind: none`)."""

    kind: Literal["none"] = "none"


class Asha(Config):
    """Asynchronous successive halving: at each rung only the best share of the trials continues (`kind: asha`)."""

    kind: Literal["asha"]
    grace: Epochs = Field(default=1.0, description="epochs before a trial may be stopped: the first rung")
    reduction: Real = Field(
        default=3.0, gt=1, le=1e6, description="one in this many continues; each rung is this many times later"
    )

    def rungs(self, epochs: float) -> list[float]:
        """Return the epochs before the end at which trials are stopped."""
        found, rung = [], self.grace
        while rung < epochs:
            found.append(rung)
            rung *= self.reduction
        return found


class Median(Config):
    """Stop a trial whose best is worse than the median of the others' means (`kind: median`)."""

    kind: Literal["median"]
    grace: Epochs = Field(default=1.0, description="epochs before a trial may be stopped")
    min_trials: Count = Field(default=3, description="other trials that must have reached the same epoch")


class Pbt(Config):
    """Population based training: bad trials continue from good ones' weights with changed values (`kind: pbt`)."""

    kind: Literal["pbt"]
    interval: Epochs = Field(default=1.0, description="epochs between two exchanges; evaluations happen then")
    quantile: Real = Field(default=0.25, gt=0, le=0.5, description="share of the trials that take over and are taken")
    resample: Probability = Field(default=0.25, description="probability of a new value instead of a changed one")


class Pb2(Config):
    """PBT with values from a Gaussian process; ranges only (`kind: pb2`)."""

    kind: Literal["pb2"]
    interval: Epochs = Field(default=1.0, description="epochs between two exchanges; evaluations happen then")
    quantile: Real = Field(default=0.25, gt=0, le=0.5, description="share of the trials that take over and are taken")


class RandomSearch(Config):
    """Independent draws; trial i does not depend on the others (`kind: random`)."""

    kind: Literal["random"] = "random"


class GridSearch(Config):
    """Every combination of the space, which consists of grids (`kind: grid`)."""

    kind: Literal["grid"]


class OptunaSearch(Config):
    """Optuna's tree-structured Parzen estimator; several metrics give a Pareto front (`kind: optuna`)."""

    kind: Literal["optuna"]
    startup: CountOrZero = Field(default=5, description="random trials before it learns")


class SearchConfig(Config):
    """The content of a search file."""

    name: Name = Field(description="prefix of the search folders")
    recipe: str = Field(description="base recipe: a path from here or from the search file's folder, or sections")
    overrides: dict[str, Any] = Field(default={}, description="keys of the base recipe to change, nested or dotted")
    space: Space = Field(min_length=1, description="dimensions by dotted recipe key")
    metric: str | list[str] = Field(default="accuracy", description="metric of the evaluations, or `parameters`")
    mode: Mode | list[Mode] = Field(default="max", description="whether larger or smaller is better")
    trials: int = Field(default=10, ge=1, le=MOST_TRIALS, description="number of trials, including the baseline")
    baseline: bool | None = Field(
        default=None, description="trial 0 is the base recipe and is never stopped; default: not with pbt, pb2, grid"
    )
    scheduler: Annotated[NoScheduler | Asha | Median | Pbt | Pb2, Field(discriminator="kind")] = Field(
        default=NoScheduler(), description="which trials are stopped early or take over others' weights"
    )
    search: Annotated[RandomSearch | GridSearch | OptunaSearch, Field(discriminator="kind")] = Field(
        default=RandomSearch(), description="how values are chosen"
    )
    seed: int = Field(default=0, ge=0, le=1 << 31, description="seed of the draws; training has the recipe's seed")
    concurrency: Count | None = Field(default=None, description="trials at a time; default: as many as fit")
    max_failures: CountOrZero = Field(default=1, description="restarts of a trial that fails")

    @field_validator("space", mode="before")
    @classmethod
    def _flat(cls, tree: Any) -> Any:
        return dict(flatten_space(tree)) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _consistent(self) -> "SearchConfig":
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    @property
    def metrics(self) -> dict[str, Mode]:
        """Return each metric with its mode, the first one first."""
        names = [self.metric] if isinstance(self.metric, str) else self.metric
        modes: list[Mode] = [self.mode] * len(names) if isinstance(self.mode, str) else self.mode
        return dict(zip(names, modes, strict=True))

    @property
    def exchanges(self) -> bool:
        """Return whether trials take over each other's weights."""
        return isinstance(self.scheduler, Pbt | Pb2)

    @property
    def with_baseline(self) -> bool:
        """Return whether trial 0 is the base recipe."""
        return self.baseline if self.baseline is not None else not (self.exchanges or self.search.kind == "grid")


@dataclass(frozen=True)
class Search:
    """A search: its settings, and the tree of the base recipe with the overrides."""

    config: SearchConfig
    base: dict[str, Any]
    recipe: Recipe
    source: str

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """Return the base recipe's tree with defaults and presets filled in, for the conditions of the space."""
        return self.recipe.model_dump(mode="json")


def build_search(tree: Mapping[str, Any], base: Mapping[str, Any], where: str, source: str) -> Search:
    """Validate what `tune.search_file.read_search` returned.

    Args:
        tree: of the search file.
        base: tree of the base recipe with the overrides.
        where: the base recipe's file, for messages.
        source: the search file, for messages.

    Raises:
        UserError: the first mistake.
    """
    try:
        config = SearchConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, SearchConfig)}") from None
    if isinstance(config.scheduler, Pbt | Pb2):
        every = config.scheduler.interval
        base = with_values(base, {"train.eval_every": every, "train.checkpoint_every": every})
        kept = max(KEPT, build_recipe(base, source=where).train.keep_checkpoints)
        base = with_values(base, {"train.keep_checkpoints": kept})
    search = Search(config, dict(base), build_recipe(base, source=where), source)
    return replace(search, config=_typed(search))


def _typed(search: Search) -> SearchConfig:
    """Return the settings with each choice as the recipe's types spell it: [16, 16] becomes [16.0, 16.0].

    Otherwise the base recipe's value, which has these types, would not be recognised as one of the choices.

    Raises:
        UserError: conditions of the space wait for each other.
    """
    ordered(search.config.space)
    space = {
        key: dimension.model_copy(update={"values": _typed_values(search, key, dimension.values)})
        if isinstance(dimension, Choice)
        else dimension
        for key, dimension in search.config.space.items()
    }
    return search.config.model_copy(update={"space": space})


def _typed_values(search: Search, key: str, values: list[Any]) -> list[Any]:
    """Return the different values of a key in the recipe's types; sections, and what a recipe refuses, as they are."""
    condition, found = fulfilling(search.config.space, search.resolved, key), {}
    for value in values:
        if not isinstance(value, Mapping | None):
            with contextlib.suppress(UserError):
                tree = build_recipe(with_values(search.base, {**condition, key: value})).model_dump(mode="json")
                typed = look_up(tree, key)
                value = value if typed is None else typed
        found[json.dumps(value, sort_keys=True, default=str)] = value
    return list(found.values())


def _problems(config: SearchConfig) -> list[str]:
    """Return the contradictions in a search."""
    names = [config.metric] if isinstance(config.metric, str) else config.metric
    modes = 1 if isinstance(config.mode, str) else len(config.mode)
    found = []
    if not names or len(set(names)) != len(names):
        found.append(f"metric = {names}: wanted different names")
    if names == [PARAMETERS]:
        found.append(
            f"metric = {PARAMETERS} alone: training does not change it; add an evaluation metric, for example loss"
        )
    if modes not in (1, len(names)):
        found.append(f"mode has {modes} entries for {len(names)} metrics: set one for each")
    if len(names) > 1 and config.search.kind != "optuna":
        found.append(f"metric has {len(names)} names, which only search.kind = optuna supports; set one")
    if len(names) > 1 and config.scheduler.kind != "none":
        found.append(
            f"metric has {len(names)} names, by which scheduler.kind = {config.scheduler.kind} cannot rank trials: "
            "set it to none"
        )
    return found + _space_problems(config)


def _space_problems(config: SearchConfig) -> list[str]:
    """Return the dimensions that the kind of search or scheduler does not support."""
    found, kind = [], config.scheduler.kind
    grids = [key for key, dimension in config.space.items() if isinstance(dimension, GridChoice)]
    others = [key for key in config.space if key not in grids]
    if config.search.kind == "grid" and others:
        found.append(
            f"space.{others[0]} is not a grid, but search.kind = grid: set its kind to grid, or change search.kind"
        )
    if config.search.kind != "grid" and grids:
        found.append(
            f"space.{grids[0]} is a grid, but search.kind = {config.search.kind}: set search.kind to grid, or its kind "
            "to choice"
        )
    combinations = math.prod(len(config.space[key].extremes()) for key in grids)
    if combinations > MOST_TRIALS:
        found.append(
            f"space: the grids have {combinations:.1e} combinations, wanted at most {MOST_TRIALS:,}: remove values"
        )
    if not config.exchanges:
        return found
    if config.search.kind != "random":
        found.append(
            f"search.kind = {config.search.kind}, but scheduler.kind = {kind} changes the values: set it to random"
        )
    if config.baseline:
        found.append(f"baseline = true, but scheduler.kind = {kind} changes every trial: remove baseline")
    for key, dimension in config.space.items():
        if dimension.when:
            found.append(f"space.{key} has a condition, which scheduler.kind = {kind} does not support: remove when")
        if kind == "pb2" and isinstance(dimension, Choice):
            found.append(f"space.{key} is a choice, but scheduler.kind = pb2 supports ranges only: use pbt, or a range")
    return found
