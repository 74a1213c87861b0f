"""`perceiver export --format mlflow`: the model in MLflow's registry, and served."""

import base64
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient

from perceiver.cli import cli
from perceiver.config import UserError
from perceiver.export.weights import open_weights
from tests.perceiver.export.test_formats import SMALL, run_folder
from tests.perceiver.export.test_requests import png
from tests.perceiver.tracking.mlflow_server import end, free_port, listening

CLASSES = ["dark", "light"]


def tracked_run(folder: Path, url: str, **task: Any) -> tuple[str, Any, str]:
    """Return a run's folder whose figures are in MLflow, its model, and the store's URI."""
    source, model = run_folder(folder / "run", SMALL, url)
    store = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=store)
    experiment = client.create_experiment("tiny", str(folder / "artifacts"))
    run = client.create_run(experiment).info.run_id
    recipe = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    recipe |= {"task": {"kind": "classification", **task}, "tracking": {"uri": store}}
    (folder / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    facts = json.loads((folder / "run" / "run.json").read_text())
    (folder / "run" / "run.json").write_text(json.dumps({**facts, "mlflow_run": run}))
    return source, model, store


def export(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["export", *arguments, "--format", "mlflow", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


def ask(port: int, body: Any) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_a_registered_model_answers_requests_as_the_run_does(tmp_path, images, monkeypatch):
    source, model, store = tracked_run(tmp_path, images)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    written = export(source, "--to", str(tmp_path / "out"), "--register", "digits")
    assert "MLFLOW_TRACKING_URI" not in os.environ, "later runs would go to another store"
    assert written["inputs"] == {"image": ["batch", 1, 8, 8]} and written["registered"]["version"] == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "divided by 255 are refused" in card and '{"inputs": {"image": ["BASE64"]}}' in card
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "out"))
    with pytest.raises(mlflow.exceptions.MlflowException, match="uint8"):
        loaded.predict({"image": np.zeros((1, 1, 8, 8), np.float32)})
    version = MlflowClient(tracking_uri=store).get_model_version("digits", "1")
    assert version.run_id == json.loads((tmp_path / "run" / "run.json").read_text())["mlflow_run"]
    kept = {path.suffix for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert kept and not kept & {".pkl", ".pt", ".pth", ".bin"}, kept
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits/1", "--env-manager", "local"]
    # MLflow starts uvicorn by its name, which is found where the environment is active.
    active = {"PYTHONPATH": "", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    server = listening([*command, "--port", str(port)], port, tmp_path / "serve.log", active)
    try:
        pixels = torch.randint(0, 256, (70, 1, 8, 8), dtype=torch.uint8)
        got = ask(port, {"inputs": {"image": pixels.tolist()}})["predictions"]
        with torch.no_grad():
            probability = model(pixels).softmax(1)
        np.testing.assert_allclose(got["probability"], probability, rtol=1e-5, atol=1e-7)
        assert got["prediction"] == probability.argmax(1).tolist()
        assert got["class"] == [CLASSES[number] for number in got["prediction"]]
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(port, {"inputs": {"image": pixels[:, :, :5].tolist()}})
        assert refused.value.code == 400 and "image: got the shape (70, 1, 5, 8)" in refused.value.read().decode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(port, {"inputs": {"image": (pixels / 255).tolist()}})
        assert refused.value.code == 400 and "wanted uint8: whole numbers" in refused.value.read().decode()
        encoded = [base64.b64encode(png(each[0].numpy())).decode() for each in pixels[:3]]
        got = ask(port, {"inputs": {"image": [encoded[0], f"data:image/png;base64,{encoded[1]}", encoded[2]]}})
        np.testing.assert_allclose(got["predictions"]["probability"], probability[:3], rtol=1e-5, atol=1e-7)
    finally:
        end(server)


def test_a_regression_answers_in_the_units_of_its_targets(tmp_path):
    source, model = run_folder(tmp_path / "run", SMALL)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    targets = {"names": ["price", "width"], "mean": [250_000.0, 80.0], "std": [90_000.0, 12.5]}
    recipe["task"] = {"kind": "regression", "targets": targets}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert export(source, "--to", str(tmp_path / "out"))["outputs"] == ["prediction_price", "prediction_width"]
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    got = mlflow.pyfunc.load_model(str(tmp_path / "out")).predict({"image": pixels.numpy()})
    with torch.no_grad():
        normalised = model(pixels).double().numpy()
    assert normalised.std() > 0.1, "the model's outputs do not depend on the pixels"
    np.testing.assert_allclose(got["prediction_price"], normalised[:, 0] * 90_000 + 250_000, rtol=1e-5)
    np.testing.assert_allclose(got["prediction_width"], normalised[:, 1] * 12.5 + 80, rtol=1e-5)


def test_what_cannot_be_registered_is_one_line(tmp_path, images):
    source, _, _ = tracked_run(tmp_path, images)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())

    def refused(*arguments: str) -> str:
        error = CliRunner().invoke(cli, ["export", *arguments, "--to", str(tmp_path / "out")]).exception
        assert isinstance(error, UserError) and "\n" not in str(error), error
        return str(error)

    assert "--format mlflow" in refused(source, "--format", "onnx", "--register", "digits")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "mlflow_run": "0" * 32}))
    assert "0" * 32 in refused(source, "--format", "mlflow", "--register", "digits")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"step": 7}))
    assert str(tmp_path / "run") in refused(source, "--format", "mlflow", "--register", "digits")
    assert not (tmp_path / "out").exists()


def test_weights_without_a_task_are_not_served(tmp_path):
    source, _ = run_folder(tmp_path / "run", SMALL)
    assert not open_weights(source).recipe.get("task")
    error = CliRunner().invoke(cli, ["export", source, "--format", "mlflow", "--to", str(tmp_path / "out")]).exception
    assert isinstance(error, UserError) and "task" in str(error)
