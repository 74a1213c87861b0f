"""The driver's end of evaluations beside training, and what it leaves in the run's folder."""

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
from cluster.run.evaluation import EvaluationTasks, read_scores
from perceiver.config import UserError


class Desk:
    """Stands for Ray and for the monitor: tasks are the steps, and end when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.posted: list[dict[str, Any]] = []
        self.outcome: Any = None
        self.post = self.posted.append
        monkeypatch.setattr(EvaluationTasks, "_start", self.start)
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
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


def evaluations(desk: Desk, tree: dict[str, Any], shown: list[dict[str, Any]]) -> EvaluationTasks:
    return EvaluationTasks(build_recipe(tree), RunFolder(tree["output"], "small-001"), desk, shown.append)


def test_figures_are_kept_and_passed_on(desk: Desk, tree: dict[str, Any]) -> None:
    shown: list[dict[str, Any]] = []
    driver = evaluations(desk, tree, shown)
    driver.note({"kind": "progress", "step": 1})
    driver.note({"kind": "evaluate", "step": 5})
    driver.note({"kind": "evaluate", "step": 5})  # a worker that has started again asks once more
    driver.collect()
    assert desk.started == [5] and not desk.posted
    desk.outcome = {"accuracy": 0.5, "loss": math.nan}
    driver.collect()
    assert desk.posted[0]["step"] == 5 and desk.posted[0]["metrics"]["accuracy"] == 0.5 and not shown
    scores = read_scores(driver.folder)
    assert list(scores) == [5] and scores[5]["accuracy"] == 0.5 and math.isnan(scores[5]["loss"])


def test_another_step_takes_the_place_of_one_that_nobody_waits_for(desk: Desk, tree: dict[str, Any]) -> None:
    driver = evaluations(desk, tree, [])
    driver.note({"kind": "evaluate", "step": 5})
    driver.note({"kind": "evaluate", "step": 10})
    assert desk.started == [5, 10] and desk.cancelled == [5]
    driver.cancel()
    assert desk.cancelled == [5, 10]


@pytest.mark.parametrize("error", [UserError("9 bad samples in 20 read"), RaySystemError("9 bad samples in 20 read")])
def test_one_that_fails_costs_its_figures_and_a_line(
    desk: Desk, tree: dict[str, Any], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[dict[str, Any]] = []
    driver = evaluations(desk, tree, shown)
    driver.note({"kind": "evaluate", "step": 5})
    desk.outcome = error
    driver.collect()
    assert desk.posted == [{"step": 5, "metrics": {}}] and read_scores(driver.folder) == {}
    RunConsole().show(shown[0])
    said = capsys.readouterr().out
    assert "the evaluation of step 5 failed (" in said and "9 bad samples" in said and "training goes on" in said


def test_a_run_without_a_gpu_left_for_it_is_refused() -> None:
    nodes = [Node("a", {"CPU": 8.0, "GPU": 2.0}), Node("b", {"CPU": 8.0, "GPU": 1.0})]
    check_evaluation(ClusterConfig(workers=2, gpus_per_worker=1), nodes)
    check_evaluation(ClusterConfig(workers=9), nodes)
    with pytest.raises(UserError, match=r"takes 1 GPU beside those of cluster.workers = 3; there are 3 in all: lower"):
        check_evaluation(ClusterConfig(workers=3, gpus_per_worker=1), nodes)
