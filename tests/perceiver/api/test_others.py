"""`perceiver.prepare`, `export`, `tune` and `submit`: arguments, results and errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

import perceiver
from tests.cluster.recipes import CLASSES, write_images
from tests.perceiver.export.test_formats import SMALL, run_folder
from tests.tune.searches import search_tree, write_search


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
