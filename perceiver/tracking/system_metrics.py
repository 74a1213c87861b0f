"""Load of the machine, recorded like other metrics, so that an outage of the server loses none of it.

MLflow's own monitor ends at the first failed request.
"""

import threading
import time
from typing import Any

import psutil

from perceiver.tracking.record import LineWriter

MEGABYTE = 1e6


class SystemMetrics:
    """A daemon thread that records CPU, memory, disk, network and (with `pynvml` installed) GPU figures.

    The names are MLflow's, so that its "System metrics" tab shows them: `system/<node>/cpu_utilization_percentage`.
    The step is the number of whole intervals since `origin`, so it keeps growing when a run is resumed.

    Args:
        rows: where the samples go; closed with this.
        node: name of this machine within the run; "" for a run on one machine.
        origin: time of step 0 (the start of the run), in seconds since the epoch.
        interval_s: seconds between two samples.
    """

    def __init__(self, rows: LineWriter, node: str, origin: float, interval_s: float = 10.0) -> None:
        self.rows, self.origin, self.interval_s = rows, origin, interval_s
        self.prefix = f"system/{node}/" if node else "system/"
        self._stop = threading.Event()
        self._gpus = _gpu_handles()
        self._start = _counters()
        psutil.cpu_percent()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()
        self.rows.close()

    def sample(self) -> dict[str, float]:
        """Return the figures of now; network traffic since this object was made, in megabytes."""
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
            now = time.time()
            step = max(0, int((now - self.origin) / self.interval_s))
            self.rows.append({"step": step, "time": now, **self.sample()})


def _counters() -> dict[str, float]:
    network = psutil.net_io_counters()
    return {
        "network_receive_megabytes": float(network.bytes_recv) if network else 0.0,
        "network_transmit_megabytes": float(network.bytes_sent) if network else 0.0,
    }


def _gpu_handles() -> list[Any]:
    """Return NVML handles of the NVIDIA GPUs here; none without the optional `pynvml` or a driver."""
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
