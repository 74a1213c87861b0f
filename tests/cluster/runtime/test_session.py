"""What the drivers of runs and searches share."""

from pathlib import Path

import pytest

from cluster.runtime.session import mlflow_place


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
