"""The report of a search: one self-contained HTML page, a pure function of the record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from perceiver.report import figures as training_figures
from perceiver.tracking.redaction import redact, redact_text
from tune.record import SearchRecord, TrialRecord
from tune.report import figures
from tune.report.importance import Importance, importance
from tune.report.numbers import duration, figure, short_keys
from tune.search.checks import number
from tune.search.conclude import verdict
from tune.space.space import Space


@dataclass(frozen=True)
class SearchReport:
    """What a report is made of.

    Attributes:
        name: of the search's folder.
        record: trials and results.
        space: where values came from.
        base: tree of the base recipe as resolved.
        baseline: number of the trial that is the base recipe, if there is one.
        eval_samples: size of the evaluation split.
        facts: label -> value, shown as tiles.
        commands: caption -> command line.
        best_recipe: the text of best.yaml.
        settings: the search file as resolved.
    """

    name: str
    record: SearchRecord
    space: Space
    base: Mapping[str, Any] = field(default_factory=dict)
    baseline: int | None = None
    eval_samples: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    best_recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_search_report(data: SearchReport) -> str:
    """Return the page.

    Raises:
        ValueError: no trial was evaluated.
    """
    best = data.record.best()
    if best is None:
        raise ValueError("no trial was evaluated")
    metrics = list(data.record.metrics)
    scores = best.scores(metrics)
    found = importance(data.record, data.space, data.base)
    page = {
        "name": data.name,
        "headline": (figure(metrics[0], scores[metrics[0]]), f"best {metrics[0]}, trial {best.number}"),
        "verdict": verdict(data.record, data.baseline, data.eval_samples),
        "facts": {key: redact_text(value) for key, value in data.facts.items()},
        "commands": {key: redact_text(command) for key, command in data.commands.items()},
        "wide": _present([figures.draw_trials(data.record, _curve(data.record), data.baseline)]),
        "coordinates": figures.draw_coordinates(data.record, data.space),
        "small": _small(data.record, found),
        "importance_note": _importance_note(found),
        "columns": ["trial", "status", *short_keys(keys := _keys(data)), "epochs", *metrics, "time", "samples/s"],
        "rows": [_row(trial, keys, data) for trial in _order(data.record)],
        "exchanges": [(t.number, e) for t in data.record.trials for e in t.exchanges],
        "pairs": lambda values: "  ".join(f"{key}={number(value)}" for key, value in values.items()),
        "best_recipe": data.best_recipe,
        "settings": yaml.safe_dump(redact(dict(data.settings)), sort_keys=False, allow_unicode=True),
    }
    return _render(page)


def _curve(record: SearchRecord) -> str:
    """Return the metric whose curves are drawn: the first that evaluations give."""
    given = {name for trial in record.trials for e in trial.evaluations for name in e.metrics}
    return next(name for name in record.metrics if name in given)


def _present(drawings: list[training_figures.Drawing | None]) -> list[training_figures.Drawing]:
    return [drawing for drawing in drawings if drawing is not None]


def _small(record: SearchRecord, found: Importance | str) -> list[training_figures.Drawing]:
    drawings = [figures.draw_best(record)]
    if isinstance(found, Importance):
        drawings.append(figures.draw_importance(found))
    if len(record.metrics) > 1:
        drawings.append(figures.draw_front(record))
    return _present(drawings)


def _importance_note(found: Importance | str) -> str:
    if isinstance(found, str):
        return f"The importance of the keys is not computed: {found}."
    few = " With so few trials it is a hint, not a finding." if found.trials < 30 else ""
    return (
        f"Importance is the share of the metric's variance that a key explains (fANOVA) among {found.trials} trials, "
        f"compared at epoch {found.epoch:.4g}, where all of them have come.{few}"
    )


def _keys(data: SearchReport) -> list[str]:
    return [key for key in data.space if any(key in trial.values for trial in data.record.trials)]


def _order(record: SearchRecord) -> list[TrialRecord]:
    """Return all trials, ranked ones first."""
    ranked = record.ranked()
    return [*ranked, *(trial for trial in record.trials if trial not in ranked)]


def _row(trial: TrialRecord, keys: list[str], data: SearchReport) -> dict[str, Any]:
    scores, best = trial.scores(list(data.record.metrics)), data.record.best()
    speed = f"{trial.samples_per_s:,.0f}" if trial.samples_per_s else "–"
    return {
        "number": trial.number,
        "mark": "base recipe" if trial.number == data.baseline else "",
        "best": best is not None and trial.number == best.number,
        "status": trial.status,
        "reason": redact_text(trial.reason) if trial.status == "failed" else "",
        "values": [number(trial.values[key]) if key in trial.values else "" for key in keys],
        "figures": [
            f"{trial.epoch:.4g}",
            *(figure(name, scores.get(name)) for name in data.record.metrics),
            duration(trial.seconds),
            speed,
        ],
    }


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(training_figures.__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("search.html").render(page)
