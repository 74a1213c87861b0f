"""The driver's end of asynchronous evaluation, and its files in the run's folder."""

import math
from typing import Any

import pytest
import ray
from ray.exceptions import RaySystemError

from cluster.recipe.config import build_recipe
from cluster.recipe.placement import Node, check_evaluation
from cluster.recipe.resources import ClusterConfig
from cluster.record.run_folder import RunFolder
from cluster.run.console import RunConsole
from cluster.worker.evaluation import EvaluationTasks, read_scores
from perceiver.config import UserError


class FakeRay:
    """A stand-in for Ray and the monitor: a task is its step, and ends when the test sets `outcome`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.posted: list[dict[str, Any]] = []
        self.outcome: Any = None
        self.post = self.posted.append
        monkeypatch.setattr(EvaluationTasks, "start_task", self.start)
        monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs if self.outcome is not None else [], []))
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(ray, "cancel", lambda ref, force: self.cancelled.append(ref))

    def start(self, step: int) -> int:
        self.started.append(step)
        return step

    def get(self, ref: int) -> Any:
        outcome, self.outcome = self.outcome, None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return FakeRay(monkeypatch)


def evaluations(fake: FakeRay, tree: dict[str, Any], shown: list[dict[str, Any]]) -> EvaluationTasks:
    return EvaluationTasks(build_recipe(tree), RunFolder(tree["output"], "small-001"), fake, shown.append)


def test_metrics_are_stored_and_sent(fake: FakeRay, tree: dict[str, Any]) -> None:
    shown: list[dict[str, Any]] = []
    driver = evaluations(fake, tree, shown)
    driver.note({"kind": "progress", "step": 1})
    driver.note({"kind": "evaluate", "step": 5})
    driver.note({"kind": "evaluate", "step": 5})  # a restarted worker requests it again
    driver.collect()
    assert fake.started == [5] and not fake.posted
    fake.outcome = {"accuracy": 0.5, "loss": math.nan}
    driver.collect()
    assert fake.posted[0]["step"] == 5 and fake.posted[0]["metrics"]["accuracy"] == 0.5 and not shown
    scores = read_scores(driver.folder)
    assert list(scores) == [5] and scores[5]["accuracy"] == 0.5 and math.isnan(scores[5]["loss"])


def test_a_new_request_replaces_the_running_evaluation(fake: FakeRay, tree: dict[str, Any]) -> None:
    driver = evaluations(fake, tree, [])
    driver.note({"kind": "evaluate", "step": 5})
    driver.note({"kind": "evaluate", "step": 10})
    assert fake.started == [5, 10] and fake.cancelled == [5]
    driver.cancel()
    assert fake.cancelled == [5, 10]


@pytest.mark.parametrize("error", [UserError("9 bad samples in 20 read"), RaySystemError("9 bad samples in 20 read")])
def test_a_failed_evaluation_is_reported_and_the_run_continues(
    fake: FakeRay, tree: dict[str, Any], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[dict[str, Any]] = []
    driver = evaluations(fake, tree, shown)
    driver.note({"kind": "evaluate", "step": 5})
    fake.outcome = error
    driver.collect()
    assert fake.posted == [{"step": 5, "metrics": {}}] and read_scores(driver.folder) == {}
    RunConsole().show(shown[0])
    said = capsys.readouterr().out
    assert "step 5 failed (" in said and "9 bad samples" in said


def test_a_run_without_a_gpu_for_evaluations_is_refused() -> None:
    nodes = [Node("a", {"CPU": 8.0, "GPU": 2.0}), Node("b", {"CPU": 8.0, "GPU": 1.0})]
    check_evaluation(ClusterConfig(workers=2, gpus_per_worker=1), nodes)
    check_evaluation(ClusterConfig(workers=9), nodes)
    with pytest.raises(UserError, match=r"train\.eval_async .*1 GPU .*cluster\.workers = 3.* 3:"):
        check_evaluation(ClusterConfig(workers=3, gpus_per_worker=1), nodes)
