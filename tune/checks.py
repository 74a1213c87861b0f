"""Whatever can be refused of a search is refused here, before anything starts: keys, values, types, data, model."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cluster.preflight import CheckedModel, check_recipe
from cluster.recipe import Recipe, build_recipe
from perceiver.config import UserError
from pipelines.shards import Manifest, load_manifest
from tune.config import Search
from tune.space import Values, as_number, base_values, ordered, with_values

FIXED = {
    "name": "trials are named after the search",
    "output": "trials lie in the search's folder",
    "tracking": "all trials are tracked in one place",
    "cluster": "every trial gets the same share of the cluster",
}
"""First keys of a recipe that a space cannot hold, and why."""

KEPT_BY_EXCHANGE = ("train.global_batch", "seed", "optim.kind", "data.url", "data.train_split")
"""Keys that must not change where trials go on from each other's checkpoints."""


class Checker:
    """Checks recipes of one search; reads each data manifest once."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self._load = lru_cache(maxsize=None)(_load)

    def manifest(self, url: str, options: dict[str, str]) -> Manifest:
        """Return the manifest of a prepared folder."""
        return self._load(url, tuple(sorted(options.items())))

    def recipe(self, values: Mapping[str, Any]) -> tuple[Recipe, CheckedModel]:
        """Return the recipe that some values make of the base, and what it comes to.

        Raises:
            UserError: it could not be trained.
        """
        recipe = build_recipe(with_values(self.search.base, values), source=self.search.source)
        return recipe, check_recipe(recipe, self.manifest)

    def total_steps(self, values: Mapping[str, Any]) -> tuple[int, float]:
        """Return a trial's optimizer steps, and those of one epoch."""
        from cluster.preflight import epoch_steps_of

        recipe, model = self.recipe(values)
        epoch_steps = epoch_steps_of(recipe, model.manifest)
        return recipe.train.total_steps(epoch_steps), epoch_steps


def check_search(search: Search) -> Checker:
    """Check the base recipe, then each value of the space that stands for others, each on top of the base.

    Raises:
        UserError: the first thing that some trial would fail at, with the key of the space.
    """
    checker = Checker(search)
    _, base = checker.recipe({})
    for key in ordered(search.config.space):
        _check_key(search, key)
        for value in search.config.space[key].extremes():
            _check_value(checker, base, key, value)
    return checker


def check_trials(checker: Checker, trials: list[Values]) -> None:
    """Check the trials that are known beforehand: values that are right alone may not go together.

    Raises:
        UserError: the first trial that could not be trained.
    """
    for number, values in enumerate(trials):
        try:
            checker.recipe(values)
        except UserError as error:
            raise UserError(f"trial {number} ({shown(values)}): {_reason(checker, error)}") from None


def shown(values: Mapping[str, Any]) -> str:
    """Return values as ``key=value`` pairs."""
    return ", ".join(f"{key}={number(value)}" for key, value in values.items())


def number(value: Any) -> str:
    """Return a value as a reader wants it: four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _load(url: str, options: tuple[tuple[str, str], ...]) -> Manifest:
    return load_manifest(url, dict(options))


def _check_key(search: Search, key: str) -> None:
    head = key.split(".")[0]
    if head in FIXED:
        raise UserError(f"space.{key}: {head} cannot be searched, {FIXED[head]}; set it in overrides")
    if search.config.exchanges and key in KEPT_BY_EXCHANGE:
        raise UserError(
            f"space.{key}: scheduler.kind = {search.config.scheduler.kind} has trials go on from each other's "
            "checkpoints, which must agree in it; set it in overrides"
        )


def _check_value(checker: Checker, base: CheckedModel, key: str, value: Any) -> None:
    """Check one value of one key on the base recipe, with what its conditions ask for."""
    search = checker.search
    condition = _condition(search, key)
    try:
        _, model = checker.recipe({**condition, key: value})
    except UserError as error:
        raise UserError(f"space.{key} = {number(value)}: {_reason(checker, error)}") from None
    if search.config.exchanges and model.shapes != base.shapes:
        raise UserError(
            f"space.{key} = {number(value)} changes the model, and scheduler.kind = {search.config.scheduler.kind} "
            "has trials take over each other's weights; leave it out, or take another scheduler"
        )


def _condition(search: Search, key: str) -> Values:
    """Return values under which a key counts: what its ``when`` wants, and what that wants in turn."""
    found: Values = {}
    for other, wanted in search.config.space[key].when.items():
        if other in search.config.space:
            found |= _condition(search, other)
        found[other] = as_number(wanted[0] if isinstance(wanted, list) else wanted)
    return found


def _reason(checker: Checker, error: UserError) -> str:
    return str(error).removeprefix(f"{checker.search.source}: ")


def baseline(search: Search) -> Values:
    """Return trial 0's values where that is the base recipe."""
    return base_values(search.config.space, search.recipe.model_dump(mode="json"))
