"""The end of a run: what a driver that dies there leaves is concluded by --resume, all sessions count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cluster.recipe.config import Recipe, build_recipe
from cluster.record.run_folder import RunFolder
from cluster.record.sessions import begin_session, work_time
from cluster.run import launch as launching
from cluster.run.context import Launch
from cluster.runtime.session import tracking_of
from perceiver.config import UserError
from perceiver.factory import build_model
from perceiver.tracking.record import HISTORY
from perceiver.tracking.runs import create_run, load_handle
from perceiver.train.checkpoint.store import Snapshot
from tests.perceiver.train.toy import toy_engine

FIGURES = {"accuracy": 0.75, "loss": 0.5}


class Died(BaseException):
    """The driver ends at this place."""


def died(*_: Any) -> None:
    raise Died


class Workers:
    """Stands for the workers: saves the checkpoint of the last step and writes the weights."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def __call__(self, launch: Launch) -> dict[str, Any]:
        recipe, folder, step = launch.recipe, launch.folder, launch.preflight.total_steps
        self.starts.append(launch.start_step)
        handle = None
        if recipe.tracking.enabled:
            config = tracking_of(recipe.tracking, folder, recipe.name)
            known = {"changes": launch.change_tag, "resume": load_handle(folder.local)}
            handle = create_run(config, folder.name, output=folder.local, params={}, **known)
        model = build_model(recipe.model, classes=2)
        if launch.start_step < step:
            shapes = {name: list(p.shape) for name, p in model.named_parameters()}
            row = json.dumps({"step": step, "time": 1.0, "train/loss": 0.5}) + "\n"
            tree = recipe.model_dump(mode="json")
            folder.checkpoints.save(toy_engine(), Snapshot(step, 16 * step, {}, shapes, tree, {}, row))
        folder.write("model.safetensors", safetensors.torch.save(model.state_dict()))
        return {"status": "finished", "step": step, "total_steps": step, "evaluation": FIGURES, "handle": handle}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.setattr(launching, "run_workers", found := Workers())
    torch.manual_seed(0)
    return found


def train(tree: dict[str, Any], resume: bool = False) -> int:
    return launching.launch_training(build_recipe(tree), command="perceiver train small.yaml", resume=resume).code


def folder_of(tree: dict[str, Any]) -> RunFolder:
    recipe: Recipe = build_recipe(tree)
    return RunFolder(recipe.output, "small-001")


@pytest.mark.parametrize(
    "place", ["cluster.run.report.build_report", "cluster.run.result.open_tracker", "cluster.run.result.note_end"]
)
def test_a_driver_that_dies_while_it_concludes(
    tree: dict[str, Any],
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    tree["tracking"] = {"enabled": False}
    with monkeypatch.context() as broken, pytest.raises(Died):
        broken.setattr(place, died)
        train(tree)
    folder = folder_of(tree)
    assert folder.facts()["status"] == "running"
    assert train(tree, resume=True) == 0
    assert workers.starts == [0, 10]
    facts = folder.facts()
    assert (facts["status"], facts["step"], facts["evaluation"]) == ("finished", 10, FIGURES)
    assert folder.exists("report/index.html") and "is finished" not in capsys.readouterr().out
    assert len(facts["sessions"]) == 2 and all(end is not None for _, end in facts["sessions"])

    assert train(tree, resume=True) == 0
    assert workers.starts == [0, 10] and "is finished (step 10)" in capsys.readouterr().out
    assert len(folder.facts()["sessions"]) == 2, "nothing was done"


def test_mlflow_learns_of_the_end_the_changes_and_the_time(
    tree: dict[str, Any], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as broken, pytest.raises(Died):
        broken.setattr("cluster.run.report.build_report", died)
        train(tree)
    folder = folder_of(tree)
    handle = load_handle(folder.local)
    assert handle is not None and handle.run_id
    client = MlflowClient(handle.uri)
    assert client.get_run(handle.run_id).info.status == "RUNNING"
    tree["cluster"]["workers"] = 1
    assert train(tree, resume=True) == 0
    run = client.get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["changed.step-00000010"] == "cluster.workers: 2 -> 1"
    assert float(run.data.tags["wall_time_s"]) >= 0.0
    assert folder.facts()["changes"] == {"changed.step-00000010": "cluster.workers: 2 -> 1"}
    assert "changed at step 10" in str(folder.read("report/index.html"))


def test_the_files_of_a_finished_run_stay_until_the_longer_run_has_its_own(
    tree: dict[str, Any], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["tracking"] = {"enabled": False}
    assert train(tree) == 0
    folder = folder_of(tree)
    parts = ["model.safetensors", "report/index.html"]
    before = {part: Path(folder.location(part)).read_bytes() for part in parts}
    tree["train"]["epochs"] = 4
    monkeypatch.setattr(launching, "run_workers", lambda launch: {"status": "stopped", "step": 15, "total_steps": 20})
    assert train(tree, resume=True) == 130
    assert folder.facts()["status"] == "stopped"
    assert {part: Path(folder.location(part)).read_bytes() for part in parts} == before


def test_a_start_that_is_refused_is_recorded(
    tree: dict[str, Any], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(launch: Launch) -> dict[str, Any]:
        raise UserError("the cluster does not answer")

    monkeypatch.setattr(launching, "run_workers", refuse)
    with pytest.raises(UserError, match="does not answer"):
        train(tree)
    facts = folder_of(tree).facts()
    assert facts["status"] == "refused" and facts["sessions"][0][1] is not None


def test_a_finished_run_keeps_its_recipe(tree: dict[str, Any], workers: Workers) -> None:
    tree["tracking"] = {"enabled": False}
    assert train(tree) == 0
    recipe = folder_of(tree).read("recipe.yaml")
    tree["train"]["epochs"] = 1
    assert train(tree, resume=True) == 0
    assert folder_of(tree).read("recipe.yaml") == recipe and len(workers.starts) == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda now: monkeypatch.setattr("cluster.record.sessions.time.time", lambda: now)


def test_the_time_of_all_sessions_counts_without_the_pauses(tmp_path: Path, clock: Callable[[float], None]) -> None:
    """The first driver was killed: its last recorded metrics are its end."""
    folder = RunFolder(str(tmp_path), "small-001")
    clock(1100.0)
    begin_session(folder, 1000.0, None)
    assert work_time(folder) == (100.0, 1)
    (folder.local / HISTORY).write_text('{"step": 1, "time": 1030.0}\n{"step": 2, "time": 1060.0}\n')
    begin_session(folder, 5000.0, None)
    clock(5007.0)
    assert work_time(folder) == (67.0, 2)
    assert str(work_time(folder)) == "67 s in 2 sessions, start-ups included"
