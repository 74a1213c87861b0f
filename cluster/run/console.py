"""The console output of a run: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from perceiver.storage import shortened
from perceiver.tracking.printable import safe_line

log = logging.getLogger(__name__)

Show = Literal["shell", "progress", "nothing"]
"""What a run prints: everything, with errors and the next commands, as in a shell; only its progress; or nothing."""


class Drawn(Protocol):
    """A live display below the lines on a terminal, such as a bar or a table."""

    console: Console

    def stop(self) -> None:
        """Remove the display."""
        ...


class _Output:
    """A stream whose errors are ignored: a closed terminal, or a pipe that nobody reads, does not end a run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, if the stream takes it."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it takes that."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LineConsole:
    """Prints lines, on a terminal above the live display, if there is one.

    Args:
        console: where to print; default: stdout.
        show: what to print.
    """

    def __init__(self, console: Console | None = None, show: Show = "shell") -> None:
        self.shell = show == "shell"
        # Notebooks set FORCE_COLOR, but are not terminals on which lines can be rewritten.
        terminal = None if sys.stdout.isatty() else False
        output: Any = _Output(sys.stdout)
        self.console = console or Console(
            file=output,
            highlight=False,
            soft_wrap=True,
            force_terminal=terminal,
            force_jupyter=False,  # a line would be a page of HTML
            quiet=show == "nothing",
        )
        self.live = self.console.is_terminal and show != "nothing"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drawn(self) -> Drawn | None:
        """Return the live display, None without one."""
        return None

    def close(self) -> None:
        """Remove the live display; the lines stay."""
        if (drawn := self.drawn()) is not None:
            drawn.stop()

    def say(self, line: str) -> None:
        """Print one line, and write it to the driver's log."""
        log.info("%s", line)
        drawn = self.drawn()
        (drawn.console if drawn is not None else self.console).print(safe_line(line), markup=False)

    def error(self, text: str) -> None:
        """Print an error to stderr, in a shell, and write it to the driver's log."""
        log.info("error: %s", text)
        self.close()
        if not self.shell:  # the caller raises it
            return
        output: Any = _Output(sys.stderr)
        Console(file=output, highlight=False, soft_wrap=True).print(safe_line(f"error: {text}"), markup=False)


class RunConsole(LineConsole):
    """Shows the events of the workers."""

    def __init__(self, console: Console | None = None, line_every: float = 10.0, show: Show = "shell") -> None:
        super().__init__(console, show)
        self.line_every = line_every
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._began: tuple[float, int] | None = None
        self._world: int | None = None
        self.first_step_at: float | None = None

    def drawn(self) -> Progress | None:
        """Return the progress bar, None without one."""
        return self._bar

    def close(self) -> None:
        """Remove the progress bar."""
        super().close()
        self._bar = None

    def show(self, event: Mapping[str, Any]) -> None:
        """Show an event; kinds without a handler are not shown."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    # -- events ------------------------------------------------------------------------------------------------------

    def _on_resumed(self, event: Mapping[str, Any]) -> None:
        if event["rank"] == 0:
            self._began = None
            self.say(f"resumed at step {event['step']} from {shortened(event['checkpoint'])}")

    def _on_ready(self, event: Mapping[str, Any]) -> None:
        before, world = self._world, event["world"]
        self._world = world
        if before not in (None, world):
            self.say(f"training continues with {world} worker{'s' * (world > 1)} instead of {before}")

    def _on_failure(self, event: Mapping[str, Any]) -> None:
        self.say(f"worker {event['failed']} failed ({event['reason']}); restarting the workers")

    def _on_hang(self, event: Mapping[str, Any]) -> None:
        self.say(f"worker {event['rank']} (process {event['pid']} on {event['host']}) {event['why']}: killing it")

    def _on_straggler(self, event: Mapping[str, Any]) -> None:
        self.say(straggler_line(event))

    def _on_rolled_back(self, event: Mapping[str, Any]) -> None:
        self.say(
            f"the loss of step {event['step']} was {event['reason']}: rolled back to the weights of step "
            f"{event['target']}; the samples since then are skipped"
        )

    def _on_missed(self, event: Mapping[str, Any]) -> None:
        self.say(f"{event['reason']}; training continues")

    def _on_early_stop(self, event: Mapping[str, Any]) -> None:
        self.say(f"the run ends at step {event['step']}: {event['reason']}")

    def _on_unscored(self, event: Mapping[str, Any]) -> None:
        self.say(f"the evaluation of step {event['step']} failed ({event['reason']}); training continues")

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
            self.say(f"  {_status(event)}  ETA {duration(self._eta(event, now))}")

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
        self._bar.update(self._task, completed=event["step"], description=escape(safe_line(_status(event))))


class _Elapsed(ProgressColumn):
    """Column of the time since the bar was created."""

    def render(self, task: Task) -> Text:
        """Return the elapsed time."""
        return Text(f"({duration(task.elapsed)})")


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
    """Return ``name value`` pairs: accuracies in per cent, top-5 metrics omitted."""
    shown = {name: value for name, value in metrics.items() if not name.endswith("_top5")}
    return "  ".join(f"{k} {v:.1%}" if k.startswith("accuracy") else f"{k} {v:.4g}" for k, v in shown.items())


def straggler_line(event: Mapping[str, Any]) -> str:
    """Return one line about a slow worker."""
    return (
        f"worker {event['rank']} on {event['node']} ({event['ip']}) is slow: its forward passes take "
        f"{event['forward_s']:.3g} s per step, {event['times']:.1f} times the median of the workers "
        f"({event['median_s']:.3g} s)"
    )


def duration(seconds: float | None) -> str:
    """Return seconds as 0:05, 1:05 or 1:01:40; -:-- for None."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
