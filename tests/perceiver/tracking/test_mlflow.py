"""Runs in real MLflow stores: created, reopened, logged into across crashes and outages."""

import json
import math
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from perceiver.config import UserError
from perceiver.tracking import helper as process
from perceiver.tracking import mlflow_writer as helper
from perceiver.tracking.mlflow_writer import RefusedError, clean_key, deliver
from perceiver.tracking.runs import (
    RunHandle,
    TrackingConfig,
    create_run,
    load_handle,
    open_tracker,
    prewarm,
    replay,
    spool_folder,
)
from perceiver.tracking.tracker import NullTracker


@pytest.fixture(autouse=True)
def no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store shared by the tests of this file, since making one takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def steps(uri: str, handle: RunHandle, key: str) -> list[int]:
    return [metric.step for metric in client(uri).get_metric_history(handle.run_id, key)]


def open_run(uri: str, output: Path, **options: Any) -> RunHandle:
    config = TrackingConfig(uri=uri, system_metrics=False)
    options = {"name": "a run", "params": {}, **options}
    handle = create_run(config, options.pop("name"), output=output, **options)
    assert handle is not None
    return handle


def test_a_run_from_beginning_to_end_on_a_fresh_store(tmp_path: Path) -> None:
    config = TrackingConfig(tags={"team": "x"}, system_metrics_interval=0.2)
    sidecar = prewarm(config, tmp_path)
    params = {"optim": {"lr": 1e-3, "betas": [0.9, 0.99]}, "data": {"password": "hunter2"}, "long": "x" * 9000}
    handle = create_run(config, "digits", output=tmp_path, params=params, prewarmed=sidecar)
    assert handle is not None and handle.run_id and load_handle(tmp_path) == handle
    tracker = open_tracker(handle, spool_folder(tmp_path), system_metrics_node="")
    for step in range(1, 301):
        tracker.log_metrics(step, {"train/loss": 1 / step, "odd key (%)!": step})
    tracker.log_metrics(300, {"eval/nan": math.nan, "eval/inf": math.inf})
    tracker.set_tag("checkpoint_uri", "s3://bucket/step-200")
    tracker.set_tag("checkpoint_uri", "s3://bucket/step-300")
    for best in ("s3://bucket/step-100", "s3://bucket/step-300", "s3://bucket/step-300"):
        tracker.set_tag("best_checkpoint_uri", best)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("<p>hi")
    tracker.log_artifact(tmp_path / "report", "report")
    time.sleep(0.5)
    tracker.close("finished")

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = client(uri).get_run(handle.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "digits")
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.params["data.password"] == "***"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["team"] == "x"
    assert steps(uri, handle, "train/loss") == list(range(1, 301))
    assert run.data.metrics["odd key ____"] == 300
    assert math.isnan(run.data.metrics["eval/nan"])
    assert run.data.metrics["eval/inf"] > 1e300
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    artifact = tmp_path / "mlartifacts" / handle.run_id / "artifacts" / "report" / "index.html"
    assert artifact.read_text() == "<p>hi"
    assert run.data.tags["checkpoint_uri"] == "s3://bucket/step-300"
    models = client(uri).search_logged_models([handle.experiment_id])
    assert [model.tags["checkpoint_uri"] for model in models] == ["s3://bucket/step-300"]
    best = client(uri).get_model_version_by_alias(f"{handle.experiment}.digits", "best")
    assert (best.tags["checkpoint_uri"], best.version, best.run_id) == ("s3://bucket/step-300", 2, handle.run_id)
    assert "hunter2" not in "".join(path.read_text() for path in spool_folder(tmp_path).iterdir())


def direct(uri: str, **fields: Any) -> RunHandle:
    """A run opened without the helper process."""
    fields = {"experiment": "direct", "name": "a run", "key": uuid.uuid4().hex, "created_ms": 1, **fields}
    handle = helper.open_run(client(uri), RunHandle(uri=uri, **fields))
    assert handle is not None
    return replace(handle, params={})


def test_a_resumed_run_goes_on_in_the_same_run(store: str, tmp_path: Path) -> None:
    first = direct(store, params={"lr": "1"})
    events: list[dict[str, Any]] = [
        {"time": 1, "kind": "metrics", "step": 1, "values": {"loss": 1.0}},
        {"time": 2, "kind": "status", "value": "stopped"},
    ]
    assert deliver(client(store), first, events) == []
    assert client(store).get_run(first.run_id).info.status == "KILLED"
    second = open_run(store, tmp_path, params={"lr": 1, "new": 1}, resume=first)
    assert (second.run_id, second.key) == (first.run_id, first.key)
    assert load_handle(tmp_path) == second
    run = client(store).get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "1", "new": "1"}
    tracker = open_tracker(second, spool_folder(tmp_path))
    tracker.log_metrics(2, {"loss": 0.5})
    tracker.close("finished")
    assert steps(store, second, "loss") == [1, 2]


def test_a_run_is_found_by_id_or_key_and_replaced_when_it_is_gone(store: str) -> None:
    first = direct(store)
    assert direct(store, key="other", run_id=first.run_id) == first
    assert direct(store, key=first.key) == first
    assert helper.open_run(client(store), replace(first, key="x", run_id=None), create=False) is None
    client(store).delete_run(first.run_id)
    second = direct(store, key=first.key, run_id=first.run_id)
    assert second.run_id != first.run_id
    assert client(store).get_run(second.run_id).data.tags["resumed_from"] == first.run_id


def test_a_parameter_that_changes_becomes_a_tag(store: str) -> None:
    first = direct(store, params={f"p{index}": "1" for index in range(250)})
    direct(store, key=first.key, params={"p0": "1", "p1": "2", "new": "3"})
    data = client(store).get_run(first.run_id).data
    assert (len(data.params), data.params["p1"], data.params["new"]) == (251, "1", "3")
    assert {key: value for key, value in data.tags.items() if key.startswith("param.")} == {"param.p1": "2"}


CRASH = """
import json, sys
from pathlib import Path
from perceiver.tracking.runs import RunHandle, open_tracker
tracker = open_tracker(RunHandle.from_json(json.loads(sys.argv[1])), Path(sys.argv[2]), interval_s=0.01)
tracker.log_metrics(0, {"loss": 1.0})
tracker.flush(60)
step = 1
while True:
    tracker.log_metrics(step, {"loss": 1.0, "same": 0.5})
    print(step, flush=True)
    step += 1
"""


def test_sigkill_while_sending_loses_and_doubles_nothing_and_ends_the_helper(store: str, tmp_path: Path) -> None:
    handle = open_run(store, tmp_path)
    command = [sys.executable, "-c", CRASH, json.dumps(handle.to_json()), str(spool_folder(tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    logged = [int(process.stdout.readline()) for _ in range(3000)][-1]
    helpers = psutil.Process(process.pid).children()
    assert len(helpers) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(helpers, timeout=15)
    assert alive == []
    tracker = open_tracker(handle, spool_folder(tmp_path))
    tracker.log_metrics(10**6, {"loss": 1.0})
    tracker.close("finished")
    seen = steps(store, handle, "loss")
    assert seen == [*range(len(seen) - 1), 10**6]
    assert len(seen) - 2 >= logged
    assert steps(store, handle, "same") == seen[1:-1]


def test_events_that_are_sent_twice_count_once(store: str, tmp_path: Path) -> None:
    handle = direct(store)
    (tmp_path / "a.txt").write_text("a")
    events = [
        {"time": 1, "kind": "metrics", "step": 1, "values": {"a": 1.0, "b": "nan", "c": "inf"}},
        {"time": 1, "kind": "params", "values": {"p": "1"}},
        {"time": 1, "kind": "tag", "key": "checkpoint_uri", "value": "x"},
        {"time": 1, "kind": "artifact", "path": str(tmp_path / "a.txt"), "folder": ""},
        {"time": 2, "kind": "metrics", "step": 2, "values": {"a": 1.0, "b": "nan", "c": "inf"}},
    ]
    for part in (events[:3], events, events[2:], events):
        assert deliver(client(store), handle, part) == []
    for key in "abc":
        assert steps(store, handle, key) == [1, 2]
    assert len(client(store).search_logged_models([handle.experiment_id], f"source_run_id = '{handle.run_id}'")) == 1
    assert len(client(store).get_run(handle.run_id).outputs.model_outputs) == 1


def test_more_values_than_a_batch_takes(store: str) -> None:
    handle = direct(store)
    wide = {"time": 1, "kind": "metrics", "step": 1, "values": {f"k{index}": 1.0 for index in range(1500)}}
    narrow = [{"time": 1, "kind": "metrics", "step": step, "values": {"a": 1.0, "b": 2.0}} for step in range(700)]
    assert deliver(client(store), handle, [wide, *narrow]) == []
    assert steps(store, handle, "a") == list(range(700))
    assert len(client(store).get_run(handle.run_id).data.metrics) == 1502


def test_what_mlflow_refuses_is_told_apart_from_the_rest(store: str, tmp_path: Path) -> None:
    handle = direct(store)
    events: list[dict[str, Any]] = [
        {"time": 1, "kind": "metrics", "step": 1, "values": {"a": 1.0}},
        {"time": -5, "kind": "metrics", "step": 2, "values": {"a": 1.0}},
        {"time": 1, "kind": "metrics", "step": 3, "values": {"a": 1.0}},
        {"time": 1, "kind": "artifact", "path": str(tmp_path / "absent.txt"), "folder": ""},
        {"time": 1, "kind": "metrics", "step": 4, "values": {"a": 1.0}},
    ]
    rejected = deliver(client(store), handle, events)
    assert [index for index, _ in rejected] == [1, 3]
    assert "absent.txt" in rejected[1][1]
    assert steps(store, handle, "a") == [1, 3, 4]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_server_that_is_down_costs_one_line_and_the_run_is_created_later(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STORE", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    handle = open_run("env:STORE", tmp_path, params={"lr": 1})
    assert time.monotonic() - began < 10
    assert handle.run_id is None
    assert len([record for record in caplog.records if "does not answer" in record.message]) == 1
    tracker = open_tracker(handle, spool_folder(tmp_path), close_timeout_s=0.1)
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.close("stopped")

    monkeypatch.setenv("STORE", store)
    restored = load_handle(tmp_path)
    assert restored is not None and restored.uri == "env:STORE"
    assert replay(TrackingConfig(uri="env:STORE"), tmp_path) == 0
    created = load_handle(tmp_path)
    assert created is not None and created.run_id and created.key == handle.key
    assert steps(store, created, "loss") == [1]
    run = client(store).get_run(created.run_id)
    assert (run.info.status, run.data.params) == ("KILLED", {"lr": "1"})
    assert run.info.start_time == handle.created_ms
    assert direct(store, experiment=handle.experiment, key=handle.key).run_id == created.run_id


def test_a_required_server_that_is_down_is_an_error(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"http://u:hunter2@127.0.0.1:{free_port()}", required=True)
    with pytest.raises(UserError, match=r"does not answer .*tracking.required=false") as caught:
        create_run(config, "x", output=tmp_path, params={})
    assert "hunter2" not in str(caught.value)


def test_a_helper_that_was_started_before_its_run_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_shared", None)
    monkeypatch.setattr(process, "_share_helper", False)
    process.start_helper({"enabled": False})
    assert process._shared is None
    process.start_helper({"uri": "given later"})
    early = process._shared
    assert early is not None
    try:
        config = TrackingConfig(system_metrics=False)
        handle = create_run(config, "early", output=tmp_path, params={}, prewarmed=prewarm(config, tmp_path))
        assert handle is not None and handle.run_id and process._shared is early
        assert early._process is not None
        written = {Path(f"/proc/{early._process.pid}/fd/{number}").readlink() for number in (1, 2)}
        assert written == {spool_folder(tmp_path).resolve() / "mlflow.log"}
    finally:
        early.kill()


def test_a_server_that_accepts_and_never_answers_is_given_up_in_time(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}", required=True)
        sidecar = prewarm(config, tmp_path)
        assert sidecar is not None
        sidecar.call({"op": "load"}, 60)
        began = time.monotonic()
        with pytest.raises(UserError, match="does not answer"):
            create_run(config, "x", output=tmp_path, params={}, prewarmed=sidecar)
        assert time.monotonic() - began < 13


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "ftp://x", "env:NOT_SET_ANYWHERE"])
def test_a_place_that_mlflow_has_no_store_for_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        create_run(TrackingConfig(uri=uri), "x", output=tmp_path, params={})


def test_a_deleted_experiment_is_refused_with_the_fix(store: str, tmp_path: Path) -> None:
    handle = direct(store, experiment="gone")
    client(store).delete_experiment(handle.experiment_id)
    with pytest.raises(RefusedError, match=r"tracking\.experiment"):
        direct(store, experiment="gone")
    with pytest.raises(UserError, match=r"refuses the run: .*tracking\.experiment"):
        open_run(store, tmp_path, name="gone")


def test_nothing_to_replay_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tracked run"):
        replay(TrackingConfig(), tmp_path)


def test_off_means_off(tmp_path: Path) -> None:
    config = TrackingConfig(enabled=False)
    assert prewarm(config, tmp_path) is None
    assert create_run(config, "x", output=tmp_path, params={}) is None
    assert isinstance(open_tracker(None, tmp_path), NullTracker)
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
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "mine")
    first = open_run(store, tmp_path / "a")
    run = client(store).get_run(first.run_id)
    assert run.info.run_name == "mine"
    assert client(store).get_experiment(run.info.experiment_id).name == first.experiment == "elsewhere"

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "never made")
    monkeypatch.setenv("MLFLOW_RUN_ID", str(first.run_id))
    second = open_run(store, tmp_path / "b")
    assert (second.run_id, second.experiment) == (first.run_id, "elsewhere"), "the run says in which experiment it is"
    assert client(store).get_experiment_by_name("never made") is None
    monkeypatch.setenv("MLFLOW_RUN_ID", "other")
    assert open_run(store, tmp_path / "a", resume=first).run_id == first.run_id, "a run goes on where it was"


def test_the_driver_never_imports_mlflow() -> None:
    code = "import sys, perceiver.tracking.runs, perceiver.tracking.mlflow_writer; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("key", "clean"),
    [("a b/c-d.e", "a b/c-d.e"), ("a//b/../c", "a/c"), ("/x/", "x"), ("..", "_"), ("ä%", "ä_"), ("k" * 300, "k" * 250)],
)
def test_keys_become_what_mlflow_accepts(key: str, clean: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert clean_key(key) == clean
    _validate_metric_name(clean_key(key))
