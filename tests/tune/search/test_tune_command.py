"""`perceiver tune` as a user runs it: real Ray, real trials, real MLflow, in separate processes."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.config import load_recipe
from cluster.recipe.preflight import check_recipe
from tests.faults.job import PACE
from tests.homes import write_names
from tests.tune.commands import all_gone, left_behind, run, start, trials, wait_for
from tests.tune.searches import write_search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BY_LOSS = {"metric": "loss", "mode": "min"}  # even initial weights separate the classes


def test_asha_with_a_trial_that_fails_then_a_kill_and_a_resume(tmp_path: Path, tree: dict[str, Any]) -> None:
    """Trials stop early, one fails for good, the driver is killed; --resume ends it; best.yaml trains."""
    tree |= {
        "trials": 4,
        "max_failures": 0,
        **BY_LOSS,
        "scheduler": {"kind": "asha", "grace": 1, "reduction": 2},
        "overrides": {"train.epochs": 8, "train.checkpoint_every": 1},
        # A grid's order is known: the base recipe, then one that learns, one that breaks, one that does not learn.
        "search": {"kind": "grid"},
        "space": {"optim.lr": {"kind": "grid", "values": [0.01, 1e6, 1e-9]}},
    }
    search = write_search(write_names(tmp_path, packages=False), tree)  # the current folder of all processes
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
        assert [e["step"] for e in after[trial["number"]]["evaluations"]][: max(len(kept) - 1, 0)] == kept[:-1]
    assert after[0]["evaluations"][-1]["step"] == 40 and outcome["best"]["trial"] == 0
    for part in ("best.yaml", "report.html", "search.yaml", "trials/trial-000/model.safetensors"):
        assert (folder / part).exists(), part
    assert "Traceback" not in output

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 3 and parent.info.status == "FINISHED"
    assert {r.data.params["optim.lr"] for r in children} == {"0.01", "1000000.0", "1e-09"}
    assert sorted(r.info.status for r in children) == ["FAILED", "FINISHED", "KILLED"]
    assert parent.data.metrics["best/loss"] == pytest.approx(outcome["best"]["scores"]["loss"])

    best = load_recipe(str(folder / "best.yaml"))
    assert check_recipe(best).parameters > 0 and best.name == "hunt-best" and best.optim.lr == 0.01
    assert all_gone(tmp_path), left_behind(tmp_path)


def test_weights_are_exchanged_and_ctrl_c_saves(tmp_path: Path, tree: dict[str, Any]) -> None:
    """Of two trials one cannot learn: with PBT it continues from the other's weights. Then Ctrl-C saves both."""
    tree |= {
        "trials": 2,
        **BY_LOSS,
        "scheduler": {"kind": "pbt", "interval": 2, "quantile": 0.5, "resample": 0.0},
        "overrides": {"train.epochs": 400, "tracking.enabled": False},
        "space": {"optim.lr": {"kind": "choice", "values": [1e-9, 0.01]}},
    }
    from tests.tune.searches import load
    from tune.space.samplers import known_trials

    seeds = range(100)
    rates = {
        seed: [t["optim.lr"] for t in known_trials(load(tmp_path, tree, f"seed={seed}"), {}) or []] for seed in seeds
    }
    tree["seed"] = next(seed for seed, pair in rates.items() if pair == [1e-9, 0.01])
    search = write_search(tmp_path, tree)
    folder = tmp_path / "runs" / "hunt-001"
    process = start(tmp_path, "tune", search, **PACE)  # leaves the processor to the exchange
    wait_for(lambda: trials(folder) and trials(folder)[0]["exchanges"], process)
    before = len(trials(folder)[0]["evaluations"])
    wait_for(lambda: len(trials(folder)[0]["evaluations"]) > before, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output
    assert "continues from trial 1's weights" in output and "continue with: perceiver tune" in output
    taker = trials(folder)[0]
    losses = [e["metrics"]["loss"] for e in taker["evaluations"]]
    assert losses[before] < losses[0] - 0.05, "a rate of 1e-9 alone would not have moved it"
    assert [t["status"] for t in trials(folder)] == ["unfinished", "unfinished"]
    for number in (0, 1):
        assert list((folder / "trials" / f"trial-00{number}" / "checkpoints").glob("step-*/manifest.json"))
    assert "Traceback" not in output
    assert all_gone(tmp_path), left_behind(tmp_path)
