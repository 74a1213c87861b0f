"""Runs as the driver and the workers see them: created, reopened, logged into across crashes and outages."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy
from pydantic import ValidationError

from perceiver.config import UserError
from perceiver.tracking import mlflow_writer
from perceiver.tracking import runs as runs_module
from perceiver.tracking import tracker as tracker_module
from perceiver.tracking.record import HISTORY, SYSTEM, read_rows, unsent
from perceiver.tracking.runs import (
    RunHandle,
    TrackingConfig,
    create_run,
    load_handle,
    open_tracker,
    promise_run,
    reconcile,
)
from perceiver.tracking.tracker import NullTracker
from tests.perceiver.tracking.mlflow_server import free_port


@pytest.fixture(autouse=True)
def no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a SQLite store shared by the tests of this file, since making one takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Create runs in this process, which has imported MLflow, in place of one process for each."""

    def ask(request: Any, log: Path, timeout_s: float) -> dict[str, Any]:
        return json.loads(
            json.dumps(mlflow_writer.answer(RunHandle.from_json(json.loads(json.dumps(request))["handle"])))
        )

    monkeypatch.setattr(runs_module, "ask", ask)


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def points(uri: str, handle: RunHandle, key: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in client(uri).get_metric_history(handle.run_id, key)]


def recorded(folder: Path, key: str, name: str = HISTORY) -> list[tuple[int, int, float]]:
    rows, _ = read_rows(folder / name, 0)
    return [(row["step"], round(1000 * row["time"]), row[key]) for row in rows if key in row]


def new_run(uri: str, output: Path, **options: Any) -> RunHandle:
    config = TrackingConfig(uri=uri, system_metrics=False)
    options = {"name": "a run", "params": {}, **options}
    handle = create_run(config, options.pop("name"), output=output, **options)
    assert handle is not None
    return handle


PLACE = "a%20b?c#ü d" if sqlalchemy.__version__ >= "2.1" else "plain"
"""SQLAlchemy 2.0 has no URI for the first."""


def test_a_run_from_beginning_to_end_in_the_default_store(tmp_path: Path) -> None:
    folder = tmp_path / PLACE
    config = TrackingConfig(tags={"team": "x"}, system_metrics_interval=0.2)
    params = {"optim": {"lr": 1e-3, "betas": [0.9, 0.99]}, "data": {"password": "hunter2"}, "long": "x" * 9000}
    handle = create_run(config, "digits", output=folder, params=params)
    assert handle is not None and handle.run_id and load_handle(folder) == handle
    tracker = open_tracker(handle, folder, system_metrics_node="")
    for step in range(1, 301):
        tracker.log_metrics(step, {"train/loss": 1 / step})
    tracker.log_metrics(300, {"eval/nan": math.nan}, time_s=4e9)
    tracker.set_tag("checkpoint_uri", "s3://id:hunter2@bucket/step-300")
    tracker.set_tag("token", "hunter2")
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("<p>hi")
    tracker.log_artifact(folder / "report", "report")
    while not recorded(folder, "system/system_memory_usage_percentage", SYSTEM):
        time.sleep(0.1)
    tracker.close("finished")
    tracker.close("failed")
    tracker.log_metrics(301, {"train/loss": 0.0})

    assert (folder / "mlflow.db").exists() and unsent(folder) == 0
    run = client(handle.uri).get_run(handle.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "digits")
    assert (run.data.params["optim.lr"], run.data.params["data.password"]) == ("0.001", "***")
    assert len(run.data.params["long"]) == 6000
    assert (run.data.tags["team"], run.data.tags["token"]) == ("x", "***")
    assert points(handle.uri, handle, "train/loss") == recorded(folder, "train/loss")
    assert [step for step, _, _ in recorded(folder, "train/loss")] == list(range(1, 301))
    assert [when for _, when, _ in points(handle.uri, handle, "eval/nan")] == [4_000_000_000_000]
    load = "system/system_memory_usage_percentage"
    assert points(handle.uri, handle, load) == recorded(folder, load, SYSTEM)
    artifact = folder / "mlartifacts" / str(handle.run_id) / "artifacts" / "report" / "index.html"
    assert artifact.read_text() == "<p>hi"
    written = [folder / HISTORY, *(folder / "tracking").iterdir()]
    assert "hunter2" not in "".join(path.read_text() for path in written)


def test_a_resumed_run_continues_in_the_same_run(store: str, tmp_path: Path, here: None) -> None:
    first = new_run(store, tmp_path, params={"lr": "1"})
    tracker = open_tracker(first, tmp_path)
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.close("stopped")
    assert client(store).get_run(first.run_id).info.status == "KILLED"
    second = new_run(store, tmp_path, params={"lr": 1, "new": 1}, resume=load_handle(tmp_path))
    assert (second.run_id, second.key, second.created_ms) == (first.run_id, first.key, first.created_ms)
    run = client(store).get_run(first.run_id)
    assert (run.info.status, run.data.params) == ("RUNNING", {"lr": "1", "new": "1"})
    tracker = open_tracker(second, tmp_path)
    tracker.log_metrics(2, {"loss": 0.5})
    tracker.close("finished")
    assert [step for step, _, _ in points(store, second, "loss")] == [1, 2]
    elsewhere = new_run(store, tmp_path / "other machine", resume=str(first.run_id))
    assert (elsewhere.run_id, elsewhere.key, elsewhere.created_ms) == (first.run_id, first.key, first.created_ms)


CRASH = """
import sys
from pathlib import Path
from perceiver.tracking.runs import load_handle, open_tracker
tracker = open_tracker(load_handle(Path(sys.argv[1])), Path(sys.argv[1]))
for step in range(10**9):
    tracker.log_metrics(step, {"loss": 1.0, "same": 0.5})
    print(step, flush=True)
"""


def test_sigkill_of_a_run_then_a_resume_from_a_checkpoint(store: str, tmp_path: Path, here: None) -> None:
    handle = new_run(store, tmp_path)
    process = subprocess.Popen([sys.executable, "-c", CRASH, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    logged = [int(process.stdout.readline()) for _ in range(3000)][-1]
    senders = psutil.Process(process.pid).children()
    assert len(senders) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(senders, timeout=60)
    assert alive == []
    seen = points(store, handle, "loss")
    assert seen == recorded(tmp_path, "loss") == [(step, *rest) for step, (_, *rest) in enumerate(seen)]
    assert len(seen) > logged, "what was recorded was sent, although the run was killed"

    checkpoint = "".join((tmp_path / HISTORY).read_text().splitlines(keepends=True)[:2000])
    tracker = open_tracker(handle, tmp_path, history=checkpoint)
    for step in range(2000, len(seen) + 10):
        tracker.log_metrics(step, {"loss": 2.0})
    tracker.close("finished")
    assert [step for step, _, _ in recorded(tmp_path, "loss")] == list(range(len(seen) + 10))
    again = points(store, handle, "loss")
    assert again[: len(seen)] == seen
    assert again[len(seen) :] == recorded(tmp_path, "loss")[len(seen) :]


def test_sigkill_of_the_mlflow_process_costs_nothing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    monkeypatch.setattr(tracker_module, "REVIVE_S", 0.0)
    handle = new_run(store, tmp_path)
    before = set(psutil.Process().children())
    tracker = open_tracker(handle, tmp_path)
    for step in range(3):
        (sender,) = set(psutil.Process().children()) - before
        sender.kill()
        sender.wait(10)
        tracker.log_metrics(step, {"loss": 1.0})
    tracker.close("finished")
    assert points(store, handle, "loss") == recorded(tmp_path, "loss")
    assert client(store).get_run(handle.run_id).info.status == "FINISHED"
    assert set(psutil.Process().children()) == before


def test_a_server_that_is_down_costs_one_line_and_the_run_is_created_later(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, here: None
) -> None:
    monkeypatch.setenv("STORE", f"http://127.0.0.1:{free_port()}")
    handle = new_run("env:STORE", tmp_path, params={"lr": 1})
    assert handle.run_id is None
    assert len([record for record in caplog.records if "does not answer" in record.message]) == 1
    tracker = open_tracker(handle, tmp_path, close_timeout_s=0.1)
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.close("stopped")
    assert unsent(tmp_path) == 3 and "lacks 3 lines" in caplog.text

    monkeypatch.setenv("STORE", store)
    restored = load_handle(tmp_path)
    assert restored is not None and restored.uri == "env:STORE"
    assert reconcile(TrackingConfig(uri="env:STORE"), tmp_path) == 0
    created = load_handle(tmp_path)
    assert created is not None and created.run_id and created.key == handle.key
    assert points(store, created, "loss") == recorded(tmp_path, "loss")
    run = client(store).get_run(created.run_id)
    assert (run.info.status, run.data.params) == ("KILLED", {"lr": "1"})
    assert run.info.start_time == handle.created_ms


def test_the_history_of_a_checkpoint_replaces_a_record_on_another_machine(
    store: str, tmp_path: Path, here: None
) -> None:
    handle = new_run(store, tmp_path)
    history = '{"step": 1, "time": 4e9, "loss": 1.0}\n{"step": 2, "time": 4e9, "loss": 2.0}\n'
    assert reconcile(TrackingConfig(uri=store), tmp_path, history=history, status="failed") == 0
    assert [(step, value) for step, _, value in points(store, handle, "loss")] == [(1, 1.0), (2, 2.0)]
    assert client(store).get_run(handle.run_id).info.status == "FAILED"


def test_a_promised_run_is_created_by_its_tracker_and_promised_again(store: str, tmp_path: Path) -> None:
    config, tags = TrackingConfig(uri=store), {"mlflow.parentRunId": "x"}
    first = promise_run(config, "trial", output=tmp_path, params={"lr": 1}, tags=tags)
    assert first is not None and first.run_id is None and first.worker_closes
    open_tracker(first, tmp_path).close("stopped")
    again = promise_run(config, "trial", output=tmp_path, params={"lr": 2})
    assert again is not None and again.run_id and again.key == first.key
    run = client(store).get_run(again.run_id)
    assert (run.info.status, run.data.params["lr"]) == ("KILLED", "1")
    assert run.data.tags["mlflow.parentRunId"] == "x"
    open_tracker(again, tmp_path).detach()
    assert client(store).get_run(again.run_id).info.status == "RUNNING"


def test_a_required_server_that_is_down_is_an_error(tmp_path: Path, here: None) -> None:
    config = TrackingConfig(uri=f"http://u:hunter2@127.0.0.1:{free_port()}", required=True)
    with pytest.raises(UserError, match=r"tracking\.required=false") as caught:
        create_run(config, "x", output=tmp_path, params={})
    assert "hunter2" not in str(caught.value)


def test_a_server_that_accepts_and_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}", required=True)
        with pytest.raises(UserError, match=r"tracking\.required=false"):
            create_run(config, "x", output=tmp_path, params={})


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "ftp://x", "env:NOT_SET_ANYWHERE"])
def test_a_place_that_mlflow_has_no_store_for_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        create_run(TrackingConfig(uri=uri), "x", output=tmp_path, params={})


def test_a_store_that_refuses_is_an_error(store: str, tmp_path: Path, here: None) -> None:
    handle = new_run(store, tmp_path, name="gone")
    client(store).delete_experiment(handle.experiment_id)
    with pytest.raises(UserError, match=r"tracking\.experiment"):
        new_run(store, tmp_path, name="gone")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tracked run"):
        reconcile(TrackingConfig(), tmp_path)


def test_off_means_off(tmp_path: Path) -> None:
    config = TrackingConfig(enabled=False)
    assert create_run(config, "x", output=tmp_path, params={}) is None
    assert promise_run(config, "x", output=tmp_path, params={}) is None
    tracker = open_tracker(None, tmp_path)
    assert isinstance(tracker, NullTracker)
    tracker.log_metrics(1, {"a": 1.0})
    tracker.set_tag("a", "b")
    tracker.log_artifact(Path("x"))
    tracker.close("finished")
    tracker.detach()
    assert list(tmp_path.iterdir()) == []


def test_environment_variables_mean_what_they_mean_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert TrackingConfig().store_uri(tmp_path) == "http://there"
    assert TrackingConfig(uri="http://here").store_uri(tmp_path) == "http://here"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert TrackingConfig().store_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ValidationError):
        TrackingConfig.model_validate({"url": "x"})


def test_experiment_run_name_and_run_id_of_the_environment(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "mine")
    first = new_run(store, tmp_path / "a")
    run = client(store).get_run(first.run_id)
    assert run.info.run_name == "mine"
    assert client(store).get_experiment(run.info.experiment_id).name == first.experiment == "elsewhere"

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "never made")
    monkeypatch.setenv("MLFLOW_RUN_ID", str(first.run_id))
    second = new_run(store, tmp_path / "b")
    assert (second.run_id, second.experiment) == (first.run_id, "elsewhere"), "the run's own experiment counts"
    assert client(store).get_experiment_by_name("never made") is None
    monkeypatch.setenv("MLFLOW_RUN_ID", "other")
    assert new_run(store, tmp_path / "a", resume=first).run_id == first.run_id, "a run continues where it was"


def test_a_package_of_the_same_name_in_the_current_folder_does_not_disturb(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "perceiver").mkdir()
    (tmp_path / "perceiver" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    assert new_run(store, tmp_path / "run").run_id


def test_the_driver_never_imports_mlflow() -> None:
    code = "import sys, perceiver.tracking.runs, perceiver.tracking.mlflow_writer; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0
