"""`perceiver train` as a user runs it, in a subprocess with real Ray, DeepSpeed and MLflow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import small_tree, write_recipe
from tests.faults.job import PACE
from tests.homes import share_kernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PERCEIVER = [str(Path(sys.executable).with_name("perceiver")), "train"]
MOST_FRAMES, MOST_FILES = 8, 3


def start(tmp_path: Path, tree: dict[str, Any], *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start the command in its own folder, with its own home folder, and with environment variables."""
    environment = {**os.environ, **variables, "HOME": str(share_kernels(tmp_path)), "COLUMNS": "200"}
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


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], poll_s: float) -> None:
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


LONGER = {"epochs": 8, "checkpoint_every": 0.4, "keep_checkpoints": 3}
"""Long enough for a worker to be killed."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, images: str) -> tuple[Path, dict[str, Any], str]:
    """Return the folder, recipe and output of an undisturbed run with asynchronous evaluation.

    It uses no private names of Ray and DeepSpeed, and records call stacks, see tests/faults/inject/stacks.py. DeepSpeed
    would compile its shared-memory all-reduce for a minute, which a private name prevents otherwise.
    """
    home = tmp_path_factory.mktemp("unbroken")
    (home / "stacks").mkdir()
    recorder = {"SPINE_FOLDER": str(home / "stacks"), "SPINE_UNBUILT": "deepspeed_shm_comm"}
    tree = small_tree(home, images)
    best = {"metric": "eval/loss", "mode": "min", "count": 9}
    # A checkpoint that is due while the previous one is still being written would be postponed.
    tree["train"] |= LONGER | {"checkpoint_every": 4, "eval_every": 4, "eval_async": True, "keep_best": best}
    with pytest.MonkeyPatch.context() as environment:
        # Otherwise the run could end before its first checkpoint is evaluated.
        for name, value in (PACE | recorder | {"PERCEIVER_PUBLIC_API": "1"}).items():
            environment.setenv(name, value)
        code, output = run(home, tree, "--json")
    assert code == 0, output
    return home, tree, output


def test_a_job_from_start_to_end(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    """From raw images to a trained, evaluated, tracked model with a report; a finished run is not trained again."""
    tmp_path, tree, output = unbroken
    folder = tmp_path / "runs" / "small-001"
    outcome = json.loads(output.splitlines()[-1])
    assert outcome["status"] == "finished" and outcome["step"] == 40
    assert outcome["evaluation"]["accuracy"] > 0.9, output
    assert f"test accuracy {100 * outcome['evaluation']['accuracy']:.1f} %" in output
    assert "perceiver train" in output and "mlflow ui --backend-store-uri sqlite:///" in output
    for part in ("report/index.html", "model.safetensors", "recipe.yaml", "logs/driver.log", "predictions"):
        assert (folder / part).exists(), part
    assert list(losses(folder)) == list(range(1, 41))
    (tracked,) = mlflow_runs(tmp_path / "runs")
    assert tracked.info.status == "FINISHED" and tracked.info.run_name == "small-001"
    assert tracked.data.params["optim.lr"] == "0.01"
    assert tracked.data.tags["checkpoint_uri"].endswith("step-00000040")
    assert tracked.data.metrics["eval/accuracy"] == pytest.approx(outcome["evaluation"]["accuracy"])
    assert "Traceback" not in output
    assert tracked.data.tags["perceiver.version"] == json.loads((folder / "run.json").read_text())["code"]["version"]
    contexts = [found.tags[0].value for found in tracked.inputs.dataset_inputs]
    assert sorted(contexts) == ["evaluation", "training"]

    code, output = run(tmp_path, tree, "--resume")
    assert code == 0 and "small-001 is finished (step 40)" in output and "train.epochs" in output


def test_the_stack_of_a_step_and_of_a_checkpoint_is_short(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    def stack(name: str) -> list[str]:
        found = (unbroken[0] / "stacks").glob(f"{name}-*.json")
        return max((json.loads(file.read_text()) for file in found), key=len)

    frames = [frame for frame in stack("fit") + stack("step") if not frame.endswith(":<module>")]
    assert frames[0] == "perceiver/__main__.py:main" and "cluster/run/worker.py:train_worker" in frames
    assert len(frames) <= MOST_FRAMES, "\n".join(frames)
    commit = [*stack("commit"), "perceiver/train/checkpoint/store.py:commit"]
    files = {frame.partition(":")[0] for frame in commit[commit.index("perceiver/train/loop.py:train") :]}
    assert len(files) <= MOST_FILES, files


def test_asynchronous_evaluation(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    """Training continues while a checkpoint is evaluated; the metrics are those of its weights and decide the best."""
    from cluster.predict.scoring import open_scoring

    tmp_path, _, output = unbroken
    folder = tmp_path / "runs" / "small-001"
    rows = history(folder)
    evaluated = {int(row["step"]): row for row in rows if "eval/loss" in row}
    assert list(evaluated) == [20, 40], output
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


def test_a_killed_worker_and_a_killed_driver_do_not_change_the_losses(
    tmp_path: Path, tree: dict[str, Any], store: Any, unbroken: tuple[Path, dict[str, Any], str]
) -> None:
    """Shards and the run are on S3; the run continues from there twice, at last with another world size.

    This run uses private names of Ray and DeepSpeed, the one whose losses it must have does not.
    """
    store.put(f"{tree['data']['url']}/", "bucket/shards/", recursive=True)
    tree["data"]["url"], tree["output"] = "s3://bucket/shards", "s3://bucket/runs"
    tree["train"] |= LONGER
    folder = "bucket/runs/small-001"

    def steps() -> list[int]:
        found = store.glob(f"{folder}/checkpoints/step-*/manifest.json")
        return sorted(int(path.split("/")[-2].removeprefix("step-")) for path in found)

    def losses_at(step: int) -> dict[int, float]:
        lines = store.cat_file(f"{folder}/checkpoints/step-{step:08d}/history.jsonl").decode().splitlines()
        return {int(row["step"]): row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row}

    def worker() -> int:
        return json.loads(store.cat_file(f"{folder}/run.json"))["workers"]["1"]["pid"]

    process = start(tmp_path, tree, **(PACE | {"FAULT_STEP_S": "0.4"}))
    wait_for(steps, process, 1.0)  # each poll takes requests, which the server answers in this process
    killed = worker()
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: worker() != killed, process, 1.0)
    before = steps()[-1]
    wait_for(lambda: steps()[-1] > before, process, 1.0)
    process.kill()
    output, _ = process.communicate(timeout=400)
    assert "worker 1 failed" in output and "restarting the workers" in output and "resumed at step" in output

    code, output = run(tmp_path, tree, "--resume", "cluster.workers=1")
    assert code == 0, output
    assert "resuming small-001 from the checkpoint at step" in output and "experiment small" in output
    (resumed,) = re.findall(r"from s3://bucket/runs/small-001/checkpoints/step-0*(\d+)", output)
    wanted, found = losses(unbroken[0] / "runs" / "small-001"), losses_at(40)
    assert before < int(resumed) < 40 and list(found) == list(range(1, 41))
    two = range(1, int(resumed) + 1)  # steps of two workers
    assert [found[step] for step in two] == [wanted[step] for step in two]
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-3, abs=1e-6)
    assert store.exists(f"{folder}/report/index.html")
    (tracked,) = mlflow_runs(tmp_path / ".cache" / "perceiver" / "runs")
    assert tracked.info.status == "FINISHED"
