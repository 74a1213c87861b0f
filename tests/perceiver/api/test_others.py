"""`perceiver.prepare`, `export`, `tune` and `submit`: arguments, results and errors."""

import copy
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import perceiver
from cluster.jobs.entrypoint import main
from cluster.jobs.package import build_package
from cluster.recipe.config import load_recipe
from tests.cluster.recipes import CLASSES, write_images
from tests.perceiver.export.test_formats import SMALL, run_folder
from tests.tune.searches import search_tree, write_search
from tune.search_file import read_search


def test_prepared_data_are_returned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_images(tmp_path / "raw", 4)
    data = perceiver.prepare("image_folder", raw, tmp_path / "shards", channels=1, progress=False)
    assert (data.url, data.classes, data.samples) == (str(tmp_path / "shards"), CLASSES, {"train": 8, "test": 4})
    assert "8" in repr(data) and capsys.readouterr() == ("", "")
    assert perceiver.prepare("image_folder", raw, tmp_path / "shards", channels=1) == data
    for wrong, named in (({"channel": 1}, "channel"), ({"channels": 2}, "channels=2")):
        with pytest.raises(perceiver.UserError, match=named):
            perceiver.prepare("image_folder", raw, tmp_path / "other", progress=False, **wrong)
    with pytest.raises(perceiver.UserError, match=r"wanted \[SRC\] DST"):
        perceiver.prepare("digits")


def test_media_are_stored_smaller_and_their_statistics_measured(tmp_path: Path) -> None:
    raw = write_images(tmp_path / "raw", 4)
    data = perceiver.prepare("image_folder", raw, tmp_path / "small", resize=6, quality=80, progress=False)
    stored = data.manifest.stored
    assert (stored.resize, stored.quality) == (6, 80) and "image" in data.manifest.statistics
    for wrong, named in (
        ({"resize": 0}, "media.resize: .*got 0"),
        ({"fps": 25}, "--fps 25.0 does not apply"),
        ({"spectrogram": {"rate": 8000}}, "no feature audio"),
        ({"spectrogram": {"rate": -1}}, "spectrogram.rate"),
    ):
        with pytest.raises(perceiver.UserError, match=named):
            perceiver.prepare("image_folder", raw, tmp_path / "other", progress=False, **wrong)


def test_an_export_is_loaded_like_the_run(tmp_path: Path) -> None:
    source, model = run_folder(tmp_path / "run", SMALL)
    written = perceiver.export(perceiver.Run(source), "safetensors", tmp_path / "out", licence="CC0-1.0")
    assert written["format"] == "safetensors" and "README.md" in written["files"]
    again = perceiver.load_model(tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert "CC0-1.0" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(perceiver.UserError, match="wanted one of safetensors, transformers, onnx, mlflow"):
        perceiver.export(source, "pickle", tmp_path / "out")


@pytest.mark.parametrize(("code", "error"), [(0, None), (1, perceiver.SearchError), (130, KeyboardInterrupt)])
def test_a_search_returns_its_folder(
    code: int, error: Any, tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tune.search.launch

    given: dict[str, Any] = {}

    def launch(path: str, overrides: list[str], **options: Any) -> int:
        given.update(options, overrides=overrides)
        return code

    monkeypatch.setattr(tune.search.launch, "launch_search", launch)
    path = write_search(tmp_path, search_tree(tmp_path, images))
    if error:
        with pytest.raises(error, match="hunt-001"):
            perceiver.tune(path, progress=False)
    else:
        found = perceiver.tune(path, progress=False, **{"trials": 3, "train.epochs": 2})
        assert found.folder.endswith("/hunt-001") and given["overrides"] == ["trials=3", "train.epochs=2"]
    assert given["run"] == "hunt-001" and given["show"] == "nothing"
    with pytest.raises(perceiver.UserError, match="trails"):
        perceiver.tune(path, trails=3)


def as_dict(folder: Path, images: str, form: str) -> dict[str, Any]:
    """Return a search as a dict whose recipe is a path, a dict or a Recipe."""
    tree = search_tree(folder, images)
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    forms = {"path": folder / "small.yaml", "dict": recipe, "Recipe": perceiver.Recipe.model_validate(recipe)}
    return {**tree, "recipe": forms[form]}


@pytest.mark.parametrize("form", ["path", "dict", "Recipe"])
def test_a_search_may_be_a_dict(form: str, tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tune.search.launch

    plans: list[Any] = []
    monkeypatch.setattr(tune.search.launch, "run_search", lambda plan, start, conclude: plans.append(plan) or 0)
    search = as_dict(tmp_path, images, form)
    before = copy.deepcopy(search)
    found = perceiver.tune(search, progress=False, **{"trials": 3, "train.epochs": 5})
    (plan,) = plans
    assert search == before and found.folder.endswith("/hunt-001")
    assert plan.search.config.trials == 3 and plan.search.recipe.train.epochs == 5
    assert plan.search.recipe.data.url == images and plan.total == 3


@pytest.mark.parametrize(
    ("search", "named"),
    [(5, "search: got 5"), ({"name": "a"}, "the key recipe is missing"), ({"recipe": 5}, "recipe: got 5")],
)
def test_what_is_no_search_is_refused(search: Any, named: str) -> None:
    with pytest.raises(perceiver.UserError, match=named):
        perceiver.tune(search)


@pytest.mark.parametrize("form", ["recipe", "Recipe", "path", "dict"])
def test_a_job_from_a_dict_takes_its_file_along(
    form: str, tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is in the job's package only, also if the cluster is this machine and runs in the current folder."""
    import cluster.jobs.server
    import cluster.jobs.submit

    (package := tmp_path / "package").mkdir()
    (here := tmp_path / "here").mkdir()
    commands: list[list[str]] = []

    def submit(server: Any, wanted: Any, work: Any, say: Any) -> str:
        build_package(package, work.files)
        words = cluster.jobs.submit.entrypoint(wanted, work, "demo", str(here))
        commands.append(shlex.split(words)[6:])
        return "demo-1"

    monkeypatch.chdir(here)
    monkeypatch.setattr(cluster.jobs.server, "connect", lambda access: access.address)
    monkeypatch.setattr(cluster.jobs.submit, "submit", submit)
    tree = as_dict(tmp_path, images, form if form in ("path", "dict") else "dict")
    given = perceiver.Recipe.model_validate(tree["recipe"]) if form == "Recipe" else tree["recipe"]
    work = tree if form in ("path", "dict") else given
    job = perceiver.submit(work, progress=False, **{"optim.weight_decay": 0.25})
    assert job.verb == ("tune" if work is tree else "train")
    monkeypatch.chdir(package)
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda program, argv, environment: ran.append(argv))
    main(commands[0])
    ((_, _, _, verb, file, *overrides),) = ran
    assert Path.cwd() == here and verb == job.verb
    overrides = overrides[: overrides.index("--run")]
    if verb == "train":
        assert load_recipe(file, overrides).optim.model_dump()["weight_decay"] == 0.25
    else:
        tree, base, _ = read_search(file, overrides)
        assert tree["trials"] == 4 and base["optim"]["weight_decay"] == 0.25 and base["data"]["url"] == images
    with pytest.raises(perceiver.UserError, match="sead"):
        perceiver.submit(work, progress=False, sead=3)


def test_a_job_is_submitted_with_the_recipe_and_its_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    import cluster.jobs.server
    import cluster.jobs.submit

    sent: list[Any] = []

    def submit(server: Any, wanted: Any, work: Any, say: Any) -> str:
        sent.append((server, wanted, work))
        return "quickstart-1"

    monkeypatch.setattr(cluster.jobs.server, "connect", lambda access: access.address)
    monkeypatch.setattr(cluster.jobs.submit, "submit", submit)
    recipe = Path(__file__).parents[3] / "recipes" / "train" / "quickstart.yaml"
    job = perceiver.submit(recipe, address="http://head:8265", run="mine", submission={"install": True}, seed=3)
    (server, wanted, work), *_ = sent
    assert (job.name, job.verb, server) == ("quickstart-1", "train", "http://head:8265")
    assert wanted.install and wanted.run == "mine" and work.recipe.seed == 3
    with pytest.raises(perceiver.UserError, match="sead"):
        perceiver.submit(recipe, sead=3)
