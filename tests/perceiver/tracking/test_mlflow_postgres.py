"""A real MLflow server on a real PostgreSQL, and many runs at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perceiver.tracking.runs import TrackingConfig, open_tracker, promise_run
from tests.perceiver.tracking.mlflow_server import Server, free_port
from tests.perceiver.tracking.postgres import FITS, Postgres

RUNS, STEPS = 4, 200


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    database = Postgres()
    server = Server(tmp_path / "server", free_port(), database.uri, PYTHONPATH=str(database.driver))
    try:
        server.start()
        yield server
    finally:
        server.stop()
        database.stop()


def train(server: Server, folder: Path, number: int) -> None:
    """Do to MLflow what a run does."""
    folder.mkdir()
    config = TrackingConfig(uri=server.uri, experiment="many", system_metrics=False)
    handle = promise_run(config, f"run-{number}", output=folder, params={"optim": {"lr": 0.1 * number}})
    assert handle is not None
    tracker = open_tracker(handle, folder, close_timeout_s=120)
    for step in range(STEPS):
        tracker.log_metrics(step, {"loss": number + step / STEPS, "accuracy": 0.5})
    tracker.set_tag("checkpoint_uri", str(folder))
    tracker.close("finished")


@pytest.mark.slow
@pytest.mark.skipif(not FITS, reason="the PostgreSQL of the package index is for Linux on x86-64 and Python 3.11")
def test_many_runs_at_once_on_postgresql(server: Server, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with ThreadPoolExecutor(RUNS) as pool:
        list(pool.map(lambda number: train(server, tmp_path / f"run-{number}", number), range(RUNS)))
    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("many")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {f"run-{number}" for number in range(RUNS)}
    assert not server.store.exists(), "nothing went into SQLite"
    for number in range(RUNS):
        run = runs[f"run-{number}"]
        assert run.info.status == "FINISHED" and run.data.params["optim.lr"] == str(0.1 * number)
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [(m.step, m.value) for m in history] == [(step, number + step / STEPS) for step in range(STEPS)]
