"""Using a trained model: its figures and its predictions, read in this process."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner

from cluster import scoring as scoring_module
from cluster.recipe import build_recipe
from cluster.scoring import open_scoring, predict
from perceiver.cli import evaluate as evaluate_verb
from perceiver.cli import predict as predict_verb
from perceiver.config import UserError
from perceiver.factory import build_model
from pipelines.prepare import prepare
from tests.cluster.recipes import write_images


@pytest.fixture
def run(tree: dict[str, Any], tmp_path: Path) -> Path:
    """A run's folder with fresh weights and its recipe; it reads in the process."""
    tree["data"]["executor"] = "inline"
    tree["train"]["global_batch"] = 16
    recipe = build_recipe(tree)
    folder = tmp_path / "runs" / "small-001"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    torch.manual_seed(0)
    safetensors.torch.save_file(build_model(recipe.model, classes=2).state_dict(), folder / "model.safetensors")
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder).to_pylist()


def test_predictions_give_the_figures_of_evaluate(run: Path, tmp_path: Path) -> None:
    """40 test images: accuracy counted from the files equals the evaluation's, and keys name the images."""
    scoring = open_scoring(str(run))
    figures = scoring.metrics()
    assert predict(scoring, str(tmp_path / "out")) == 40
    found = rows(tmp_path / "out")
    assert [row["sample_id"] for row in found] == list(range(40))
    right = sum(row["prediction"] == row["label"] for row in found)
    assert figures["accuracy"] == pytest.approx(right / 40)
    assert all(Path(row["key"]).parent.name == ("dark", "light")[row["label"]] for row in found)
    assert {row["class"] for row in found} <= {"dark", "light"}


def test_predicting_goes_on_where_it_was_broken_off(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_module, "ROWS_A_PART", 16)
    scoring = open_scoring(str(run))
    assert predict(scoring, str(tmp_path / "whole")) == 40
    parts = sorted((tmp_path / "whole").glob("part-*"))
    assert len(parts) == 3, "8 samples a forward pass, two of them a part"

    def stop(done: int, total: int) -> None:
        if done >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(scoring, str(tmp_path / "broken"), stop)
    assert predict(scoring, str(tmp_path / "broken")) == 8, "only the last part was missing"
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert predict(scoring, str(tmp_path / "broken")) == 0


def test_other_weights_do_not_mix(run: Path, tmp_path: Path) -> None:
    predict(open_scoring(str(run)), str(tmp_path / "out"))
    weights = safetensors.torch.load_file(run / "model.safetensors")
    safetensors.torch.save_file({name: value + 1 for name, value in weights.items()}, run / "model.safetensors")
    with pytest.raises(UserError, match="holds predictions with weights .*choose another --to"):
        predict(open_scoring(str(run)), str(tmp_path / "out"))


def test_files_of_others_are_not_mixed_with(run: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "part-00000.parquet").write_bytes(b"what training left")
    with pytest.raises(UserError, match=r"holds part-00000.parquet, which perceiver predict did not write"):
        predict(open_scoring(str(run)), str(tmp_path / "theirs"))


def test_data_that_does_not_fit_is_refused(run: Path, tmp_path: Path) -> None:
    raw = write_images(tmp_path / "raw", per_class=4)
    (raw / "train" / "dark").rename(raw / "train" / "dim")
    for path in (raw / "test" / "dark", raw / "test" / "light"):
        path.rename(path.with_name("third-" + path.name))
    prepare("image_folder", str(raw), str(tmp_path / "other"))
    runner = CliRunner()
    with pytest.raises(UserError, match=r"has \d classes, the model 2"):
        runner.invoke(evaluate_verb.command, [str(run), str(tmp_path / "other")], catch_exceptions=False)
    with pytest.raises(UserError, match="recipe"):
        (run / "recipe.yaml").unlink()
        open_scoring(str(run / "model.safetensors"))


def test_the_commands(run: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(evaluate_verb.command, [str(run), "data.eval_crop=1.0", "--json"], catch_exceptions=False)
    assert json.loads(shown.output)["samples"] == 40
    url = yaml.safe_load((run / "recipe.yaml").read_text())["data"]["url"]
    shown = runner.invoke(predict_verb.command, [str(run), url, "--split", "train", "--to", str(tmp_path / "out")],
                          catch_exceptions=False)  # fmt: skip
    assert "80 samples written" in shown.output
