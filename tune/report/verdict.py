"""Whether the best trial of a search beats the base recipe, in one sentence."""

import math

from tune.record import SearchRecord
from tune.report.numbers import figure


def verdict(record: SearchRecord, baseline: int | None, samples: int) -> str:
    """Return one sentence: whether the best trial beats the base recipe, and how sure that is.

    Args:
        record: of the search.
        baseline: number of the trial that is the base recipe, if there is one.
        samples: size of the evaluation split, from which the margin of an accuracy comes.
    """
    best = record.best()
    if best is None:
        return "no trial came to an evaluation"
    (metric, mode), *_ = record.metrics.items()
    score = best.scores([metric])[metric]
    text = f"best trial {best.number}: {metric} {figure(metric, score)}"
    if baseline is None or metric not in (own := record.trial(baseline).scores([metric])):
        return text
    if best.number == baseline:
        return f"{text}: no trial beat the base recipe (trial {baseline}) at the same {best.epoch:.4g} epochs"
    base, gain = own[metric], (score - own[metric]) * (1 if mode == "max" else -1)
    text += f", the base recipe (trial {baseline}) {figure(metric, base)}"
    if record.trial(baseline).epoch != best.epoch:
        text += f" after {record.trial(baseline).epoch:.4g} instead of {best.epoch:.4g} epochs"
    else:
        text += f" after the same {best.epoch:.4g} epochs"
    if gain <= 0:
        return f"{text}: no trial beat it"
    if metric == "accuracy" and samples:
        spread = math.sqrt((score * (1 - score) + base * (1 - base)) / samples)
        sure = "more" if gain > 1.96 * spread else "less"
        text += (
            f"; the gain is {sure} than the {100 * 1.96 * spread:.1f} points by which two such figures differ by chance"
        )
    return text
