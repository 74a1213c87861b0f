"""The metrics on Ray's Prometheus endpoint."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cluster.run.metrics import RunMetrics

STEP = {
    "kind": "progress",
    "rank": 0,
    "step": 7,
    "total_steps": 10,
    "epoch": 1.0,
    "loss": 0.5,
    "metrics": {},
    "seconds": 0.5,
    "wait_seconds": 0.1,
    "samples": 64,
}


def pulse(rank: int, quarantined: int) -> dict[str, Any]:
    return {"kind": "pulse", "rank": rank, "batches": 1, "quarantined": quarantined, "last": False}


def test_events_become_metrics() -> None:
    seen: dict[str, float] = {}
    metrics = RunMetrics(seen.__setitem__)
    metrics.peak_samples_s = 1280.0
    metrics.note(STEP)
    assert seen["perceiver_samples_per_second"] == 128
    assert seen["perceiver_data_wait_share"] == pytest.approx(0.2)
    assert seen["perceiver_model_flops_utilisation"] == pytest.approx(0.1)
    metrics.note({"kind": "failure", "failed": 1, "reason": "killed"})
    metrics.note({"kind": "metrics", "step": 7, "metrics": {"train/skipped_steps": 1.0}})
    metrics.note({"kind": "metrics", "step": 8, "metrics": {"eval/loss": 0.4}})
    assert seen["perceiver_worker_failures"] == 1
    assert seen["perceiver_skipped_steps"] == 1


def test_bad_samples_of_all_workers_are_counted() -> None:
    seen: dict[str, float] = {}
    metrics = RunMetrics(seen.__setitem__)
    for event in (pulse(0, 3), pulse(1, 1), pulse(1, 2)):
        metrics.note(event)
    assert seen["perceiver_quarantined_samples"] == 5
    metrics.note({"kind": "failure", "failed": 1, "reason": "killed"})
    metrics.note(pulse(1, 1))
    assert seen["perceiver_quarantined_samples"] == 1, "the workers were restarted"


def test_the_time_of_the_last_checkpoint_survives_a_resume_and_a_hang() -> None:
    now, seen = [100.0], {}
    metrics = RunMetrics(seen.__setitem__, saved_at=40.0, clock=lambda: now[0])
    metrics.note(pulse(0, 0))
    assert seen["perceiver_checkpoint_timestamp_seconds"] == 40
    now[0] = 130.0
    metrics.note({"kind": "checkpoint", "step": 7, "url": "x"})
    now[0] = 500.0
    metrics.note(pulse(0, 0))
    assert seen["perceiver_checkpoint_timestamp_seconds"] == 130
    fresh = RunMetrics(seen.__setitem__, clock=lambda: now[0])
    fresh.note(pulse(0, 0))
    assert seen["perceiver_checkpoint_timestamp_seconds"] == 500, "without a checkpoint, the start"


SCRAPE = """
import json, sys, time, urllib.request
import ray
from cluster.run.metrics import RunMetrics, ray_export
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
def test_a_scraper_sees_the_metrics() -> None:
    """A separate process, with a short report interval of Ray."""
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "500"}
    command = [sys.executable, "-c", SCRAPE, json.dumps(STEP)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    line = done.stdout.strip().splitlines()[-1]
    assert 'run="small-001"' in line and line.endswith(" 128.0")
