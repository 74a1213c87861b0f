"""The driver's loop: the same failure twice without a step in between ends the run."""

from concurrent.futures import Future
from typing import Any

import pytest

from cluster.run.driver import Fit
from cluster.worker.monitor import LocalMonitor

PROGRESS = {"kind": "progress", "rank": 0}


def failure(reason: str, raised: bool = True) -> dict[str, Any]:
    return {"kind": "failure", "rank": 0, "failed": 0, "reason": reason, "raised": raised}


@pytest.mark.parametrize(
    ("events", "refused"),
    [
        ([failure("RuntimeError: sizes differ")], False),
        ([failure("RuntimeError: sizes differ")] * 2, True),
        ([failure("RuntimeError: sizes differ"), PROGRESS, failure("RuntimeError: sizes differ")], False),
        ([failure("RuntimeError: sizes differ"), failure("RuntimeError: other")], False),
        ([failure("RuntimeError: Connection closed by peer")] * 2, False),
        ([failure("OutOfMemoryError: CUDA out of memory")] * 2, False),
        ([failure("the worker died", raised=False)] * 2, False),
    ],
)
def test_the_same_failure_twice_is_not_retried(events: list[dict[str, Any]], refused: bool) -> None:
    monitor = LocalMonitor()
    for event in events:
        monitor.push(event)
    done: Future[Any] = Future()
    done.set_result(None)
    fit = Fit(done, monitor)
    shown = [event for event in fit.events() if event["kind"] == "failure"]
    assert bool(fit.refused) == refused
    assert fit.outcome.get("status") == ("refused" if refused else None)
    assert len(shown) == sum(event["kind"] == "failure" for event in events) - refused
    if refused:
        assert "sizes differ" in fit.refused
