"""A real MLflow server that is stopped and started again during a run."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perceiver.tracking.record import LOG, unsent
from perceiver.tracking.runs import TrackingConfig, create_run, load_handle, open_tracker
from tests.perceiver.tracking.mlflow_server import Server, free_port


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server", free_port())
    yield server
    server.stop()


def wait_until_sent(folder: Path) -> None:
    """Wait until MLflow has all rows that a run has recorded so far."""
    deadline = time.monotonic() + 120
    while unsent(folder):
        assert time.monotonic() < deadline, f"{unsent(folder)} lines were not sent"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_that_is_down_for_a_part_of_the_run_loses_nothing(server: Server, tmp_path: Path) -> None:
    login = server.uri.replace("://", "://me:hunter2@")  # the server asks for none
    handle = create_run(TrackingConfig(uri=login, system_metrics=False), "a run", output=tmp_path, params={})
    assert handle is not None and handle.run_id is None
    tracker = open_tracker(handle, tmp_path)
    tracker.log_metrics(0, {"loss": 1.0})
    server.start()
    wait_until_sent(tmp_path)
    for step in range(1, 100):
        tracker.log_metrics(step, {"loss": 1.0, "nan": math.nan, "inf": -math.inf})
    wait_until_sent(tmp_path)
    server.stop()
    for step in range(100, 200):
        tracker.log_metrics(step, {"loss": 1.0})
    assert unsent(tmp_path) >= 100
    server.start()
    for step in range(200, 300):
        tracker.log_metrics(step, {"loss": 1.0})
    (tmp_path / "note.txt").write_text("hi")
    tracker.log_artifact(tmp_path / "note.txt")
    tracker.set_tag("best_checkpoint_uri", str(tmp_path / "step-100"))
    wait_until_sent(tmp_path)
    tracker.close("finished")
    created = load_handle(tmp_path)
    assert created is not None and created.run_id
    assert [m.step for m in client(server.uri).get_metric_history(created.run_id, "loss")] == list(range(300))
    assert client(server.uri).get_run(created.run_id).info.status == "FINISHED"
    artifacts = [file.path for file in client(server.uri).list_artifacts(created.run_id)]
    assert artifacts == ["best-checkpoint", "note.txt"]
    best = client(server.uri).get_model_version_by_alias("a run.a run", "best")
    assert best.tags["checkpoint_uri"] == str(tmp_path / "step-100")
    log = (tmp_path / LOG).read_text()
    assert "://***@127.0.0.1" in log and "hunter2" not in log, "MLflow prints the address of a run"
