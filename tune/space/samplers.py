"""Samplers of trials: random draws, a grid, or an Optuna study."""

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from tune.config import Mode, OptunaSearch, Search
from tune.space.space import GridChoice, Space, Values, holds, ordered, sample

Ending = Literal["finished", "stopped", "failed"]


class Sampler(Protocol):
    """Chooses the values of trials and receives their results."""

    def ask(self, number: int) -> Values:
        """Return the values of a trial."""
        ...

    def label(self, number: int) -> str:
        """Return the label of a trial, or an empty string."""
        ...

    def tell(self, number: int, values: Values, ending: Ending, scores: Mapping[str, float], step: int) -> None:
        """Record the end of a trial of this or an earlier process; scores are empty without an evaluation."""
        ...


class RandomDraw:
    """Values from a random generator."""

    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def pick(self, key: str, values: Sequence[Any]) -> Any:
        """See `tune.space.space.Draw`."""
        return values[int(self.rng.integers(len(values)))]

    def real(self, key: str, low: float, high: float, *, log: bool = False, step: float | None = None) -> float:
        """See `tune.space.space.Draw`."""
        if step is not None:
            return float(low + step * self.rng.integers(int((high - low) / step + 1e-9) + 1))
        if log:
            return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))
        return float(self.rng.uniform(low, high))

    def whole(self, key: str, low: int, high: int, *, log: bool = False, step: int = 1) -> int:
        """See `tune.space.space.Draw`."""
        if log:
            value = np.exp(self.rng.uniform(np.log(low - 0.5), np.log(high + 0.5)))
            return int(min(max(round(float(value)), low), high))
        return int(low + step * self.rng.integers((high - low) // step + 1))


class FixedSampler:
    """Trials that do not depend on results."""

    def __init__(self, trials: Sequence[Values], labels: Sequence[str] = ()) -> None:
        self.trials, self.labels = trials, labels

    def ask(self, number: int) -> Values:
        """See `Sampler`."""
        return self.trials[number]

    def label(self, number: int) -> str:
        """See `Sampler`."""
        return self.labels[number] if self.labels else ""

    def tell(self, number: int, values: Values, ending: Ending, scores: Mapping[str, float], step: int) -> None:
        """See `Sampler`."""


def known_trials(search: Search, base: Values) -> list[Values] | None:
    """Return the values of all trials if they do not depend on results (random, grid), else None.

    Args:
        search: the search.
        base: the baseline's values.
    """
    config = search.config
    if config.search.kind == "optuna":
        return None
    if config.search.kind == "grid":
        combinations = grid(search)
        return ([base] if config.with_baseline else []) + combinations
    draws = [sample(config.space, search.resolved, RandomDraw(config.seed, number)) for number in range(config.trials)]
    return [base, *draws[1:]] if config.with_baseline else draws


def grid(search: Search) -> list[Values]:
    """Return every combination of the grids once; keys whose condition is false are left out."""
    space, found = search.config.space, {}
    keys = ordered(space)
    lists = [dimension.values for key in keys if isinstance(dimension := space[key], GridChoice)]
    for combination in itertools.product(*lists):
        values: Values = {}
        for key, value in zip(keys, combination, strict=True):
            if holds(space[key].when, values, search.resolved):
                values[key] = value
        values = {key: values[key] for key in space if key in values}
        found[json.dumps(values, sort_keys=True, default=str)] = values
    return list(found.values())


class _StudyDraw:
    """Values that an Optuna trial suggests; lists and mappings are encoded as text."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def pick(self, key: str, values: Sequence[Any]) -> Any:
        labels = [label(value) for value in values]
        return values[labels.index(self.trial.suggest_categorical(key, labels))]

    def real(self, key: str, low: float, high: float, *, log: bool = False, step: float | None = None) -> float:
        return self.trial.suggest_float(key, low, high, log=log, step=step)

    def whole(self, key: str, low: int, high: int, *, log: bool = False, step: int = 1) -> int:
        return self.trial.suggest_int(key, low, high, log=log, step=step)


def label(value: Any) -> Any:
    """Return a value that Optuna can take as a category."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value, sort_keys=True)


class _Recorded:
    """Returns the values of a recorded trial, and collects the distributions that they were drawn from."""

    def __init__(self, values: Values) -> None:
        self.values, self.params, self.distributions = values, {}, {}

    def pick(self, key: str, values: Sequence[Any]) -> Any:
        from optuna.distributions import CategoricalDistribution

        self._keep(key, label(self.values[key]), CategoricalDistribution([label(value) for value in values]))
        return self.values[key]

    def real(self, key: str, low: float, high: float, *, log: bool = False, step: float | None = None) -> float:
        from optuna.distributions import FloatDistribution

        return self._keep(key, float(self.values[key]), FloatDistribution(low, high, log=log, step=step))

    def whole(self, key: str, low: int, high: int, *, log: bool = False, step: int = 1) -> int:
        from optuna.distributions import IntDistribution

        return self._keep(key, int(self.values[key]), IntDistribution(low, high, log=log, step=step))

    def _keep(self, key: str, value: Any, distribution: Any) -> Any:
        if not (value in distribution.choices if hasattr(distribution, "choices") else _within(value, distribution)):
            raise ValueError(f"{key} = {value} is outside its range")
        self.params[key], self.distributions[key] = value, distribution
        return value


def _within(value: float, distribution: Any) -> bool:
    """Return whether an Optuna distribution may draw a number."""
    if not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return abs(steps - round(steps)) < 1e-8


def recorded(values: Values, space: Space, base: Mapping[str, Any]) -> _Recorded | None:
    """Return a trial's Optuna parameters and distributions; None if its values are outside the space."""
    draw = _Recorded(values)
    try:
        sample(space, base, draw)
    except (KeyError, ValueError, TypeError):
        return None
    return draw


class OptunaSampler:
    """Trials from an Optuna study. The study is not stored, but filled from the record of the search."""

    def __init__(self, search: Search, settings: OptunaSearch, metrics: Mapping[str, Mode], told: int = 0) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search, self.metrics = search, dict(metrics)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=settings.startup,
                seed=search.config.seed + told,  # no repeated draws after a resume
                constant_liar=True,
            )
        directions: list[Any] = ["maximize" if mode == "max" else "minimize" for mode in metrics.values()]
        self.study = optuna.create_study(directions=directions, sampler=sampler)
        self._open: dict[int, Any] = {}

    def ask(self, number: int) -> Values:
        """See `Sampler`."""
        trial = self.study.ask()
        self._open[number] = trial
        return sample(self.search.config.space, self.search.resolved, _StudyDraw(trial))

    def label(self, number: int) -> str:
        """See `Sampler`."""
        return ""

    def tell(self, number: int, values: Values, ending: Ending, scores: Mapping[str, float], step: int) -> None:
        """See `Sampler`. A baseline with values outside the space is ignored."""
        from optuna.trial import TrialState

        state = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}[ending]
        figures = [scores[name] for name in self.metrics if name in scores and np.isfinite(scores[name])]
        if len(figures) < len(self.metrics):
            state = TrialState.FAIL
        trial = self._open.pop(number, None)
        if trial is None:
            self._add(values, state, figures, step)
            return
        if state == TrialState.PRUNED:
            trial.report(figures[0], step)
        self.study.tell(trial, figures if state == TrialState.COMPLETE else None, state=state)

    def _add(self, values: Values, state: Any, figures: list[float], step: int) -> None:
        import optuna

        draw = recorded(values, self.search.config.space, self.search.resolved)
        if draw is None:
            return
        complete = state == optuna.trial.TrialState.COMPLETE
        pruned = state == optuna.trial.TrialState.PRUNED
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=draw.params,
                distributions=draw.distributions,
                values=figures if complete else None,
                intermediate_values={step: figures[0]} if pruned else None,
            )
        )
