"""Ray Tune's schedulers for the settings of a search file."""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray.tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2

from cluster.runtime.ray_internals import ALMOST, can_take_turns, population_class
from perceiver.config import UserError
from tune.config import Asha, Median, Pb2, Pbt, SearchConfig
from tune.search_record import TrialRecord, number_of
from tune.space.space import Choice, Int, LogUniform, QUniform, Uniform, Values

FOREVER = math.inf
TIME = "epoch"
"""The key of a result by which schedulers measure the progress of a trial."""


@dataclass(frozen=True, eq=False)
class ReplayedTrial:
    """A trial of a previous start whose results are replayed to a scheduler."""

    trial_id: str
    config: dict[str, Any]
    status: str = "TERMINATED"


class _SparesBaseline:
    """Never stops the baseline, whose results count like those of any other trial."""

    baseline = False

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return the scheduler's decision, but never stop trial 0 if that is the baseline."""
        decision = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        if decision not in (TrialScheduler.STOP, TrialScheduler.PAUSE):
            return decision
        return TrialScheduler.CONTINUE if self.baseline and trial.config["number"] == 0 else TrialScheduler.STOP


class SparingAsha(_SparesBaseline, ASHAScheduler):
    """Asynchronous successive halving that spares the baseline."""


class SparingMedian(_SparesBaseline, MedianStoppingRule):
    """The median stopping rule that spares the baseline. Without `hard_stop` it pauses trials that it would stop."""

    wanted = ""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record a trial's last result, unless it was never evaluated: the rule needs the epoch of all results."""
        if TIME in result and self.wanted in result:
            super().on_trial_complete(tune_controller, trial, result)


def build_scheduler(config: SearchConfig, epochs: float, concurrency: int, coordinator: Any = None) -> Any:
    """Return the Ray Tune scheduler of a search.

    Args:
        config: the search.
        epochs: length of the longest trial.
        concurrency: trials at a time; a larger population takes turns.
        coordinator: of the search; a population reads whether it is being stopped.
    """
    (metric, mode), *_ = config.metrics.items()
    settings = config.scheduler
    if isinstance(settings, Asha):
        scheduler = SparingAsha(
            time_attr=TIME,
            metric=metric,
            mode=mode,
            # Slightly less, so that an evaluation at exactly this epoch counts in spite of rounding, and a trial that
            # has reached its end is not stopped there.
            max_t=max(epochs, settings.grace) * ALMOST,  # pyright: ignore[reportArgumentType]
            grace_period=settings.grace * ALMOST,  # pyright: ignore[reportArgumentType] any number of epochs
            stop_last_trials=False,
            reduction_factor=settings.reduction,
        )
        scheduler.baseline = config.with_baseline
        return scheduler
    if isinstance(settings, Median):
        # With a shorter slice trials would take turns, each time with a restart.
        scheduler = SparingMedian(
            time_attr=TIME,
            metric=metric,
            mode=mode,
            grace_period=settings.grace,
            min_samples_required=settings.min_trials,
            min_time_slice=FOREVER,  # pyright: ignore[reportArgumentType]
            hard_stop=False,
        )
        scheduler.baseline, scheduler.wanted = config.with_baseline, metric
        return scheduler
    if isinstance(settings, Pbt | Pb2):
        return _population(config, settings, epochs, concurrency, coordinator)
    return FIFOScheduler()


def takes_turns(config: SearchConfig, concurrency: int) -> bool:
    """Return whether a population has more trials than run at a time, so that all pause after each evaluation."""
    return config.exchanges and config.trials > concurrency


def replay(scheduler: Any, metric: str, trials: Iterable[TrialRecord]) -> None:
    """Replay to a scheduler the results of the trials that ended in a previous start of the search."""
    if not isinstance(scheduler, SparingAsha | SparingMedian):
        return
    for record in trials:
        past: Any = ReplayedTrial(f"past-{record.number:05d}", {"number": record.number})
        nobody: Any = SimpleNamespace(get_live_trials=list)
        scheduler.on_trial_add(nobody, past)
        for evaluation in record.evaluations:
            result = {TIME: evaluation.epoch, **evaluation.metrics}
            if metric in result:
                scheduler.on_trial_result(nobody, past, result)


def _population(config: SearchConfig, settings: Pbt | Pb2, epochs: float, concurrency: int, coordinator: Any) -> Any:
    (metric, mode), *_ = config.metrics.items()
    base = PB2 if isinstance(settings, Pb2) else PopulationBasedTraining
    if takes_turns(config, concurrency) and not can_take_turns(base):
        raise UserError(
            f"trials = {config.trials}, concurrency = {concurrency}: with this Ray version a population cannot take "
            f"turns; set trials to at most {concurrency}, or a larger concurrency"
        )
    population = population_class(
        base,
        time_key=TIME,
        concurrency=concurrency,
        epochs=epochs,
        stopping=lambda: coordinator is not None and coordinator.stopping,
        set_aside=lambda trial: coordinator.set_aside(number_of(str(trial))),
    )
    random.seed(config.seed)  # Ray uses the global generator
    shared: dict[str, Any] = {
        "time_attr": TIME,
        "metric": metric,
        "mode": mode,
        # Evaluations are at each interval, but an epoch ends within a step: two may be slightly closer.
        "perturbation_interval": settings.interval / 2,
        "quantile_fraction": settings.quantile,
        "synch": takes_turns(config, concurrency),
        "log_config": False,
        "require_attrs": False,
    }
    if isinstance(settings, Pb2):
        bounds = {key: [d.low, d.high] for key, d in config.space.items() if isinstance(d, Uniform | Int)}
        return population(hyperparam_bounds={"values": bounds}, **shared)
    return population(
        hyperparam_mutations={"values": {key: mutation(dimension) for key, dimension in config.space.items()}},
        resample_probability=settings.resample,
        custom_explore_fn=lambda changed: {**changed, "values": clipped(config, changed["values"])},
        **shared,
    )


def mutation(dimension: Any) -> Any:
    """Return how PBT changes a value: a list to step along, or a distribution to resample from."""
    match dimension:
        case Choice():
            return dimension.values
        case LogUniform():
            return ray.tune.loguniform(dimension.low, dimension.high)
        case QUniform():
            return [*_steps(dimension.low, dimension.high, dimension.step)]
        case Uniform():
            return ray.tune.uniform(dimension.low, dimension.high)
        case Int(log=False):
            return [*range(dimension.low, dimension.high + 1, dimension.step)]
        case Int():
            return ray.tune.lograndint(dimension.low, dimension.high + 1)
    raise AssertionError(dimension)


def clipped(config: SearchConfig, values: Mapping[str, Any]) -> Values:
    """Return values within the ranges of the space."""
    found = dict(values)
    for key, dimension in config.space.items():
        if isinstance(dimension, Uniform | Int) and key in found:
            found[key] = min(max(found[key], dimension.low), dimension.high)
    return found


def _steps(low: float, high: float, step: float) -> Iterable[float]:
    return (low + index * step for index in range(int((high - low) / step + 1e-9) + 1))
