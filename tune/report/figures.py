"""Drawings of a search's report: curves, the best so far, parallel coordinates, importance, Pareto front."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from perceiver.report.figures import FIRST, RULE, SECOND, TEXT, Drawing, chart, percent_axis, render
from tune.record import SearchRecord
from tune.report.importance import Importance
from tune.report.numbers import figure, short_keys
from tune.search.checks import number
from tune.space.space import Choice, Int, LogUniform, Space, Uniform

TICKS = 5
SHARE_TICKS = (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
NEAR_ONE = 0.9999
LABEL_LENGTH = 18


def is_share(name: str) -> bool:
    """Whether a metric is shown in per cent."""
    return name.startswith("accuracy")


def draw_trials(record: SearchRecord, metric: str, baseline: int | None) -> Drawing:
    """Draw one metric of every trial over epochs: the best strong, the baseline in the second colour."""
    picture, axes = chart(is_share(metric), (10.8, 3.6))
    best = record.best()
    for trial in record.trials:
        points = [
            (e.epoch, e.metrics[metric]) for e in trial.evaluations if math.isfinite(e.metrics.get(metric, math.nan))
        ]
        if not points:
            continue
        epochs, values = zip(*points, strict=True)
        style: dict[str, Any] = {"color": TEXT, "linewidth": 0.9, "alpha": 0.45, "zorder": 2}
        if best is not None and trial.number == best.number:
            style = {"color": FIRST, "linewidth": 2.2, "zorder": 4, "label": f"best: trial {trial.number}"}
        elif trial.number == baseline:
            style = {"color": SECOND, "linewidth": 1.8, "zorder": 3, "label": f"base recipe: trial {trial.number}"}
        axes.plot(epochs, values, **style)
        end = {"finished": "o", "stopped": "|"}.get(trial.status, "x")
        axes.plot(epochs[-1:], values[-1:], marker=end, markersize=5, color=style["color"], alpha=style.get("alpha", 1))
    _scale_shares(axes, metric, _all_values(record, metric))
    axes.set_xlabel("epoch", loc="right")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best", labelcolor=TEXT, handlelength=1.4)
    note = "Ends: ● came to its end, | stopped by the scheduler, × failed or not finished."
    return Drawing("trials", f"{metric.replace('_', ' ').capitalize()} of all trials", *render(picture, "trials"), note)


def _scale_shares(axes: Any, name: str, values: Sequence[float]) -> None:
    """Spread shares near 1 out, where good trials differ: equal steps halve or double the error."""
    if not is_share(name) or not values:
        return
    low, high = max(0.0, min(values)), min(NEAR_ONE, max(values))
    axes.set_yscale("function", functions=(_spread, lambda warped: 1 - 10.0 ** -np.asarray(warped)))
    axes.set_ylim(max(0.0, 1 - (1 - low) * 1.1), 1 - (1 - high) * 0.9)
    axes.set_yticks([tick for tick in SHARE_TICKS if low * 0.98 <= tick <= 1 - (1 - high) * 0.9])
    axes.yaxis.set_major_formatter(percent_axis())


def _spread(share: Any) -> Any:
    return -np.log10(1 - np.clip(share, 0, NEAR_ONE))


def _all_values(record: SearchRecord, metric: str) -> list[float]:
    found = [e.metrics.get(metric, math.nan) for trial in record.trials for e in trial.evaluations]
    return [value for value in found if math.isfinite(value)]


def draw_best(record: SearchRecord) -> Drawing | None:
    """Draw the best figure so far over what had been spent on training by then."""
    (metric, mode), *_ = record.metrics.items()
    events = sorted(
        (e.at, e.metrics[metric])
        for t in record.trials
        for e in t.evaluations
        if math.isfinite(e.metrics.get(metric, math.nan))
    )
    if len(events) < 2:
        return None
    began = min([t.started for t in record.trials if t.started] or [events[0][0]])
    minutes = [(at - began) / 60 for at, _ in events]
    better = np.maximum.accumulate if mode == "max" else np.minimum.accumulate
    best = better([value for _, value in events])
    picture, axes = chart(is_share(metric))
    axes.scatter(minutes, [v for _, v in events], s=7, color=TEXT, alpha=0.3, linewidth=0, zorder=2)
    axes.step(minutes, best, where="post", color=FIRST, linewidth=1.8, zorder=3)
    _scale_shares(axes, metric, [v for _, v in events])
    axes.set_xlabel("minutes since the first trial", loc="right")
    return Drawing("best", "Best so far", *render(picture, "best"), "Dots are single evaluations of any trial.")


def draw_importance(found: Importance) -> Drawing:
    """Draw the share of each key as a bar."""
    keys = short_keys(list(found.shares))
    picture, axes = chart(False, (5.2, max(1.4, 0.42 * len(keys) + 0.7)))
    picture.subplots_adjust(left=0.36)
    places = range(len(keys))
    axes.barh(places, list(found.shares.values()), color=FIRST, height=0.55)
    axes.set_yticks(places, keys, parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=RULE, linewidth=0.7)
    axes.xaxis.set_major_formatter(percent_axis())
    axes.set_xlim(0, max([*found.shares.values(), 0.01]) * 1.08)
    return Drawing("importance", "Share of the differences", *render(picture, "importance"), "")


def draw_front(record: SearchRecord) -> Drawing:
    """Draw the first two metrics against each other, the Pareto front joined."""
    first, second = list(record.metrics)[:2]
    trials = [t for t in record.trials if len(t.scores([first, second])) == 2]
    front = sorted((t.scores([first, second])[second], t.scores([first, second])[first]) for t in record.front())
    picture, axes = chart(is_share(first))
    points = [(t.scores([first, second])[second], t.scores([first, second])[first]) for t in trials]
    axes.scatter(*zip(*points, strict=True), s=16, color=TEXT, alpha=0.5, linewidth=0)
    if front:
        axes.plot(*zip(*front, strict=True), color=FIRST, marker="o", markersize=4.5, linewidth=1.4)
    if is_share(second):
        axes.xaxis.set_major_formatter(percent_axis())
    axes.set_xlabel(second, loc="right")
    return Drawing(
        "front", f"{first} against {second}", *render(picture, "front"), "The line joins what nothing beats in both."
    )


def draw_coordinates(record: SearchRecord, space: Space) -> Drawing | None:
    """Draw each trial as a line through its values, one axis a key and the metric last; the best trial stands out."""
    (metric, _), *_ = record.metrics.items()
    trials = [trial for trial in reversed(record.ranked()) if trial.values]
    keys = [key for key in space if any(key in trial.values for trial in trials)]
    if len(trials) < 2 or not keys:
        return None
    columns = [_scale(space[key], [t.values[key] for t in trials if key in t.values]) for key in keys]
    scores = [trial.scores([metric])[metric] for trial in trials]
    columns.append(_Scale.shares(scores) if is_share(metric) else _Scale.linear(min(scores), max(scores)))
    picture, axes = chart(False, (10.8, 3.9))
    picture.subplots_adjust(left=0.07, right=0.95, top=0.95, bottom=0.13)
    _axes(axes, [*short_keys(keys), metric], columns)
    best = record.best()
    for rank, (trial, score) in enumerate(zip(trials, scores, strict=True)):
        raw = [*(trial.values.get(key) for key in keys), score]
        heights = [math.nan if v is None else column.place(v) for column, v in zip(columns, raw, strict=True)]
        share = (rank + 1) / len(trials)
        chosen = best is not None and trial.number == best.number
        style: dict[str, Any] = {"color": FIRST, "linewidth": 0.8 + share, "alpha": 0.12 + 0.6 * share**2}
        if chosen:
            style = {"color": SECOND, "linewidth": 2.4, "zorder": 5}
        axes.plot(range(len(columns)), heights, solid_joinstyle="round", **style)
        for index in range(len(heights)):  # a value between two that are missing has no line
            axes.plot(
                index, heights[index], marker="o", markersize=3, color=style["color"], alpha=style.get("alpha", 1)
            )
    note = "The stronger a line, the better the trial; the best is in the second colour."
    return Drawing("coordinates", "Parallel coordinates", *render(picture, "coordinates"), note)


class _Scale:
    """One axis: where a value stands between 0 and 1, and which values are marked."""

    def __init__(self, place: Any, ticks: Sequence[tuple[float, str]]) -> None:
        self.place, self.ticks = place, ticks

    @classmethod
    def linear(cls, low: float, high: float, log: bool = False) -> "_Scale":
        """An axis of numbers."""
        warp = math.log if log else float
        low, high = (
            (low, high) if high > low else (low * 0.9 if low > 0 else low - 1, high * 1.1 if high > 0 else high + 1)
        )
        bottom, span = warp(low), warp(high) - warp(low)
        values = np.geomspace(low, high, TICKS) if log else np.linspace(low, high, TICKS)
        texts = [f"{v:.3g}" for v in values]
        return cls(
            lambda value: (warp(value) - bottom) / span, [(index / (TICKS - 1), t) for index, t in enumerate(texts)]
        )

    @classmethod
    def shares(cls, scores: Sequence[float]) -> "_Scale":
        """An axis of shares near 1, spread out as in the curves."""
        low, high = float(_spread(min(scores))), float(_spread(max(scores)))
        span = high - low or 1.0
        marks = [(low + span * index / (TICKS - 1)) for index in range(TICKS)]
        ticks = [((mark - low) / span, figure("accuracy", 1 - 10.0**-mark)) for mark in marks]
        return cls(lambda share: (float(_spread(share)) - low) / span, ticks)

    @classmethod
    def labels(cls, values: Sequence[str]) -> "_Scale":
        """An axis of categories, evenly spaced."""
        places = {v: (index + 0.5) / len(values) for index, v in enumerate(values)}
        return cls(lambda value: places[number(value)], [(p, _cut(v)) for v, p in places.items()])


def _scale(dimension: Any, seen: Sequence[Any]) -> _Scale:
    if isinstance(dimension, Choice) or any(not isinstance(v, int | float) for v in seen):
        offered = dimension.extremes()
        try:
            offered = sorted([*offered, *(v for v in seen if v not in offered)])
        except TypeError:
            offered = [*offered, *(v for v in seen if v not in offered)]
        return _Scale.labels(list(dict.fromkeys(number(v) for v in offered)))
    assert isinstance(dimension, Uniform | Int)
    low, high = min(dimension.low, *seen), max(dimension.high, *seen)
    log = isinstance(dimension, LogUniform) or (isinstance(dimension, Int) and dimension.log)
    return _Scale.linear(low, high, log=log and low > 0)


def _axes(axes: Any, names: Sequence[str], columns: Sequence[_Scale]) -> None:
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlim(-0.15, len(names) - 1 + 0.35)
    for index, column in enumerate(columns):
        axes.axvline(index, color=RULE, linewidth=1.2, zorder=1)
        for place, label in column.ticks:
            axes.text(
                index + 0.02, place, label, fontsize=8, color=TEXT, va="center", ha="left", parse_math=False, zorder=6
            )


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"
