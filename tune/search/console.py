"""The output of a running search: a live table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.run.console import LineConsole, Show, duration
from perceiver.tracking.printable import safe_line
from tune.report.numbers import figure, figures, short_keys, value_text, values_text
from tune.search_record import SearchRecord, TrialRecord

LINE_EVERY_S = 30.0
ROWS_SHOWN = 24
STYLES = {"running": "bold", "failed": "red", "stopped": "dim", "waiting": "dim", "unfinished": "yellow"}


class SearchConsole(LineConsole):
    """Shows a search: `say` prints a line, `news` takes an event of a trial, `refresh` redraws the table."""

    def __init__(self, record: SearchRecord, console: Console | None = None, show: Show = "shell") -> None:
        super().__init__(console, show)
        self.record = record
        self._progress: dict[int, Mapping[str, Any]] = {}
        self._began = time.monotonic()
        self._last_line = self._began
        self._table: Live | None = None

    def open(self) -> None:
        """Show the table, on a terminal."""
        if self.live and self._table is None:
            self._table = Live(self.table(), console=self.console, auto_refresh=False, transient=True)
            self._table.start()

    def drawn(self) -> Live | None:
        """Return the table."""
        return self._table

    def close(self) -> None:
        """Remove the table; the lines stay."""
        super().close()
        self._table = None

    def progress(self, event: Mapping[str, Any]) -> None:
        """Record the progress of a trial."""
        self._progress[int(event["trial"])] = event

    def refresh(self) -> None:
        """Redraw the table; without one, print a summary from time to time."""
        if self._table is not None:
            self._table.update(self.table(), refresh=True)
            return
        if time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"  {duration(time.monotonic() - self._began)}  {self.summary()}")

    def news(self, what: str, trial: TrialRecord) -> None:
        """Print an event of a trial."""
        line = news_line(what, trial, self.record)
        if line and not (self.live and what == "evaluated"):
            self.say(line)

    def summary(self) -> str:
        """Return the number of trials by status, and the best so far."""
        counts: dict[str, int] = {}
        for trial in self.record.trials:
            counts[trial.status] = counts.get(trial.status, 0) + 1
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        best = None if self.record.trials and self.record.trials[0].label else self.record.best()
        return text + (f"; best trial {best.number}: {figures(best, self.record)}" if best else "")

    def table(self) -> Group:
        """Return a summary and the trials as a table: running ones first, then by rank."""
        named = any(trial.label for trial in self.record.trials)
        keys = [] if named else list(dict.fromkeys(key for trial in self.record.trials for key in trial.values))
        table = Table(box=None, pad_edge=False, header_style="dim")
        what = ["row"] if named else short_keys(keys)
        for column in ("trial", "status", *what, "epoch", *self.record.metrics, "samples/s", "time"):
            table.add_column(
                Text(safe_line(column)), justify="left" if column in ("status", "row") else "right", no_wrap=True
            )
        ranked = {trial.number: rank for rank, trial in enumerate(self.record.ranked())}
        trials = sorted(
            self.record.trials, key=lambda t: (t.status != "running", ranked.get(t.number, len(ranked)), t.number)
        )
        for trial in trials[:ROWS_SHOWN]:
            table.add_row(*(Text(safe_line(cell)) for cell in self._cells(trial, keys)), style=STYLES.get(trial.status))
        if len(trials) > ROWS_SHOWN:
            table.caption = f"and {len(trials) - ROWS_SHOWN} more"
        return Group(Text(safe_line(self.summary())), table)

    def _cells(self, trial: TrialRecord, keys: list[str]) -> list[str]:
        event = self._progress.get(trial.number, {}) if trial.status == "running" else {}
        speed = event.get("throughput") or trial.samples_per_s
        scores = trial.scores(list(self.record.metrics))
        return [
            str(trial.number),
            trial.status,
            *([trial.label] if trial.label else (value_text(trial.values.get(key, "")) for key in keys)),
            f"{event.get('epoch', trial.epoch):.1f}",
            *(figure(name, scores.get(name)) for name in self.record.metrics),
            f"{speed:,.0f}" if speed else "",
            duration(trial.seconds),
        ]


def news_line(what: str, trial: TrialRecord, record: SearchRecord) -> str:
    """Return the line about an event of a trial, empty if it is not printed."""
    name = f"trial {trial.number}"
    reached = (
        f"after {trial.epoch:.4g} epochs: {figures(trial, record)}" if trial.evaluations else "before an evaluation"
    )
    match what:
        case "started":
            again = f", attempt {trial.attempts}" if trial.attempts > 1 else ""
            return "" if trial.exchanges or (again and not trial.reason) else f"{name} starts{again}  {_values(trial)}"
        case "evaluated":
            return f"  {name}  epoch {trial.epoch:.4g}  {figures(trial, record)}"
        case "finished":
            return f"{name} finished {reached}"
        case "stopped":
            return f"{name} stopped by the scheduler {reached}"
        case "failed":
            return f"{name} failed: {trial.reason}"
        case "again":
            return f"{name} failed ({trial.reason}) and restarts from its checkpoint"
        case "exchanged":
            last = trial.exchanges[-1]
            return f"{name} continues from trial {last.donor}'s weights of step {last.step} with {_values(trial)}"
        case "unfinished":
            return f"{name} saved {reached}"
    return ""


def _values(trial: TrialRecord) -> str:
    return trial.label or values_text(trial.values)
