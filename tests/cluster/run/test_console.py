"""The console output: a progress bar on a terminal, plain lines elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from cluster.record.failures import failure_reason, one_line
from cluster.run.console import RunConsole, duration


def progress(step: int, total: int = 100) -> dict[str, Any]:
    return {
        "kind": "progress",
        "rank": 0,
        "step": step,
        "total_steps": total,
        "epoch": step / 10,
        "loss": 0.25,
        "metrics": {"loss": 0.25, "accuracy": 0.5},
        "seconds": 0.5,
        "wait_seconds": 0.05,
        "samples": 64,
    }


def shown(terminal: bool, events: list[dict[str, Any]]) -> str:
    sink = io.StringIO()
    with RunConsole(Console(file=sink, force_terminal=terminal, width=200), line_every=0.0) as console:
        for event in events:
            console.show(event)
    return sink.getvalue()


def test_a_plain_line_shows_all_figures() -> None:
    text = shown(False, [progress(1), progress(50)])
    assert "epoch 5.0  step 50/100  loss 0.250  accuracy 50.0%  128 samples/s  data wait 10%  ETA 0:00" in text
    assert "\x1b" not in text and "━" not in text


def test_a_terminal_shows_a_progress_bar_with_the_same_figures() -> None:
    text = shown(True, [progress(1), progress(50)])
    assert "━" in text and "step 50/100" in text and "ETA" in text


def test_forced_colours_do_not_make_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert not RunConsole().live


def test_evaluations_failures_and_resumes_are_printed() -> None:
    text = shown(
        False,
        [
            {"kind": "metrics", "rank": 0, "step": 5, "metrics": {"eval/accuracy": 0.75, "eval/loss": 0.5}},
            {"kind": "metrics", "rank": 0, "step": 5, "metrics": {"train/loss": 0.5}},
            {"kind": "failure", "rank": 0, "failed": 1, "reason": "killed"},
            {"kind": "resumed", "rank": 0, "step": 4, "checkpoint": "s3://b/step-00000004"},
            {"kind": "unknown to the console", "rank": 0},
        ],
    )
    evaluation, failure, resumed = text.splitlines()
    assert evaluation == "  evaluation at step 5: accuracy 75.0%  loss 0.5"
    assert "worker 1 failed (killed)" in failure
    assert "step 4 " in resumed and "s3://b/step-00000004" in resumed


def test_durations() -> None:
    assert [duration(s) for s in (None, 5, 65, 3700)] == ["-:--", "0:05", "1:05", "1:01:40"]


def test_a_failure_is_one_line_without_rays_frames() -> None:
    class Group(Exception):
        worker_failures = {1: RuntimeError("Traceback\n  File x\nRuntimeError: out of memory"), 3: ValueError("late")}

    assert failure_reason(Group("long\ntext")) == "worker 1: RuntimeError: out of memory"
    assert one_line(AttributeError("no attribute 'x'\n\nTo change retry attempts, configure ...")) == (
        "AttributeError: no attribute 'x'"
    )
    assert one_line(KeyError()) == "KeyError"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError()])
def test_a_closed_terminal_does_not_end_the_run(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr("sys.stdout", Closed())
    monkeypatch.setattr("sys.stderr", Closed())
    console = RunConsole()
    console.say("one line")
    console.error("one more")
    console.close()
