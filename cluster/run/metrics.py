"""A run's metrics on Ray's Prometheus endpoint, for the cluster's Grafana.

The driver exports them from the workers' events, so that a training step does no additional work. Every metric has the
label `run`; Ray prefixes the names with `ray_`. `perceiver cluster render grafana RECIPE -o FOLDER` writes a dashboard.
"""

import functools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.recipe.config import Recipe
from cluster.run.stragglers import slowness
from cluster.runtime.hardware import load_hardware
from perceiver.step_trace import trace_step

if TYPE_CHECKING:
    from ray.util.metrics import Gauge


@dataclass(frozen=True)
class Figure:
    """An exported metric.

    Attributes:
        name: name of the metric, without Ray's prefix.
        title: description for users.
        unit: Grafana's name of the unit.
        query: the dashboard's query, with ``{}`` for the metric.
    """

    name: str
    title: str
    unit: str
    query: str = "{}"

    @property
    def expression(self) -> str:
        """Return the dashboard's Prometheus query for the selected runs."""
        return self.query.format(f'ray_{self.name}{{run=~"$run"}}')


FIGURES = (
    Figure("perceiver_samples_per_second", "Samples per second over all workers", "short"),
    Figure("perceiver_step_seconds", "Wall time of an optimizer step", "s"),
    Figure("perceiver_data_wait_share", "Share of the step spent waiting for data", "percentunit"),
    Figure("perceiver_loss", "Training loss of the last step", "short"),
    Figure("perceiver_step", "Optimizer steps done", "short"),
    Figure("perceiver_skipped_steps", "Steps skipped since the start: the gradient was not finite", "short"),
    Figure("perceiver_quarantined_samples", "Bad samples that the workers met since they started", "short"),
    # A timestamp, because the age of a checkpoint would not grow in a run that hangs.
    Figure(
        "perceiver_checkpoint_timestamp_seconds", "Age of the newest checkpoint, or of the start", "s", "time() - {}"
    ),
    Figure("perceiver_worker_failures", "Worker failures since the start", "short"),
    Figure("perceiver_slowest_worker", "Forward passes of the slowest worker as a multiple of the median", "short"),
    Figure("perceiver_model_flops_utilisation", "Model FLOPs as a share of the GPUs' peak", "percentunit"),
)

Export = Callable[[str, float], None]
"""Takes a metric's name and its value."""


class RunMetrics:
    """Turns the events of a run into metrics.

    Args:
        export: exports a metric; see `ray_export`.
        saved_at: time of the checkpoint to resume from, in seconds since the epoch; default: now.
        clock: returns the seconds since the epoch.
    """

    def __init__(self, export: Export, saved_at: float | None = None, clock: Callable[[], float] = time.time) -> None:
        self.export, self.clock = export, clock
        self.peak_samples_s: float | None = None
        self._saved_at = clock() if saved_at is None else saved_at
        self._failures = 0
        self._skipped = 0.0
        self._quarantined: dict[int, int] = {}
        self._forward: dict[int, float] = {}

    def note(self, event: Mapping[str, Any]) -> None:
        """Process an event of a worker; kinds without a metric are ignored."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    def _on_progress(self, event: Mapping[str, Any]) -> None:
        seconds = max(event["seconds"], 1e-9)
        rate = event["samples"] / seconds
        self.export("perceiver_samples_per_second", rate)
        self.export("perceiver_step_seconds", event["seconds"])
        self.export("perceiver_data_wait_share", event["wait_seconds"] / seconds)
        self.export("perceiver_loss", event["loss"])
        self.export("perceiver_step", event["step"])
        if self.peak_samples_s:
            self.export("perceiver_model_flops_utilisation", rate / self.peak_samples_s)

    def _on_pulse(self, event: Mapping[str, Any]) -> None:
        self._quarantined[event["rank"]] = event["quarantined"]
        self.export("perceiver_quarantined_samples", sum(self._quarantined.values()))
        self.export("perceiver_checkpoint_timestamp_seconds", self._saved_at)
        if event.get("forward_s"):
            self._forward[event["rank"]] = event["forward_s"]
            if times := slowness(self._forward):
                self.export("perceiver_slowest_worker", max(times.values()))

    def _on_metrics(self, event: Mapping[str, Any]) -> None:
        self._skipped += event["metrics"].get("train/skipped_steps", 0.0)
        self.export("perceiver_skipped_steps", self._skipped)

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        self._saved_at = self.clock()
        self.export("perceiver_checkpoint_timestamp_seconds", self._saved_at)

    def _on_failure(self, event: Mapping[str, Any]) -> None:
        self._failures += 1
        self._quarantined.clear()
        self._forward.clear()
        self.export("perceiver_worker_failures", self._failures)


def ray_export(run: str) -> Export:
    """Return a function that exports to the connected Ray, with the name of a run as the label."""
    gauges = _gauges()
    return lambda name, value: gauges[name].set(value, tags={"run": run})


@functools.cache
def _gauges() -> "dict[str, Gauge]":
    """Return the gauges of this process, which successive trials of a search share."""
    from ray.util.metrics import Gauge

    return {figure.name: Gauge(figure.name, description=figure.title, tag_keys=("run",)) for figure in FIGURES}


def find_peak(metrics: RunMetrics, recipe: Recipe, classes: int | None, device: str, workers: int) -> None:
    """Set `peak_samples_s` in a thread, if the hardware table contains the GPU, for the utilisation metric."""
    known = [d for d in load_hardware(None).devices.values() if d.match != "cpu" and d.match in device]
    if not known:
        return
    peak = 1e12 * (known[0].fp32_tflops if recipe.train.precision == "fp32" else known[0].bf16_tflops)

    def work() -> None:
        flops = trace_step(recipe.model, classes=classes, frozen=recipe.train.freeze).flops
        metrics.peak_samples_s = peak * workers / flops

    threading.Thread(target=work, name="model-flops", daemon=True).start()
