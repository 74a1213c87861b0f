"""`perceiver train` as a user runs it, in a subprocess with real Ray, DeepSpeed and MLflow."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.prepare import PrepareConfig, prepare
from tests.cluster.recipes import small_tree, write_recipe
from tests.faults.job import PACE
from tests.homes import share_kernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PERCEIVER = [str(Path(sys.executable).with_name("perceiver")), "train"]


def start(tmp_path: Path, tree: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    """Start the command in its own folder, with its own home folder."""
    environment = {**os.environ, "HOME": str(share_kernels(tmp_path)), "COLUMNS": "200"}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        environment.pop(name, None)
    command = [*PERCEIVER, str(write_recipe(tmp_path, tree)), *arguments]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(tmp_path: Path, tree: dict[str, Any], *arguments: str) -> tuple[int, str]:
    process = start(tmp_path, tree, *arguments)
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], poll_s: float = 0.1) -> None:
    """Wait until a condition is true; the process must not end before."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(poll_s)


def history(folder: Path) -> list[dict[str, float]]:
    newest = sorted((folder / "checkpoints").glob("step-*/manifest.json"))[-1].parent
    return [json.loads(line) for line in (newest / "history.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {int(row["step"]): row["train/loss"] for row in history(folder) if "train/loss" in row}


def mlflow_runs(folder: Path) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


LONGER = {"epochs": 12, "checkpoint_every": 0.4, "keep_checkpoints": 3}
"""Long enough for a worker to be killed."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, images: str) -> tuple[Path, dict[str, Any], str]:
    """Return the folder, recipe and output of an undisturbed run with asynchronous evaluation."""
    home = tmp_path_factory.mktemp("unbroken")
    tree = small_tree(home, images)
    best = {"metric": "eval/loss", "mode": "min", "count": 9}
    # A checkpoint that is due while the previous one is still being written would be postponed.
    tree["train"] |= LONGER | {"checkpoint_every": 4, "eval_every": 4, "eval_async": True, "keep_best": best}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in PACE.items():  # the run could end before its first checkpoint is evaluated
            environment.setenv(name, value)
        code, output = run(home, tree, "--json")
    assert code == 0, output
    return home, tree, output


def test_a_job_from_start_to_end(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    """From raw images to a trained, evaluated, tracked model with a report; a finished run is not trained again."""
    tmp_path, tree, output = unbroken
    folder = tmp_path / "runs" / "small-001"
    outcome = json.loads(output.splitlines()[-1])
    assert outcome["status"] == "finished" and outcome["step"] == 60
    assert outcome["evaluation"]["accuracy"] > 0.9, output
    assert f"test accuracy {100 * outcome['evaluation']['accuracy']:.1f} %" in output
    assert "perceiver train" in output and "mlflow ui --backend-store-uri sqlite:///" in output
    for part in ("report/index.html", "model.safetensors", "recipe.yaml", "logs/driver.log", "predictions"):
        assert (folder / part).exists(), part
    assert list(losses(folder)) == list(range(1, 61))
    (tracked,) = mlflow_runs(tmp_path / "runs")
    assert tracked.info.status == "FINISHED" and tracked.info.run_name == "small-001"
    assert tracked.data.params["optim.lr"] == "0.01"
    assert tracked.data.tags["checkpoint_uri"].endswith("step-00000060")
    assert tracked.data.metrics["eval/accuracy"] == pytest.approx(outcome["evaluation"]["accuracy"])
    assert "Traceback" not in output
    assert tracked.data.tags["perceiver.version"] == json.loads((folder / "run.json").read_text())["code"]["version"]
    contexts = [found.tags[0].value for found in tracked.inputs.dataset_inputs]
    assert sorted(contexts) == ["evaluation", "training"]

    code, output = run(tmp_path, tree, "--resume")
    assert code == 0 and "small-001 is finished (step 60)" in output and "train.epochs" in output


def test_asynchronous_evaluation(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    """Training continues while a checkpoint is evaluated; the metrics are those of its weights and decide the best."""
    from cluster.predict.scoring import open_scoring

    tmp_path, _, output = unbroken
    folder = tmp_path / "runs" / "small-001"
    rows = history(folder)
    evaluated = {int(row["step"]): row for row in rows if "eval/loss" in row}
    assert list(evaluated) == [20, 40, 60], output
    later = next(i for i, row in enumerate(rows) if row["step"] == 22)
    assert rows.index(evaluated[20]) > later, "the steps waited"
    place = str(folder / "checkpoints" / "step-00000020")
    figures = open_scoring(place, overrides=["data.executor=inline"]).metrics()
    assert {f"eval/{name}": pytest.approx(value, rel=1e-5) for name, value in figures.items()}.items() <= evaluated[
        20
    ].items()
    (tracked,) = mlflow_runs(tmp_path / "runs")
    lowest = min(evaluated, key=lambda step: evaluated[step]["eval/loss"])
    assert tracked.data.tags["best_checkpoint_uri"].endswith(f"step-{lowest:08d}")
    assert "evaluation at step 20: " in output


def test_a_killed_worker_is_replaced_and_the_losses_do_not_change(
    tmp_path: Path, tree: dict[str, Any], unbroken: tuple[Path, dict[str, Any], str]
) -> None:
    tree["train"] |= LONGER
    process = start(tmp_path, tree)
    folder = tmp_path / "runs" / "small-001"
    wait_for(lambda: list(folder.glob("checkpoints/step-*/manifest.json")), process)
    worker = json.loads((folder / "run.json").read_text())["workers"]["1"]["pid"]
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "worker 1 failed" in output and "restarting the workers" in output
    assert "resumed at step" in output
    assert [run.info.status for run in mlflow_runs(tmp_path / "runs")] == ["FINISHED"]
    broken = losses(folder)
    assert list(broken) == list(range(1, 61))
    assert losses(unbroken[0] / "runs" / "small-001") == broken


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield an S3 endpoint with an empty bucket named `bucket`, which the environment names."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1"}
        for name, value in {**settings, "ENDPOINT_URL": f"http://{host}:{port}"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    finally:
        server.stop()


def test_stop_then_kill_the_driver_then_resume_in_one_mlflow_run(
    tmp_path: Path, tree: dict[str, Any], store: Any
) -> None:
    """Shards and the run are on S3; the run is resumed from there, finally with another world size."""
    store.put(f"{tree['data']['url']}/", "bucket/shards/", recursive=True)
    tree["data"]["url"], tree["output"] = "s3://bucket/shards", "s3://bucket/runs"
    tree["train"] |= {"epochs": 60, "checkpoint_every": 0.4}
    tree["cluster"] = {"workers": 1}
    folder = "bucket/runs/small-001"

    def steps() -> list[int]:
        found = store.glob(f"{folder}/checkpoints/step-*/manifest.json")
        return sorted(int(path.split("/")[-2].removeprefix("step-")) for path in found)

    def rows() -> list[dict[str, float]]:
        lines = store.cat_file(f"{folder}/checkpoints/step-{steps()[-1]:08d}/history.jsonl").decode().splitlines()
        return [json.loads(line) for line in lines]

    process = start(tmp_path, tree)
    wait_for(steps, process, 1.0)  # each poll takes requests, which the server answers in this process
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output
    assert "checkpoint saved" in output and ": perceiver train" in output and "--resume --run small-001" in output
    stopped = json.loads(store.cat_file(f"{folder}/run.json"))["step"]
    assert 0 < stopped < 300
    assert rows()[-1]["step"] == stopped

    process = start(tmp_path, tree, "--resume")
    wait_for(lambda: max(steps(), default=0) > stopped, process, 1.0)
    process.kill()
    process.communicate(timeout=400)

    code, output = run(tmp_path, tree, "--resume", "train.epochs=14", "train.checkpoint_every=4", "cluster.workers=2")
    assert code == 0, output
    assert "resuming small-001 from the checkpoint at step" in output and "experiment small" in output
    assert "from s3://bucket/runs/small-001/checkpoints/step-" in output
    assert [int(row["step"]) for row in rows() if "train/loss" in row] == list(range(1, max(70, steps()[-1]) + 1))
    assert store.exists(f"{folder}/report/index.html")
    (tracked,) = mlflow_runs(tmp_path / ".cache" / "perceiver" / "runs")
    assert tracked.info.status == "FINISHED"


def test_a_regression_keeps_the_units_of_its_data_when_resumed(tmp_path: Path) -> None:
    """What a run takes from its data is in its recipe, in the predictions, and the same when it is resumed."""
    rows = ["file,price"]
    (tmp_path / "raw").mkdir()
    for number in range(40):
        Image.new("L", (12, 12), 6 * number).save(tmp_path / "raw" / f"{number}.png")
        rows.append(f"{number}.png,{1000 + number}")
    (tmp_path / "raw" / "t.csv").write_text("\n".join(rows))
    options = {"image": "file", "target": "price"}
    prepare("csv", str(tmp_path / "raw"), str(tmp_path / "data"), PrepareConfig(parallel="off", options=options))
    tree = small_tree(tmp_path, str(tmp_path / "data"))
    tree |= {"cluster": {"workers": 1}, "tracking": {"enabled": False}}
    tree |= {"task": {"kind": "regression", "loss": "l1"}, "optim": {"lr": 0.01, "schedule": {"kind": "constant"}}}
    code, output = run(tmp_path, tree, "--json")
    assert code == 0 and {"mae", "rmse", "r2"} < set(json.loads(output.splitlines()[-1])["evaluation"]), output
    code, output = run(tmp_path, tree, "train.epochs=3", "--resume", "--json")
    assert code == 0, output
    folder = tmp_path / "runs" / "small-001"
    targets = yaml.safe_load((folder / "recipe.yaml").read_text())["task"]["targets"]
    assert targets["names"] == ["price"] and 1010 < targets["mean"][0] < 1030
    table = pq.read_table(folder / "predictions").to_pylist()
    errors = [abs(row["prediction_price"] - row["target_price"]) for row in table]
    figures = json.loads(output.splitlines()[-1])["evaluation"]
    assert len(table) == 8 and sum(errors) / 8 == pytest.approx(figures["mae"], rel=1e-3)
    assert "Predicted and true values" in (folder / "report" / "index.html").read_text()
