"""A worker on a node that is drained leaves in a way that Ray Train counts as a preemption."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor

from cluster.run.callbacks import FailureReporter
from cluster.runtime import drain


def test_nothing_is_announced_where_ray_train_does_not_run() -> None:
    assert drain.announced() is None


def test_the_note_that_ray_leaves_with_a_worker_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "preemption_context" in TrainContext.__dataclass_fields__
    context: Any = SimpleNamespace(preemption_context=PreemptionContext())
    monkeypatch.setattr("ray.train.v2._internal.execution.context._train_context", context)
    assert drain.announced() is None
    context.preemption_context.preemption_info = "drained"
    assert drain.announced() == "drained"


def test_leaving_counts_as_a_preemption_also_on_the_controllers_side() -> None:
    with pytest.raises(RayActorError, match="step 7 is saved") as caught:
        drain.leave(7)
    assert _is_preempted_actor(pickle.loads(pickle.dumps(caught.value)))


def test_a_failure_that_ray_tells_of_at_each_look_is_passed_on_once() -> None:
    events: list[dict[str, Any]] = []
    push = type("Push", (), {"remote": staticmethod(events.append)})
    reporter = FailureReporter(type("Monitor", (), {"push": push}))
    for error in (RuntimeError("one"), RuntimeError("one"), RuntimeError("two")):
        reporter.after_exception(run_context=None, worker_exceptions={1: error})
    assert [(event["failed"], event["reason"]) for event in events] == [
        (1, "RuntimeError: one"),
        (1, "RuntimeError: two"),
    ]
