"""The drawing of a table: each row's seeds, their mean and deviation, and the paper's figure in a column beside it."""

from collections.abc import Sequence

from perceiver.report.figures import FIRST, RULE, SECOND, TEXT, Drawing, chart, render
from tune.tables.results import Result, is_share

LINE_HEIGHT = 0.3
WIDTH = 10.8


def draw_results(found: Sequence[Result], metric: str) -> Drawing | None:
    """Draw the rows that have a score of ours; None if there is none.

    Args:
        found: all rows of the table, in its order.
        metric: name of what was measured.
    """
    shown = [result for result in found if result.mean is not None]
    if not shown:
        return None
    height = LINE_HEIGHT * len(shown) + 0.9
    picture, axes = chart(False, (WIDTH, height))
    picture.subplots_adjust(left=0.36, top=1 - 0.1 / height)
    for place, result in enumerate(shown):
        scores, mean, deviation = list(result.scores.values()), result.mean, result.deviation
        if result.row.paper is not None:
            axes.plot(result.row.paper, place, marker="D", markersize=5, color=SECOND, fillstyle="none", linestyle="")
        axes.scatter(scores, [place] * len(scores), s=12, color=TEXT, alpha=0.45, linewidth=0, zorder=3)
        axes.errorbar([mean or 0.0], [place], xerr=deviation, fmt="o", color=FIRST, markersize=6, capsize=3, zorder=4)
    axes.set_yticks(range(len(shown)), [result.row.label for result in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.grid(axis="x", color=RULE, linewidth=0.7)
    axes.set_xlabel(metric.replace("_", " ") + (", %" if is_share(metric) else ""), loc="right")
    note = "● ours: mean, deviation and single seeds. ◇ the paper's figure, measured on its own data."
    return Drawing("rows", "Ours beside the paper's", *render(picture, "rows"), note)
