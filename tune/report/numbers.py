"""Numbers, keys and the conclusion of a search as text, for the terminal and the report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.recipe.config import Recipe
from perceiver.report.page import is_share, percent, text
from tune.search_record import SearchRecord, TrialRecord


def figure(name: str, value: float | None) -> str:
    """Return a metric as text: shares such as accuracy in per cent, counts with separators."""
    return percent(value) if is_share(name) else text(value)


def figures(trial: TrialRecord, record: SearchRecord) -> str:
    """Return the last values of the search's metrics of a trial."""
    scores = trial.scores(list(record.metrics))
    return "  ".join(f"{name} {figure(name, scores.get(name))}" for name in record.metrics)


def short_keys(keys: Sequence[str]) -> list[str]:
    """Return the last parts of each dotted key, as many as make the keys different."""
    parts = 1
    while parts < max((key.count(".") + 1 for key in keys), default=1):
        short = [".".join(key.split(".")[-parts:]) for key in keys]
        if len(set(short)) == len(keys):
            return short
        parts += 1
    return list(keys)


def value_text(value: Any) -> str:
    """Return a value of the space as text: floats with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def values_text(values: Mapping[str, Any], between: str = "  ") -> str:
    """Return values of the space as ``key=value`` pairs."""
    return between.join(f"{key}={value_text(value)}" for key, value in values.items())


def workers(recipe: Recipe) -> str:
    """Return "1 worker", "2 workers"."""
    count = recipe.cluster.workers
    return f"{count} worker{'s' * (count > 1)}"


def verdict(record: SearchRecord, baseline: int | None, samples: int) -> str:
    """Return one sentence: whether the best trial is better than the base recipe, and with what confidence.

    Args:
        record: of the search.
        baseline: number of the trial that is the base recipe, if there is one.
        samples: size of the evaluation split, for the confidence interval of an accuracy.
    """
    best = record.best()
    if best is None:
        return "no trial was evaluated"
    (metric, mode), *_ = record.metrics.items()
    score = best.scores([metric])[metric]
    text = f"best trial {best.number}: {metric} {figure(metric, score)}"
    if baseline is None or metric not in (own := record.trial(baseline).scores([metric])):
        return text
    if best.number == baseline:
        return f"{text}: no trial is better than the base recipe (trial {baseline}) at the same {best.epoch:.4g} epochs"
    base, gain = own[metric], (score - own[metric]) * (1 if mode == "max" else -1)
    text += f", the base recipe (trial {baseline}) {figure(metric, base)}"
    if record.trial(baseline).epoch != best.epoch:
        text += f" after {record.trial(baseline).epoch:.4g} instead of {best.epoch:.4g} epochs"
    else:
        text += f" after the same {best.epoch:.4g} epochs"
    if gain <= 0:
        return f"{text}: no trial is better"
    if metric == "accuracy" and samples:
        spread = math.sqrt((score * (1 - score) + base * (1 - base)) / samples)
        sure = "more" if gain > 1.96 * spread else "less"
        text += f"; the gain is {sure} than the {100 * 1.96 * spread:.1f} points of the 95 % confidence interval"
    return text
