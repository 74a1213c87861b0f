"""How numbers and keys of a search are written, on the terminal and in the report."""

from collections.abc import Sequence

from cluster.recipe.config import Recipe
from perceiver.report.page import is_share, percent, text
from tune.record import SearchRecord, TrialRecord


def figure(name: str, value: float | None) -> str:
    """Return a metric's value: shares such as accuracy in per cent, counts with separators."""
    return percent(value) if is_share(name) else text(value)


def figures(trial: TrialRecord, record: SearchRecord) -> str:
    """Return the last figures of a trial that the search looks at."""
    scores = trial.scores(list(record.metrics))
    return "  ".join(f"{name} {figure(name, scores.get(name))}" for name in record.metrics)


def duration(seconds: float) -> str:
    """Return seconds as 0:05, 1:05 or 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short_keys(keys: Sequence[str]) -> list[str]:
    """Return the last part of each dotted key, with as much before it as tells the keys apart."""
    parts = 1
    while parts < max((key.count(".") + 1 for key in keys), default=1):
        short = [".".join(key.split(".")[-parts:]) for key in keys]
        if len(set(short)) == len(keys):
            return short
        parts += 1
    return list(keys)


def workers(recipe: Recipe) -> str:
    """Return "1 worker", "2 workers"."""
    count = recipe.cluster.workers
    return f"{count} worker{'s' * (count > 1)}"
