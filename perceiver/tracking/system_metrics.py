"""Load of the machine a worker runs on, logged like any other metric, so that an outage of the tracking server loses
none of it (MLflow's own monitor ends at the first failed request)."""

import threading
import time
from typing import Any

import psutil

from perceiver.tracking.tracker import Tracker

MEGABYTE = 1e6


class SystemMetrics:
    """A daemon thread that logs CPU, memory, disk, network and (with `pynvml` installed) GPU figures.

    The names are MLflow's, so that its "System metrics" tab shows them: `system/<node>/cpu_utilization_percentage`.
    The step is the number of whole intervals since `origin`, so it keeps growing when a run is resumed.

    Args:
        tracker: where the figures go.
        node: name of this machine within the run; "" for a run on one machine.
        origin: seconds since the epoch at which step 0 lies (the start of the run).
        interval_s: seconds between two samples.
    """

    def __init__(self, tracker: Tracker, *, node: str = "", origin: float, interval_s: float = 10.0) -> None:
        self.tracker = tracker
        self.prefix = f"system/{node}/" if node else "system/"
        self.origin = origin
        self.interval_s = interval_s
        self._stop = threading.Event()
        self._gpus = _gpu_handles()
        self._start = _counters()
        psutil.cpu_percent()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def sample(self) -> dict[str, float]:
        """The figures of now; disk and network traffic since this object was made, in megabytes."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage("/")
        figures = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
        }
        figures.update({key: (value - self._start[key]) / MEGABYTE for key, value in _counters().items()})
        for index, handle in enumerate(self._gpus):
            figures.update(_gpu_figures(index, handle))
        return {self.prefix + key: value for key, value in figures.items()}

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            step = int((time.time() - self.origin) / self.interval_s)
            self.tracker.log_metrics(max(step, 0), self.sample())


def _counters() -> dict[str, float]:
    network = psutil.net_io_counters()
    return {
        "network_receive_megabytes": float(network.bytes_recv) if network else 0.0,
        "network_transmit_megabytes": float(network.bytes_sent) if network else 0.0,
    }


def _gpu_handles() -> list[Any]:
    """NVML handles of the NVIDIA GPUs here; none without the optional `pynvml` or a driver."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu_figures(index: int, handle: Any) -> dict[str, float]:
    import pynvml  # pyright: ignore[reportMissingImports]

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
        power = pynvml.nvmlDeviceGetPowerUsage(handle)
    except pynvml.NVMLError:
        return {}
    return {
        f"gpu_{index}_utilization_percentage": float(rates.gpu),
        f"gpu_{index}_memory_usage_megabytes": float(memory.used) / MEGABYTE,
        f"gpu_{index}_memory_usage_percentage": 100.0 * float(memory.used) / float(memory.total),
        f"gpu_{index}_power_usage_watts": power / 1000.0,
    }
