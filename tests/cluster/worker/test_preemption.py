"""Preemption: all workers ask for notices together, save, and exit as Ray Train expects."""

import pickle
from typing import Any

import pytest
import ray.train
from ray.exceptions import RayActorError

from cluster.run.trainer import FailureReporter
from cluster.worker.ray_train import PreemptionHook, exit_preempted
from perceiver.train.engine.protocol import StepResult
from perceiver.train.loop import Flags, StepInfo


def info(asked: bool) -> StepInfo:
    return StepInfo(1, 9, 0.1, 8, 0.1, 0.0, StepResult(0, 0.5, {}, 1.0, 0.1, False), Flags(ask_cluster=asked))


def test_all_ranks_ask_ray_train_together(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [None, "a node is drained"]
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: answers.pop(0), raising=False)
    hook = PreemptionHook(asks=False)  # as on every rank except the first, which decides when
    assert not hook.due()
    hook(info(False))
    assert len(answers) == 2
    hook(info(True))
    assert not hook.announced
    hook(info(True))
    assert hook.announced and answers == []


def test_the_exit_counts_as_a_preemption() -> None:
    with pytest.raises(RayActorError, match="step 7 ") as caught:
        exit_preempted(7)
    assert pickle.loads(pickle.dumps(caught.value)).preempted


def test_a_failure_that_ray_repeats_is_reported_once() -> None:
    events: list[dict[str, Any]] = []
    push = type("Push", (), {"remote": staticmethod(events.append)})
    reporter = FailureReporter(type("Monitor", (), {"push": push}))
    for error in (RuntimeError("one"), RuntimeError("one"), RuntimeError("two")):
        reporter.after_exception(run_context=None, worker_exceptions={1: error})
    assert [(event["failed"], event["reason"]) for event in events] == [
        (1, "RuntimeError: one"),
        (1, "RuntimeError: two"),
    ]
