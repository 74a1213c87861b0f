"""One small Ray instance for all tests of this folder that need it."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def small_ray() -> Iterator[None]:
    """Start a local Ray instance of two CPUs; the variables keep idle workers and avoid network requests."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
