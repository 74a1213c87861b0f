"""The report page of a search, rendered by `perceiver.report`."""

import math
from collections.abc import Mapping
from typing import Any

from cluster.run.console import duration
from perceiver.report import figures
from perceiver.report.page import is_share, render, yaml_text
from perceiver.tracking.redaction import redact_text
from tune.config import Search
from tune.report.importance import Importance, importance
from tune.report.numbers import figure, short_keys, value_text, values_text, verdict
from tune.search_record import SearchRecord, TrialRecord
from tune.space.space import Choice, Int, LogUniform, Space

ENDS = {"finished": "o", "stopped": "|"}


def search_page(
    name: str,
    record: SearchRecord,
    search: Search,
    *,
    eval_samples: int = 0,
    facts: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
    best_recipe: str = "",
) -> str:
    """Return the report of a search as HTML.

    Args:
        name: of the search's folder.
        record: trials and results.
        search: its settings.
        eval_samples: size of the evaluation split.
        facts: tiles by label.
        commands: command lines by caption.
        best_recipe: the text of best.yaml.

    Raises:
        ValueError: no trial was evaluated.
    """
    best = record.best()
    if best is None:
        raise ValueError("no trial was evaluated")
    metrics, space = list(record.metrics), search.config.space
    keys = [key for key in space if any(key in trial.values for trial in record.trials)]
    baseline = 0 if search.config.with_baseline else None
    found = importance(record, space, search.resolved)
    ranked = record.ranked()
    order = [*ranked, *(trial for trial in record.trials if trial not in ranked)]
    small = [_draw_best(record)]
    if isinstance(found, Importance):
        small.append(_draw_importance(found))
    if len(metrics) > 1:
        small.append(_draw_front(record))
    return render(
        "search.html",
        kind="Search report",
        name=name,
        headline=(figure(metrics[0], best.scores(metrics)[metrics[0]]), f"best {metrics[0]}, trial {best.number}"),
        verdict=verdict(record, baseline, eval_samples),
        facts=dict(facts or {}),
        commands=dict(commands or {}),
        trials_chart=_draw_trials(record, baseline),
        small_charts=[drawing for drawing in small if drawing],
        importance_note=_importance_note(found),
        coordinates=_draw_coordinates(record, space),
        columns=["trial", "status", *short_keys(keys), "epochs", *metrics, "time", "samples/s"],
        rows=[_row(trial, keys, record, baseline) for trial in order],
        exchanges=[
            (
                t.number,
                f"trial {e.donor}",
                e.step,
                values_text(e.values),
            )
            for t in record.trials
            for e in t.exchanges
        ],
        best_recipe=best_recipe,
        settings=yaml_text(search.config.model_dump(mode="json")),
    )


def _row(trial: TrialRecord, keys: list[str], record: SearchRecord, baseline: int | None) -> dict[str, Any]:
    scores, best = trial.scores(list(record.metrics)), record.best()
    speed = f"{trial.samples_per_s:,.0f}" if trial.samples_per_s else "–"
    shown = [figure(name, scores.get(name)) for name in record.metrics]
    failed = trial.status == "failed"
    return {
        "number": trial.number,
        "mark": "base recipe" if trial.number == baseline else "",
        "best": best is not None and trial.number == best.number,
        "status": trial.status,
        "reason": redact_text(trial.reason) if failed else "",
        "values": [value_text(trial.values[key]) if key in trial.values else "" for key in keys],
        "figures": []
        if failed and trial.reason and not trial.epoch
        else [f"{trial.epoch:.4g}", *shown, duration(trial.seconds), speed],
    }


def _importance_note(found: Importance | str) -> str:
    if isinstance(found, str):
        return f"The importance of the keys cannot be computed: {found}."
    few = " With fewer than 30 trials it is only a hint." if found.trials < 30 else ""
    return (
        f"Importance is the share of the metric's variance that a key explains (fANOVA) among {found.trials} trials, "
        f"compared at epoch {found.epoch:.4g}, which all reached.{few}"
    )


def _curve(trial: TrialRecord, metric: str) -> list[tuple[float, float, float]]:
    """Return epoch, time and value of each evaluation with a finite value."""
    values = ((e.epoch, e.at, e.metrics.get(metric, math.nan)) for e in trial.evaluations)
    return [point for point in values if math.isfinite(point[2])]


def _draw_trials(record: SearchRecord, baseline: int | None) -> figures.Drawing:
    """Draw the first metric of evaluations over epochs, with the best trial and the base recipe highlighted."""
    given = {name for trial in record.trials for e in trial.evaluations for name in e.metrics}
    metric = next(name for name in record.metrics if name in given)
    best, lines = record.best(), []
    for trial in record.trials:
        points = _curve(trial, metric)
        style: dict[str, Any] = {"color": figures.TEXT, "linewidth": 0.9, "alpha": 0.45, "zorder": 2}
        if best is not None and trial.number == best.number:
            style = {"color": figures.FIRST, "linewidth": 2.2, "zorder": 4, "label": f"best: trial {trial.number}"}
        elif trial.number == baseline:
            style = {"color": figures.SECOND, "linewidth": 1.8, "zorder": 3, "label": f"base recipe: trial {baseline}"}
        if points:
            end = {"marker": ENDS.get(trial.status, "x"), "markersize": 5, "markevery": [-1]}
            lines.append(([p[0] for p in points], [p[2] for p in points], {**style, **end}))
    return figures.plot(
        "trials",
        f"{metric.replace('_', ' ').capitalize()} of all trials",
        lines,
        "Ends: ● finished, | stopped by the scheduler, × failed or not finished.",
        size=figures.FULL,
        xlabel="epoch",
        **figures.metric_axis(metric, [value for _, values, _ in lines for value in values]),
    )


def _draw_best(record: SearchRecord) -> figures.Drawing | None:
    """Draw the best value so far over the time since the first trial."""
    (metric, mode), *_ = record.metrics.items()
    events = sorted(point[1:] for trial in record.trials for point in _curve(trial, metric))
    if len(events) < 2:
        return None
    began = min([t.started for t in record.trials if t.started] or [events[0][0]])
    minutes, values = [(at - began) / 60 for at, _ in events], [value for _, value in events]
    best = [(max if mode == "max" else min)(values[: index + 1]) for index in range(len(values))]
    lines: list[figures.Line] = [
        (minutes, values, {**figures.DOTS, "color": figures.TEXT, "markersize": 2.6, "alpha": 0.4}),
        (minutes, best, {"drawstyle": "steps-post", "color": figures.FIRST, "linewidth": 1.8}),
    ]
    axis = figures.metric_axis(metric, values)
    note = "Dots are evaluations of all trials."
    return figures.plot("best", "Best so far", lines, note, xlabel="minutes since the first trial", **axis)


def _draw_importance(found: Importance) -> figures.Drawing:
    bars: list[figures.Line] = [
        ([0, share], [place, place], {"color": figures.FIRST, "linewidth": 11, "solid_capstyle": "butt"})
        for place, share in enumerate(found.shares.values())
    ]
    size = (figures.HALF[0], max(1.4, 0.3 * len(bars) + 0.6))
    axis = {**figures.named_rows(short_keys(list(found.shares))), "xlim": (0, None), "percent": "x", "grid": "x"}
    return figures.plot("importance", "Share of the differences", bars, size=size, **axis)


def _draw_front(record: SearchRecord) -> figures.Drawing:
    """Draw the first two metrics against each other, the Pareto front joined."""
    first, second = list(record.metrics)[:2]

    def points(trials: list[TrialRecord]) -> tuple[list[float], list[float]]:
        scores = [scores for t in trials if len(scores := t.scores([first, second])) == 2]
        pairs = sorted((score[second], score[first]) for score in scores)
        return [x for x, _ in pairs], [y for _, y in pairs]

    lines: list[figures.Line] = [
        (*points(record.trials), {**figures.DOTS, "color": figures.TEXT, "markersize": 4, "alpha": 0.5}),
        (*points(record.front()), {"color": figures.FIRST, "marker": "o", "markersize": 4.5, "linewidth": 1.4}),
    ]
    percent = "y" * is_share(first) + "x" * is_share(second)
    note = "The line joins the trials that no other trial beats in both metrics."
    return figures.plot("front", f"{first} against {second}", lines, note, percent=percent, xlabel=second)


def _draw_coordinates(record: SearchRecord, space: Space) -> figures.Drawing | None:
    """Draw each trial as a line through its values, with an axis for each key and one for the metric."""
    metric = next(iter(record.metrics))
    trials = [trial for trial in reversed(record.ranked()) if trial.values]
    keys = [key for key in space if any(key in trial.values for trial in trials)]
    if len(trials) < 2 or not keys:
        return None
    columns = [
        _column(name, space[key], [trial.values.get(key) for trial in trials])
        for name, key in zip(short_keys(keys), keys, strict=True)
    ]
    scores = [trial.scores([metric])[metric] for trial in trials]
    columns.append(figures.number_column(metric, scores, min(scores), max(scores)))
    best = record.best()
    return figures.draw_parallel(columns, trials.index(best) if best in trials else None)


def _column(name: str, dimension: Any, values: list[Any]) -> figures.Column:
    seen = [value for value in values if value is not None]
    if isinstance(dimension, Choice) or any(not isinstance(value, int | float) for value in seen):
        offered = dimension.extremes()
        try:
            offered = sorted([*offered, *(v for v in seen if v not in offered)])
        except TypeError:
            offered = [*offered, *(v for v in seen if v not in offered)]
        # A trial of an earlier version may spell an equal value in another way.
        labels = list(dict.fromkeys(value_text(value) for value in [*offered, *seen]))
        return figures.label_column(name, [None if v is None else value_text(v) for v in values], labels)
    low, high = min(dimension.low, *seen), max(dimension.high, *seen)
    log = isinstance(dimension, LogUniform) or (isinstance(dimension, Int) and dimension.log)
    return figures.number_column(name, values, low, high, log=log and low > 0)
