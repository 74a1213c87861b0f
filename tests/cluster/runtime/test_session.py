"""What the drivers of runs and searches share."""

from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from cluster.recipe.resources import ClusterConfig
from cluster.runtime import session
from cluster.runtime.session import RaySession, connected, mlflow_place


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
