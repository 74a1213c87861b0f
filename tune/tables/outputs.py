"""A table as Markdown, HTML, JSON and lines for the terminal: pure functions of the results."""

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.run.console import duration
from perceiver.report import figures
from perceiver.report.page import render
from perceiver.tracking.printable import markdown_text
from perceiver.tracking.redaction import MASK, is_secret_key, redact_text
from tune.tables.config import Scale, ScaleName, TableConfig
from tune.tables.results import JudgedClaim, RowResult, is_share, seed_noise

HEAD = ("row", "paper", "ours", "seeds", "parameters", "FLOPs", "wall time")
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NOT_RUN = "not run at this scale"
OPEN = "Settings that the papers do not give, with those of the full scale"


@dataclass(frozen=True)
class TableReport:
    """The content of the outputs.

    Attributes:
        table: the table.
        scale: its scale.
        found: a result for each row, in the table's order.
        judged: the claims.
        command: the command line.
        machine: description of the machine or cluster.
        seconds: wall time of all trials, including start-up.
        status: finished, stopped or failed.
        date: day of the end; default: today.
    """

    table: TableConfig
    scale: ScaleName
    found: Sequence[RowResult]
    judged: Sequence[JudgedClaim]
    command: str
    machine: str
    seconds: float
    status: str = "finished"
    date: str = ""

    @property
    def common(self) -> Scale:
        """Return the settings that all rows share."""
        return self.table.scale(self.scale)

    @property
    def facts(self) -> dict[str, str]:
        """Return the facts about the measurement by caption."""
        ended = {} if self.status == "finished" else {"status": f"{self.status}: not all trials finished"}
        noise, measure = seed_noise(self.found), self.common.metric.replace("_", " ")
        models = "; small models of the same structure" if self.scale == "small" else ""
        known = f"{noise or 0:.2f} points of standard deviation over seeds, pooled over the rows"
        return {
            "paper": f"{self.table.figure}; {self.table.source}",
            "ours": f"{measure} (mean ± standard deviation over seeds); {self.common.data}{models}",
            "noise": known if noise is not None else "unknown with one seed",
            "wall time": f"of one trial's training, including evaluations; {duration(self.seconds)} for all trials",
            "machine": self.machine,
            "command": _safe(self.command),
            "date": self.date or time.strftime("%Y-%m-%d"),
            **ended,
        }


def _safe(command: str) -> str:
    """Return a command without the values of keys that name secrets."""
    pairs = [(word, *word.partition("=")[::2]) for word in shlex.split(redact_text(command))]
    return shlex.join(f"{key}={MASK}" if value and is_secret_key(key) else word for word, key, value in pairs)


def head(table: TableConfig) -> list[str]:
    """Return the captions of the columns."""
    also = [metric.replace("_", " ") for metric in table.also]
    return [*HEAD[:3], *also, *HEAD[3:-1], *(["input RF"] if table.input_rf else []), HEAD[-1]]


def cells(result: RowResult, table: TableConfig) -> list[str]:
    """Return a row of the table, in the order of `head`."""
    paper = "–" if result.row.paper is None else f"{result.row.paper:.1f}"
    if result.cost is None:
        return [result.row.label, paper, *["–"] * (len(head(table)) - 2)]
    also = [_measured(result.of(metric)) for metric in table.also]
    wall = "–" if result.wall is None else duration(result.wall)
    cost = [short(result.cost.parameters), short(result.cost.flops)]
    if table.input_rf:
        cost.append("–" if result.cost.input_rf is None else f"{result.cost.input_rf:,}")
    return [result.row.label, paper, _measured(result), *also, str(len(result.scores)), *cost, wall]


def _measured(result: RowResult) -> str:
    """Return the mean over seeds with its deviation."""
    if result.mean is None:
        return "–"
    return f"{result.mean:.1f}" + ("" if result.deviation is None else f" ± {result.deviation:.1f}")


def short(count: float) -> str:
    """Return a count with three digits and a unit: 44.9M, 707G."""
    for size, unit in UNITS:
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def notes(found: Sequence[RowResult]) -> Iterator[str]:
    """Yield the remarks on single rows: sources, notes, rows that were not run, seeds that failed."""
    for result in found:
        row = result.row
        said = [f"the paper's result: {row.source}"] if row.source else []
        said += [row.note] if row.note else []
        said += [NOT_RUN] if result.cost is None else []
        said += [f"seed {seed}: {redact_text(reason)}" for seed, reason in sorted((result.failed or {}).items())]
        if said:
            yield f"{row.label}: {'; '.join(said)}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of aligned columns."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def markdown(report: TableReport) -> str:
    """Return the table, the claims and the facts as Markdown."""
    captions = head(report.table)
    lines = [
        f"## {markdown_text(report.table.title)} ({report.scale} scale)",
        "",
        f"| {' | '.join(captions)} |",
        "|---" + "|---:" * (len(captions) - 1) + "|",
    ]
    lines += [f"| {' | '.join(map(markdown_text, cells(result, report.table)))} |" for result in report.found]
    if report.judged:
        lines += ["", "| claim of the paper | here | |", "|---|---|---|"]
        lines += [f"| {markdown_text(j.claim.text)} | {j.verdict} | {markdown_text(j.reason)} |" for j in report.judged]
    lines += ["", *(f"- {caption}: {markdown_text(text)}" for caption, text in report.facts.items())]
    lines += [f"- {markdown_text(note)}" for note in notes(report.found)]
    if report.table.open:
        lines += ["", f"{OPEN}:", "", *(f"- {markdown_text(line)}" for line in report.table.open)]
    return "\n".join(lines) + "\n"


def write_json(report: TableReport) -> str:
    """Return the report as JSON, with the score of each seed."""
    rows = [
        {
            "name": result.row.name,
            "label": result.row.label,
            "paper": result.row.paper,
            "mean": result.mean,
            "deviation": result.deviation,
            "scores": {str(seed): score for seed, score in sorted(result.scores.items())},
            "failed": {str(seed): redact_text(reason) for seed, reason in sorted((result.failed or {}).items())},
            "parameters": result.cost.parameters if result.cost else None,
            "flops": result.cost.flops if result.cost else None,
            "input_rf": result.cost.input_rf if result.cost else None,
            "seconds": result.wall,
            "run": result.cost is not None,
        }
        for result in report.found
    ]
    tree = {
        "table": report.table.name,
        "scale": report.scale,
        "status": report.status,
        "metric": report.common.metric,
        "rows": rows,
        "claims": [
            {"text": j.claim.text, "rows": j.claim.rows, "verdict": j.verdict, "reason": j.reason}
            for j in report.judged
        ],
        "noise": seed_noise(report.found),
        "facts": report.facts,
        "open": report.table.open,
        "seconds": report.seconds,
    }
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def write_page(report: TableReport) -> str:
    """Return the table as one self-contained HTML page with a chart."""
    return render(
        "table.html",
        kind=f"Our results and the paper's, {report.scale} scale",
        name=report.table.title,
        measured=report.facts,
        columns=head(report.table),
        rows=[{"cells": cells(result, report.table), "run": result.cost is not None} for result in report.found],
        judged=report.judged,
        notes=list(notes(report.found)),
        open_title=OPEN,
        open=report.table.open,
        drawing=_draw_results(report.found, report.common.metric),
    )


def _draw_results(found: Sequence[RowResult], metric: str) -> figures.Drawing | None:
    """Draw each row's seeds with mean and deviation, and the paper's result; None if no row has a score."""
    shown = [result for result in found if result.mean is not None]
    if not shown:
        return None
    lines: list[figures.Line] = []
    for place, result in enumerate(shown):
        mean, spread = result.mean or 0.0, result.deviation or 0.0
        ours, paper = {"color": figures.FIRST}, {"color": figures.SECOND, "fillstyle": "none"}
        if result.row.paper is not None:
            lines.append((result.row.paper, place, {**figures.DOTS, **paper, "marker": "D", "markersize": 5}))
        lines.append(([mean - spread, mean + spread], [place] * 2, {**ours, "marker": "|" if spread else ""}))
        lines.append((mean, place, {**figures.DOTS, **ours}))
        seeds = {**figures.DOTS, "color": figures.TEXT, "markersize": 3.5, "alpha": 0.6}
        lines.append((list(result.scores.values()), [place] * len(result.scores), seeds))
    return figures.plot(
        "rows",
        "Our results and the paper's",
        lines,
        "● ours: mean, deviation and single seeds. ◇ the paper's result on its data.",
        size=(figures.FULL[0], 0.3 * len(shown) + 0.9),
        grid="both",
        xlabel=metric.replace("_", " ") + (", %" if is_share(metric) else ""),
        **figures.named_rows([result.row.label for result in shown]),
    )
