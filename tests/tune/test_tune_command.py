"""`perceiver tune` as a user runs it: real Ray, real trials, real MLflow, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tune.searches import write_search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BY_LOSS = {"metric": "loss", "mode": "min"}  # even weights that never moved tell the classes apart
PERCEIVER = str(Path(sys.executable).with_name("perceiver"))


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command in a folder of its own, with a home of its own."""
    environment = {**os.environ, "HOME": str(tmp_path), "COLUMNS": "200"}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        environment.pop(name, None)
    return subprocess.Popen(
        [PERCEIVER, *arguments], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    process = start(tmp_path, *arguments)
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds; the process must not end before."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def trials(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trials.json"
    return json.loads(path.read_text())["trials"] if path.exists() else []


def left_behind(tmp_path: Path) -> list[str]:
    """Return the command lines of processes that still have this test's home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(tmp_path):
                found.append(" ".join(process.cmdline())[:80])
        except psutil.Error:
            continue
    return found


def all_gone(tmp_path: Path) -> bool:
    """Whether nothing of the test's commands is left, within the time that helpers take to notice."""
    deadline = time.monotonic() + 60
    while left_behind(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not left_behind(tmp_path)


def test_asha_with_a_trial_that_fails_then_a_kill_and_a_resume(tmp_path: Path, tree: dict[str, Any]) -> None:
    """Trials stop early, one fails for good, the driver is killed; --resume ends it; best.yaml trains."""
    tree |= {
        "trials": 4,
        "max_failures": 0,
        **BY_LOSS,
        "scheduler": {"kind": "asha", "grace": 1, "reduction": 2},
        "overrides": {"train.epochs": 40, "train.checkpoint_every": 1},
        # A grid's order is known: the base recipe, then one that learns, one that breaks, one that does not learn.
        "search": {"kind": "grid"},
        "space": {"optim.lr": {"kind": "grid", "values": [0.01, 1e30, 1e-9]}},
    }
    search = write_search(tmp_path, tree)
    folder = tmp_path / "runs" / "hunt-001"
    process = start(tmp_path, "tune", search)
    wait_for(lambda: any(len(t["evaluations"]) > 1 for t in trials(folder)), process)
    process.kill()
    process.communicate(timeout=100)
    before = trials(folder)

    code, output = run(tmp_path, "tune", search, "--resume", "--json")
    assert code == 0, output
    outcome = json.loads(output.splitlines()[-1])
    after = {t["number"]: t for t in trials(folder)}
    assert outcome["trials"] == {"0": "finished", "1": "failed", "2": "stopped"}, output
    assert "the loss is" in after[1]["reason"]
    for trial in before:
        kept = [e["step"] for e in trial["evaluations"] if trial["status"] != "failed"]
        assert [e["step"] for e in after[trial["number"]]["evaluations"]][: len(kept) - 1] == kept[:-1]
    assert after[0]["evaluations"][-1]["step"] == 200 and outcome["best"]["trial"] == 0
    for part in ("best.yaml", "report.html", "search.yaml", "trials/trial-000/model.safetensors"):
        assert (folder / part).exists(), part
    assert "Traceback" not in output

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 3 and parent.info.status == "FINISHED"
    assert {r.data.params["optim.lr"] for r in children} == {"0.01", "1e+30", "1e-09"}
    assert sorted(r.info.status for r in children) == ["FAILED", "FINISHED", "KILLED"]
    assert parent.data.metrics["best/loss"] == pytest.approx(outcome["best"]["scores"]["loss"])

    code, output = run(tmp_path, "train", str(folder / "best.yaml"), "train.epochs=2")
    assert code == 0 and "hunt-best-001" in output, output
    assert all_gone(tmp_path), left_behind(tmp_path)


def test_weights_are_exchanged_and_ctrl_c_saves(tmp_path: Path, tree: dict[str, Any]) -> None:
    """Of two trials one cannot learn: PBT has it go on from the other's weights. Then Ctrl-C saves both."""
    tree |= {
        "trials": 2,
        **BY_LOSS,
        "scheduler": {"kind": "pbt", "interval": 2, "quantile": 0.5, "resample": 0.0},
        "overrides": {"train.epochs": 400},
        "space": {"optim.lr": {"kind": "choice", "values": [1e-9, 0.01]}},
    }
    from tests.tune.searches import load
    from tune.draws import known_trials

    seeds = range(100)
    rates = {
        seed: [t["optim.lr"] for t in known_trials(load(tmp_path, tree, f"seed={seed}"), {}) or []] for seed in seeds
    }
    tree["seed"] = next(seed for seed, pair in rates.items() if pair == [1e-9, 0.01])
    search = write_search(tmp_path, tree)
    folder = tmp_path / "runs" / "hunt-001"
    process = start(tmp_path, "tune", search)
    wait_for(lambda: trials(folder) and trials(folder)[0]["exchanges"], process)
    exchange = trials(folder)[0]["exchanges"][0]
    wait_for(lambda: trials(folder)[0]["evaluations"][-1]["step"] > exchange["step"], process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output
    assert "goes on from trial 1's weights" in output and "go on with: perceiver tune" in output
    taker = trials(folder)[0]
    by_step = {e["step"]: e["metrics"] for e in taker["evaluations"]}
    own = min(by_step)
    moved = min(step for step in by_step if step > exchange["step"])
    assert by_step[moved]["loss"] < by_step[own]["loss"] - 0.05, "a rate of 1e-9 alone would not have moved it"
    assert [t["status"] for t in trials(folder)] == ["unfinished", "unfinished"]
    for number in (0, 1):
        assert list((folder / "trials" / f"trial-00{number}" / "checkpoints").glob("step-*/manifest.json"))
    assert "Traceback" not in output
    assert all_gone(tmp_path), left_behind(tmp_path)
