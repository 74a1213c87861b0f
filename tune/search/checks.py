"""Checks of a search before anything starts: keys, values, types, data, model."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cluster.recipe.config import Recipe, build_recipe, kind_of
from cluster.recipe.preflight import CheckedModel, check_recipe, describe_start, evaluation_metrics
from perceiver.config import UserError
from pipelines.feed.ingest import DataConfig, check_files
from pipelines.shards.manifest import Manifest, load_manifest
from tune.config import PARAMETERS, Asha, Median, Search
from tune.report.numbers import value_text, values_text
from tune.space.space import Values, base_values, fulfilling, impossible, ordered, with_values

FIXED = {
    "name": "trials are named after the search",
    "output": "trials are stored in the search's folder",
    "tracking": "all trials are tracked in one store",
    "cluster": "every trial has the same share of the cluster",
}
"""Top-level keys of a recipe that cannot be searched, with the reason."""

KEPT_BY_EXCHANGE = ("train.global_batch", "seed", "optim.kind", "data.url", "data.train_split")
"""Keys that must not differ between trials that continue from each other's checkpoints."""


class Checker:
    """Checks recipes of one search; reads each data manifest and checks its files once."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self._load = lru_cache(maxsize=None)(_load)
        self._complete: set[str] = set()

    def manifest(self, url: str, options: dict[str, str]) -> Manifest:
        """Return the manifest of a prepared folder."""
        return self._load(url, tuple(sorted(options.items())))

    def recipe(self, values: Mapping[str, Any]) -> tuple[Recipe, CheckedModel]:
        """Return the recipe with some values set in the base, and its model, or raise `UserError`."""
        given = build_recipe(with_values(self.search.base, values), source=self.search.source)
        model = check_recipe(given, self.manifest)
        recipe = model.recipe
        self._check_files(recipe.data, model.manifest)
        describe_start(recipe, model.manifest)
        return recipe, model

    def _check_files(self, data: DataConfig, manifest: Manifest) -> None:
        place = data.model_dump_json(include={"url", "train_split", "eval_split", "mixture", "storage_options"})
        if place not in self._complete:
            check_files(data, manifest)
            self._complete.add(place)

    def total_steps(self, values: Mapping[str, Any]) -> tuple[int, float]:
        """Return a trial's optimizer steps, and those of one epoch."""
        return steps_of(*self.recipe(values))


def steps_of(recipe: Recipe, model: CheckedModel) -> tuple[int, float]:
    """Return the optimizer steps of a checked recipe, and those of one epoch."""
    samples = model.manifest.split(recipe.data.train_split).samples
    return recipe.train.total_steps(samples), samples / recipe.train.global_batch


def check_search(search: Search) -> Checker:
    """Check the base recipe, then each extreme value of the space on top of it.

    Raises:
        UserError: the first reason for which a trial would fail, with the key of the space.
    """
    checker = Checker(search)
    recipe, base = checker.recipe({})
    check_metrics(search, recipe, len(base.manifest.classes))
    _check_alone(search)
    _check_grace(checker)
    keys = ordered(search.config.space)
    if reason := impossible(search.config.space, search.resolved):
        raise UserError(reason)
    for key in keys:
        _check_key(search, key)
        for value in search.config.space[key].extremes():
            _check_value(checker, base, key, value)
    return checker


def check_metrics(search: Search, recipe: Recipe, classes: int) -> None:
    """Refuse a metric that evaluations of the checked recipe's task do not compute."""
    known = evaluation_metrics(recipe, classes)
    for name in search.config.metrics:
        if name not in (*known, PARAMETERS):
            raise UserError(
                f"metric = {name!r}: evaluations of task.kind = {kind_of(search.recipe.task)} have "
                f"{', '.join(known)}; set metric to one of them"
            )


def _check_alone(search: Search) -> None:
    """Refuse options that only a run with its own cluster supports."""
    if search.recipe.train.eval_async or "train.eval_async" in search.config.space:
        raise UserError("train.eval_async is set, but a search waits for each evaluation of a trial: remove it")
    if search.recipe.train.checkpoint_memory_every or "train.checkpoint_memory_every" in search.config.space:
        raise UserError("train.checkpoint_memory_every is set, but trials have no checkpoints in memory: remove it")
    if search.recipe.cluster.min_workers:
        raise UserError("cluster.min_workers is set, but trials have a fixed number of workers: remove it")


def _check_grace(checker: Checker) -> None:
    """Refuse a grace period that ends before the first evaluation, or not before the trials do."""
    search = checker.search
    settings, every = search.config.scheduler, search.recipe.train.eval_every
    if not isinstance(settings, Asha | Median):
        return
    steps, epoch_steps = checker.total_steps({})
    if "train.eval_every" not in search.config.space and every > settings.grace * (1 + 1e-9):
        raise UserError(
            f"scheduler.grace = {settings.grace:g}, but the first evaluation is at epoch {every:g}: set it to at "
            f"least {every:g}, or train.eval_every to at most {settings.grace:g}"
        )
    if settings.grace >= steps / epoch_steps and not {"train.epochs", "train.steps"} & set(search.config.space):
        raise UserError(
            f"scheduler.grace = {settings.grace:g}, but a trial ends at epoch {steps / epoch_steps:.4g}, so none is "
            "stopped: set it to less, or scheduler.kind to none"
        )


def check_trials(checker: Checker, trials: list[Values]) -> None:
    """Check the trials that are known beforehand, since values that are valid alone may not be valid together."""
    for number, values in enumerate(trials):
        try:
            checker.recipe(values)
        except UserError as error:
            raise UserError(f"trial {number} ({values_text(values, ', ')}): {_reason(checker, error)}") from None


def _load(url: str, options: tuple[tuple[str, str], ...]) -> Manifest:
    return load_manifest(url, dict(options))


def _check_key(search: Search, key: str) -> None:
    head = key.split(".")[0]
    if head in FIXED:
        raise UserError(f"space.{key}: {head} cannot be searched, {FIXED[head]}; set it in overrides")
    if search.config.exchanges and key in KEPT_BY_EXCHANGE:
        raise UserError(
            f"space.{key}: trials of scheduler.kind = {search.config.scheduler.kind} continue from each other's "
            "checkpoints, which must have the same value; set it in overrides"
        )


def _check_value(checker: Checker, base: CheckedModel, key: str, value: Any) -> None:
    """Check one value of a key on the base recipe, with values that fulfil its conditions."""
    search = checker.search
    condition = fulfilling(search.config.space, search.resolved, key)
    try:
        _, model = checker.recipe({**condition, key: value})
    except UserError as error:
        raise UserError(f"space.{key} = {value_text(value)}: {_reason(checker, error)}") from None
    if search.config.exchanges and model.shapes != base.shapes:
        raise UserError(
            f"space.{key} = {value_text(value)} changes the model, but trials of scheduler.kind = "
            f"{search.config.scheduler.kind} take over each other's weights: remove it, or change the scheduler"
        )


def _reason(checker: Checker, error: UserError) -> str:
    return str(error).removeprefix(f"{checker.search.source}: ")


def baseline(search: Search) -> Values:
    """Return the base recipe's values, those of trial 0."""
    return base_values(search.config.space, search.resolved)
