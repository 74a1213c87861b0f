"""`train_worker` from its data to the results that it writes, without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from cluster.recipe.config import build_recipe, load_recipe
from cluster.recipe.targets import with_targets
from cluster.run.worker import first_model
from perceiver.export.weights import open_weights
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import load_manifest
from tests.cluster.recipes import small_tree, write_recipe

ROOT, RUN = Path(__file__).parents[3], "small-001"


@pytest.mark.slow
def test_a_regression_keeps_the_units_of_its_data_when_resumed(tmp_path: Path) -> None:
    """What a run takes from its data is the same when it is resumed; its results are in these units, of the average."""
    rows = ["file,price"]
    (tmp_path / "raw").mkdir()
    for number in range(40):
        Image.new("L", (12, 12), 6 * number).save(tmp_path / "raw" / f"{number}.png")
        rows.append(f"{number}.png,{1000 + number}")
    (tmp_path / "raw" / "t.csv").write_text("\n".join(rows))
    options = {"image": "file", "target": "price"}
    prepare("csv", str(tmp_path / "raw"), str(tmp_path / "data"), PrepareConfig(parallel="off", options=options))
    tree = small_tree(tmp_path, str(tmp_path / "data"))
    tree["data"]["executor"] = "inline"
    tree |= {"cluster": {"workers": 1}, "tracking": {"enabled": False}}
    tree["train"]["ema"] = {"decay": 0.5}
    tree |= {"task": {"kind": "regression", "loss": "l1"}, "optim": {"lr": 0.01, "schedule": {"kind": "constant"}}}
    recipe = str(write_recipe(tmp_path, tree))
    folder = tmp_path / "runs" / RUN
    command = [sys.executable, "-m", "tests.cluster.run.whole_worker", recipe, "2", "3"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=350)
    assert done.returncode == 0, done.stdout + done.stderr

    targets = with_targets(load_recipe(recipe), load_manifest(str(tmp_path / "data"))).model_dump()["task"]["targets"]
    assert list(targets["names"]) == ["price"] and 1010 < targets["mean"][0] < 1030
    for step in (4, 6):
        place = folder / "checkpoints" / f"step-{step:08d}"
        assert json.loads((place / "manifest.json").read_text())["recipe"]["task"]["targets"] == yaml.safe_load(
            json.dumps(targets)
        )
    history = [json.loads(line) for line in (place / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    average, written, last = (
        open_weights(*which).tensors for which in ((str(place), "ema"), (str(folder),), (str(folder), "last"))
    )
    assert all(torch.equal(average[name], written[name]) for name in written)
    assert not torch.equal(last["head.weight"], written["head.weight"])
    table = pq.read_table(folder / "predictions").to_pylist()
    errors = [abs(row["prediction_price"] - row["target_price"]) for row in table]
    figures = open_weights(str(folder)).facts["evaluation"]
    assert {"mae", "rmse", "r2"} < set(figures)
    assert len(table) == 8 and sum(errors) / 8 == pytest.approx(figures["mae"], rel=1e-3)


def test_a_worker_freezes_the_parameters_of_the_recipe(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, "nowhere")
    tree["train"]["freeze"] = ["cross_attends.*", "latents"]
    model = first_model(build_recipe(tree), classes=2)
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("cross_attends.", "latents"))}
