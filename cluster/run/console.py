"""What the user sees while a run goes on: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Drawn(Protocol):
    """What is drawn over and over below the lines on a terminal: a bar, a table."""

    console: Console

    def stop(self) -> None:
        """Take it down."""
        ...


class LineConsole:
    """Prints lines; on a terminal above what is drawn there, if anything is."""

    def __init__(self, console: Console | None = None) -> None:
        # FORCE_COLOR, which notebooks set, asks for colours; it makes no terminal that lines could be rewritten on.
        terminal = None if sys.stdout.isatty() else False
        self.console = console or Console(highlight=False, soft_wrap=True, force_terminal=terminal)
        self.live = self.console.is_terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drawn(self) -> Drawn | None:
        """Return what is drawn at the moment."""
        return None

    def close(self) -> None:
        """Take down what is drawn; the lines stay."""
        if (drawn := self.drawn()) is not None:
            drawn.stop()

    def say(self, line: str) -> None:
        """Print one line."""
        drawn = self.drawn()
        (drawn.console if drawn is not None else self.console).print(line, markup=False)

    def error(self, text: str) -> None:
        """Print one line about what went wrong to stderr."""
        self.close()
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {text}", markup=False)


class RunConsole(LineConsole):
    """Shows the events that workers send. ``show`` takes one event; ``say`` prints a line of our own."""

    def __init__(self, console: Console | None = None, line_every: float = 10.0) -> None:
        super().__init__(console)
        self.line_every = line_every
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._began: tuple[float, int] | None = None
        self._world: int | None = None
        self.first_step_at: float | None = None

    def drawn(self) -> Progress | None:
        """Return the bar."""
        return self._bar

    def close(self) -> None:
        """Take the bar down."""
        super().close()
        self._bar = None

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event; kinds that have no handler are not for the user."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    # -- events ------------------------------------------------------------------------------------------------------

    def _on_resumed(self, event: Mapping[str, Any]) -> None:
        if event["rank"] == 0:
            self._began = None
            self.say(f"resumed at step {event['step']} from {_short(event['checkpoint'])}")

    def _on_ready(self, event: Mapping[str, Any]) -> None:
        before, world = self._world, event["world"]
        self._world = world
        if before not in (None, world):
            self.say(f"training goes on with {world} worker{'s' * (world > 1)} in place of {before}")

    def _on_failure(self, event: Mapping[str, Any]) -> None:
        self.say(f"worker {event['failed']} failed ({event['reason']}); the workers start again")

    def _on_hang(self, event: Mapping[str, Any]) -> None:
        self.say(f"worker {event['rank']} (process {event['pid']} on {event['host']}) {event['why']}: it is ended")

    def _on_rolled_back(self, event: Mapping[str, Any]) -> None:
        self.say(
            f"the loss of step {event['step']} was no number: back to the weights of step {event['target']}; "
            "the samples since then are passed over"
        )

    def _on_missed(self, event: Mapping[str, Any]) -> None:
        self.say(f"{event['reason']}; training goes on")

    def _on_unscored(self, event: Mapping[str, Any]) -> None:
        self.say(f"the evaluation of step {event['step']} failed ({event['reason']}); training goes on")

    def _on_metrics(self, event: Mapping[str, Any]) -> None:
        metrics = {k.removeprefix("eval/"): v for k, v in event["metrics"].items() if k.startswith("eval/")}
        if metrics:
            self.say(f"  evaluation at step {event['step']}: " + _pairs(metrics))

    def _on_progress(self, event: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if self.first_step_at is None:
            self.first_step_at = now
        if self._began is None:
            self._began = (now, event["step"])
        if self.live:
            self._advance(event)
        elif now - self._last_line >= self.line_every or event["step"] == event["total_steps"]:
            self._last_line = now
            self.say(f"  {_status(event)}  ETA {_duration(self._eta(event, now))}")

    def _eta(self, event: Mapping[str, Any], now: float) -> float | None:
        began, first = self._began or (now, event["step"])
        done = event["step"] - first
        return None if done <= 0 else (now - began) / done * (event["total_steps"] - event["step"])

    def _advance(self, event: Mapping[str, Any]) -> None:
        if self._bar is None:
            columns: tuple[ProgressColumn, ...] = (
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                _Elapsed(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=event["total_steps"], completed=event["step"])
            self._bar.start()
        self._bar.update(self._task, completed=event["step"], description=_status(event))


class _Elapsed(ProgressColumn):
    """Time since the bar began."""

    def render(self, task: Task) -> Text:
        """Return the elapsed time."""
        return Text(f"({_duration(task.elapsed)})")


def _short(url: str) -> str:
    """Return a local path as seen from this folder, if it lies below it."""
    here = f"{Path.cwd()}/"
    return url.removeprefix(here)


def _status(event: Mapping[str, Any]) -> str:
    """Return epoch, step, loss, metrics, samples/s and the share of time spent waiting for data."""
    seconds = max(event["seconds"], 1e-9)
    metrics = {k: v for k, v in event["metrics"].items() if k != "loss"}
    return (
        f"epoch {event['epoch']:.1f}  step {event['step']}/{event['total_steps']}  loss {event['loss']:.3f}  "
        f"{_pairs(metrics)}{'  ' if metrics else ''}{event['samples'] / seconds:,.0f} samples/s  "
        f"data wait {event['wait_seconds'] / seconds:.0%}"
    )


def _pairs(metrics: Mapping[str, float]) -> str:
    """Return ``name value`` pairs; shares such as accuracy in per cent, secondary ones (top-5) left to the report."""
    shown = {name: value for name, value in metrics.items() if not name.endswith("_top5")}
    return "  ".join(f"{k} {v:.1%}" if k.startswith("accuracy") else f"{k} {v:.4g}" for k, v in shown.items())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
