"""A resumed search is the same search: its data are compared, and what its driver did not write is written."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from cluster.recipe.preflight import data_facts
from cluster.record.run_folder import RunFolder
from perceiver.config import UserError
from perceiver.factory import build_model
from pipelines.shards.manifest import load_manifest
from tests.cluster.recipes import prepare_images
from tests.tune.searches import load, trial, write_search
from tune.search import launch as launching
from tune.search.state import SearchLaunch
from tune.search_record import save_record


class Died(BaseException):
    """The driver ends at this place."""


def died(*_: Any) -> None:
    raise Died


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[SearchLaunch]:
    """Return the launches whose trials were run; they are not run really."""
    found: list[SearchLaunch] = []

    def search(launch: SearchLaunch) -> dict[str, Any]:
        found.append(launch)
        launch.record.trials += [trial(number, "finished", 0.5, 0.9) for number in range(launch.total)]
        save_record(launch.record, launch.folder)
        return {"status": "finished"}

    monkeypatch.setattr(launching, "_search", search)
    return found


def test_a_driver_that_dies_while_it_concludes(
    tmp_path: Path,
    tree: dict[str, Any],
    searches: list[SearchLaunch],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree["overrides"] = {"tracking": {"enabled": False}}
    path = write_search(tmp_path, tree)
    with monkeypatch.context() as broken, pytest.raises(Died):
        broken.setattr("tune.search.conclude._report", died)
        launching.launch_search(path)
    folder = RunFolder(searches[0].folder.output, "hunt-001")
    assert folder.facts()["status"] == "running" and not folder.exists("report.html")
    assert launching.launch_search(path, resume=True) == 0
    assert folder.facts()["status"] == "finished" and folder.exists("report.html") and len(searches) == 1
    capsys.readouterr()
    assert launching.launch_search(path, resume=True) == 0
    assert "is finished (4 trials)" in capsys.readouterr().out


def test_other_data_at_the_same_place_are_refused(
    tmp_path: Path, tree: dict[str, Any], searches: list[SearchLaunch]
) -> None:
    place = tmp_path / "data"
    shutil.copytree(prepare_images(tmp_path / "one"), place)
    tree["overrides"] = {"tracking": {"enabled": False}, "data": {"url": str(place)}}
    path = write_search(tmp_path, tree)
    assert launching.launch_search(path) == 0
    shutil.rmtree(place)
    shutil.copytree(prepare_images(tmp_path / "two", per_class=20), place)
    with pytest.raises(UserError, match="samples"):
        launching.launch_search(path, resume=True)


def test_other_data_of_a_trial_at_the_same_place_are_refused(
    tmp_path: Path, tree: dict[str, Any], searches: list[SearchLaunch]
) -> None:
    """A space, or the rows of a table, may name other data than the base recipe."""
    own, other = Path(prepare_images(tmp_path / "one")), prepare_images(tmp_path / "two", per_class=20)
    tree["overrides"] = {"tracking": {"enabled": False}}
    path = write_search(tmp_path, tree)
    assert launching.launch_search(path) == 0
    record, folder = searches[0].record, searches[0].folder
    trial = record.trials[2]
    trial.values = {"optim.lr": 0.01, "data.url": str(own)}
    save_record(record, folder)
    facts = data_facts(searches[0].search.recipe.data, load_manifest(str(own)))
    RunFolder(folder.location("trials"), "trial-002").note(data=asdict(facts))
    assert launching.launch_search(path, resume=True) == 0
    shutil.rmtree(own)
    shutil.copytree(other, own)
    with pytest.raises(UserError, match=f"{own} is not the data of .*trial-002.*samples"):
        launching.launch_search(path, resume=True)


def test_other_weights_to_start_from_are_refused(
    tmp_path: Path, tree: dict[str, Any], searches: list[SearchLaunch]
) -> None:
    weights = tmp_path / "first.safetensors"
    tree["overrides"] = {"tracking": {"enabled": False}, "train": {"init_from": str(weights)}}
    model = build_model(load(tmp_path, tree).recipe.model, classes=2)
    safetensors.torch.save_file(model.state_dict(), weights)
    path = write_search(tmp_path, tree)
    assert launching.launch_search(path) == 0 == launching.launch_search(path, resume=True)
    safetensors.torch.save_file({name: each + 1 for name, each in model.state_dict().items()}, weights)
    with pytest.raises(UserError, match="other weights than when"):
        launching.launch_search(path, resume=True)
