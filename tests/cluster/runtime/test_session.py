"""What the drivers of runs and searches share."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from cluster.recipe.resources import ClusterConfig
from cluster.runtime import session
from cluster.runtime.session import Head, RaySession, connected, mlflow_place


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:hunter2@mlflow.example.org", "https://***@mlflow.example.org"),
        ("env:MLFLOW_URI", "env:MLFLOW_URI"),
        (f"sqlite:///{Path.cwd()}/runs/mlflow.db", "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"),
        ("postgresql://me:hunter2@db/x", "mlflow ui --backend-store-uri 'postgresql://***@db/x'"),
    ],
)
def test_where_the_metrics_are(uri: str, shown: str) -> None:
    assert mlflow_place(uri) == shown


def test_an_error_of_a_task_names_its_cause_and_the_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "open_ray", lambda config: RaySession(True, "/tmp/ray/session_1", ""))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    text = "ray::produce() (pid=7)\n  File \"x.py\", line 1, in decode\nKeyError: 'label'"
    wanted = r"^KeyError: 'label'; Ray's logs: /tmp/ray/session_1/logs$"
    with pytest.raises(RuntimeError, match=wanted), connected(ClusterConfig()):
        raise RayTaskError("produce", text, KeyError("label"))


def test_the_head_of_a_cluster_that_does_not_answer_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    monkeypatch.setattr(session, "ASK_S", 0.0)
    said: list[str] = []
    head = Head(said.append)
    assert head.away() and head.away() and len(said) == 1
    monkeypatch.setattr(session, "check_reachable", lambda address: None)
    assert not head.away()
