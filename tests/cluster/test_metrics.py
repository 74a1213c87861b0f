"""The figures on Ray's Prometheus endpoint, as a scraper sees them, and the dashboard that draws them."""

import json
import os
import re
import subprocess
import sys

import pytest

from cluster.metrics import FIGURES, RunMetrics, dashboard

STEP = {"kind": "progress", "rank": 0, "step": 7, "total_steps": 10, "epoch": 1.0, "loss": 0.5, "metrics": {},
        "seconds": 0.5, "wait_seconds": 0.1, "samples": 64, "quarantined": 3}  # fmt: skip


def test_what_events_come_to() -> None:
    now, seen = [100.0], {}
    metrics = RunMetrics(seen.__setitem__, lambda: now[0])
    metrics.peak_samples_s = 1280.0
    now[0] = 130.0
    metrics.note(STEP)
    assert seen["perceiver_samples_per_second"] == 128
    assert seen["perceiver_data_wait_share"] == pytest.approx(0.2)
    assert seen["perceiver_checkpoint_age_seconds"] == 30
    assert seen["perceiver_quarantined_samples"] == 3
    assert seen["perceiver_model_flops_utilisation"] == pytest.approx(0.1)
    metrics.note({"kind": "checkpoint", "step": 7, "url": "x"})
    metrics.note({"kind": "failure", "failed": 1, "reason": "killed"})
    metrics.note({"kind": "metrics", "step": 7, "metrics": {"train/skipped_steps": 1.0}})
    metrics.note({"kind": "metrics", "step": 8, "metrics": {"eval/loss": 0.4}})
    assert seen["perceiver_checkpoint_age_seconds"] == 0 and seen["perceiver_worker_failures"] == 1
    assert seen["perceiver_skipped_steps"] == 1


def test_the_dashboard_shows_every_figure() -> None:
    asked = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert [re.match(r"ray_(\w+)\{run=~", expr)[1] for expr in asked] == [figure.name for figure in FIGURES]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard()["panels"]]
    assert len(set(places)) == len(places)


SCRAPE = """
import json, sys, time, urllib.request
import ray
from cluster.metrics import RunMetrics, ray_export
ray.init(address="local", num_cpus=1, object_store_memory=100 << 20, log_to_driver=False)
metrics = RunMetrics(ray_export("small-001"))
url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
deadline, found = time.monotonic() + 60, []
while not found and time.monotonic() < deadline:
    metrics.note(json.loads(sys.argv[1]))
    try:
        page = urllib.request.urlopen(url, timeout=10).read().decode()
        found = [line for line in page.splitlines() if line.startswith("ray_perceiver_samples_per_second{")]
    except OSError:
        pass
    time.sleep(0.2)
print(*found)
ray.shutdown()
"""


@pytest.mark.slow
def test_a_scraper_sees_them() -> None:
    """In a process of its own, whose Ray is told to report often."""
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "500"}
    command = [sys.executable, "-c", SCRAPE, json.dumps(STEP)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    line = done.stdout.strip().splitlines()[-1]
    assert 'run="small-001"' in line and line.endswith(" 128.0")
