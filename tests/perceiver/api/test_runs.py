"""`perceiver.train`, `resume` and what a run has left; the workers are replaced, one slow test uses Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import perceiver
from cluster.recipe.config import build_recipe
from cluster.record.run_folder import RunFolder
from cluster.run import launch as launching
from cluster.run.context import Launch
from cluster.runtime.local import NO_API_SERVER
from tests.cluster.recipes import small_tree, write_recipe
from tests.homes import share_kernels

FIGURES = {"accuracy": 0.75, "loss": 0.5}


class Workers:
    """Stands for the workers of a run: writes a history and ends as it is told."""

    def __init__(self) -> None:
        self.outcome: dict[str, Any] = {"status": "finished", "evaluation": FIGURES}
        self.launches: list[Launch] = []

    def __call__(self, launch: Launch) -> dict[str, Any]:
        self.launches.append(launch)
        row = json.dumps({"step": 10, "time": 1.0, "train/loss": 0.5})
        launch.folder.write("history.jsonl", row + "\n" + '{"step": 11, "tra')
        return {"step": 10, "total_steps": 10, **self.outcome, "result": "Ray's"}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.setattr(launching, "run_workers", found := Workers())
    monkeypatch.setattr("cluster.run.report.build_report", lambda *_: "report/index.html")
    return found


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    found = small_tree(tmp_path, "nothing")
    found["tracking"] = {"enabled": False}
    found["cluster"] = {"workers": 1}
    return found


def test_a_dict_a_file_and_a_recipe_train_alike_and_in_silence(
    tree: dict[str, Any], images: str, workers: Workers, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kinds = (tree, write_recipe(tmp_path, tree), build_recipe(tree))
    for number, recipe in enumerate(kinds, 1):
        run = perceiver.train(recipe, data=Path(images), progress=False, **{"train.epochs": 3, "optim.lr": 1e-4})
        assert run == perceiver.Run(tmp_path / "runs" / f"small-{number:03d}")
        launch = workers.launches[-1]
        assert (launch.recipe.data.url, launch.recipe.train.epochs, launch.recipe.optim.lr) == (images, 3, 1e-4)
    assert capfd.readouterr() == ("", "")
    assert tree["data"] == {"url": "nothing"}, "the caller's dict does not change"
    assert (run.status, run.step, run.metrics, run.mlflow_run_id) == ("finished", 10, FIGURES, None)
    assert [row["train/loss"] for row in run.history] == [0.5]
    assert run.recipe["train"]["epochs"] == 3 and run.report is None and run.checkpoint is None
    assert [launch.command.split()[2] for launch in workers.launches] == [
        f"{tmp_path}/runs/small-001/recipe.yaml",
        f"{tmp_path}/small.yaml",
        f"{tmp_path}/runs/small-003/recipe.yaml",
    ], "the command that continues the run"


def test_progress_is_all_that_is_printed(
    tree: dict[str, Any], images: str, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    run = perceiver.train(tree, data=images)
    said = capsys.readouterr()
    assert f"{run.folder}: perceiver" in said.out and "train on" not in said.out and not said.err


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        ({"status": "refused", "error": "no room"}, perceiver.UserError),
        ({"status": "failed", "error": "worker 0: broke"}, perceiver.RunError),
        ({"status": "stopped"}, KeyboardInterrupt),
    ],
)
def test_each_end_has_its_exception(
    outcome: dict[str, Any], error: type[BaseException], tree: dict[str, Any], images: str, workers: Workers
) -> None:
    workers.outcome = outcome
    with pytest.raises(error, match=outcome.get("error", "small-001")) as raised:
        perceiver.train(tree, data=images, progress=False)
    if isinstance(raised.value, perceiver.RunError):
        assert raised.value.run.status == "failed" and "small-001/logs" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"train.epoch": 5}, "train.epoch"), ({"data.url": object()}, "data.url"), ({"train.epochs": "many"}, "epochs")],
)
def test_wrong_overrides_are_refused(change: dict[str, Any], named: str, tree: dict[str, Any]) -> None:
    for start in (False, True):
        with pytest.raises(perceiver.UserError, match=named):
            perceiver.train(tree, async_=start, **change)
    with pytest.raises(perceiver.UserError, match="wanted the path of a file, a dict or a Recipe"):
        perceiver.train(3)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_a_run_is_resumed_by_its_folder(
    tree: dict[str, Any], images: str, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.outcome = {"status": "stopped"}
    with pytest.raises(KeyboardInterrupt):
        perceiver.train(tree, data=images, progress=False)
    workers.outcome = {"status": "finished", "evaluation": FIGURES}
    monkeypatch.chdir(tmp_path / "runs")
    run = perceiver.resume("small-001", progress=False, **{"cluster.max_failures": 1})
    assert run.status == "finished" and (tmp_path / "runs" / "small-001" / "run.json").exists()
    assert workers.launches[-1].resume and workers.launches[-1].recipe.cluster.max_failures == 1


def test_what_is_no_run_and_a_secret_are_refused(tmp_path: Path, tree: dict[str, Any], images: str) -> None:
    with pytest.raises(perceiver.UserError, match=r"no-run is not the folder of a run"):
        perceiver.resume(tmp_path / "no-run")
    with pytest.raises(perceiver.UserError, match=r"no-run is not the folder of a run"):
        print(perceiver.Run(tmp_path / "no-run").metrics)
    folder = RunFolder(str(tmp_path), "secret-001")
    folder.note(status="stopped")
    folder.write("recipe.yaml", yaml.safe_dump({**tree, "data": {"url": images, "storage_options": {"secret": "***"}}}))
    with pytest.raises(perceiver.UserError, match=r"data\.storage_options\.secret was a secret"):
        perceiver.resume(folder.url)


def test_packages_of_the_names_of_functions_call_them(tree: dict[str, Any]) -> None:
    import perceiver.export.weights
    import perceiver.train.loop

    for function in (perceiver.train, perceiver.export):
        with pytest.raises(perceiver.UserError):
            function("no-such-file", "safetensors", "there") if function is perceiver.export else function("no-file")
    import cloudpickle

    # A function of a notebook, which Ray pickles with the modules that it names.
    functions = cloudpickle.loads(cloudpickle.dumps(lambda: (perceiver, perceiver.train)))()
    assert functions == (perceiver, sys.modules["perceiver.train"])


def test_every_name_exists_and_the_import_is_light() -> None:
    assert sorted(perceiver.__all__) == perceiver.__all__
    assert all(getattr(perceiver, name) is not None for name in perceiver.__all__)
    code = "import sys, perceiver; sys.exit(bool({'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Path(perceiver.__file__).with_name("py.typed").exists()


PROGRAM = """
import sys, threading, ray, perceiver
tree, data = __import__("json").loads(sys.argv[1]), sys.argv[2]

ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=1)
def task():
    trainer = perceiver.build_trainer(tree, data=data, progress=False)
    assert isinstance(trainer, ray.train.torch.TorchTrainer)
    return trainer.fit()

result = ray.get(task.remote())
assert result.metrics["step"] == 10 and "eval/accuracy" in result.metrics, result.metrics
with result.checkpoint.as_directory() as place:
    facts = __import__("json").load(open(place + "/checkpoint.json"))
run = perceiver.Run(tree["output"] + "/small-001")
assert facts["uri"] == run.checkpoint and facts["step"] == 10, facts
assert run.metrics["accuracy"] > 0.4
assert [row["step"] for row in run.history if "train/loss" in row] == list(range(1, 11))

background = perceiver.train(tree, data=data, async_=True, **{"train.epochs": 10_000})
while background.progress()["step"] < 3:
    assert background.running, background.wait()
    threading.Event().wait(0.2)
assert background.progress()["total_steps"] == 50_000
background.stop()
stopped = background.wait(120)
assert ray.is_initialized()
assert stopped.status == "stopped" and stopped.checkpoint, stopped.status
print("done")
"""


@pytest.mark.slow
def test_as_a_trainer_in_a_ray_task_and_in_the_background(tree: dict[str, Any], images: str, tmp_path: Path) -> None:
    tree["output"] = str(tmp_path / "runs")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), json.dumps(tree), images]
    environment = {**os.environ, "HOME": str(share_kernels(tmp_path))}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        environment.pop(name, None)
    # Otherwise Ray Train asks whatever listens on the default port whether the run is known there.
    environment["RAY_API_SERVER_ADDRESS"] = NO_API_SERVER
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr
