"""Importance of the keys of a space: Optuna's fANOVA on the trials, compared at the last epoch that all reached."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune.search_record import SearchRecord, TrialRecord
from tune.space.samplers import recorded
from tune.space.space import Space

FEWEST = 4


@dataclass(frozen=True)
class Importance:
    """Share of the metric's variance by key, the largest first, with the number of trials and the epoch."""

    shares: dict[str, float]
    trials: int
    epoch: float


def importance(record: SearchRecord, space: Space, base: Mapping[str, Any]) -> Importance | str:
    """Return the importance of the keys that every trial has, or the reason why it cannot be computed.

    Trials that were stopped early are compared with the others at the last epoch that all reached.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    (metric, mode), *_ = record.metrics.items()
    trials = [trial for trial in record.trials if trial.evaluations and not trial.exchanges]
    if len(trials) < FEWEST:
        return _too_few(len(trials))
    epoch = min(trial.epoch for trial in trials)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    for trial in trials:
        score = score_at(trial, metric, epoch)
        draw = recorded(trial.values, space, base)
        if score is not None and draw is not None:
            study.add_trial(
                optuna.trial.create_trial(params=draw.params, distributions=draw.distributions, value=score)
            )
    if len(study.trials) < FEWEST:
        return _too_few(len(study.trials))
    if len({trial.value for trial in study.trials}) < 2:
        return f"all trials have the same {metric} at epoch {epoch:.4g}, where they are compared"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return Importance(dict(shares), len(study.trials), epoch) if shares else "no key of the space varies in all trials"


def _too_few(count: int) -> str:
    return f"{count} comparable trial{'s' * (count != 1)}, wanted {FEWEST}"


def score_at(trial: TrialRecord, metric: str, epoch: float) -> float | None:
    """Return a trial's metric at the last evaluation up to an epoch."""
    found = [e.metrics[metric] for e in trial.evaluations if e.epoch <= epoch * (1 + 1e-9) and metric in e.metrics]
    return found[-1] if found else None
