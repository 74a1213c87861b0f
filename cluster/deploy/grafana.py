"""A Grafana dashboard of a run's figures."""

import json

from cluster.deploy.settings import Settings
from cluster.deploy.source import Source
from cluster.run.metrics import dashboard


def render(kind: str, source: Source, settings: Settings) -> dict[str, str]:
    """Return the dashboard, for Grafana's import page; it shows every run, so recipe and machines do not matter."""
    return {"grafana-perceiver.json": json.dumps(dashboard(), indent=1) + "\n"}
