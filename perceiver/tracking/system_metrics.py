"""Load of the machine, recorded like other metrics, so that nothing is lost when the server is down.

MLflow's own monitor stops at the first failed request.
"""

import threading
import time
from typing import Any

import psutil

from perceiver.tracking.record import LineWriter

MEGABYTE = 1e6


def record_load(rows: LineWriter, node: str, origin: float, interval_s: float, stop: threading.Event) -> None:
    """Record CPU, memory, disk, network and (with `pynvml` installed) GPU load until `stop` is set.

    The names are those of MLflow's "System metrics" tab: `system/<node>/cpu_utilization_percentage`. The step is the
    number of whole intervals since `origin`, so it keeps growing when a run is resumed.

    Args:
        rows: receives the samples; closed at the end.
        node: name of this machine in the run; "" for a run on one machine.
        origin: start of the run, in seconds since the epoch.
        interval_s: seconds between two samples.
        stop: set to end the recording.
    """
    prefix, gpus, before = f"system/{node}/" if node else "system/", _gpu_handles(), _counters()
    psutil.cpu_percent()
    while not stop.wait(interval_s):
        memory, disk, now = psutil.virtual_memory(), psutil.disk_usage("/"), time.time()
        figures = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
            **{key: (value - before[key]) / MEGABYTE for key, value in _counters().items()},
        }
        for index, handle in enumerate(gpus):
            figures.update(_gpu_figures(index, handle))
        step = max(0, int((now - origin) / interval_s))
        rows.append({"step": step, "time": now, **{prefix + key: value for key, value in figures.items()}})
    rows.close()


def _counters() -> dict[str, float]:
    network = psutil.net_io_counters()
    return {
        "network_receive_megabytes": float(network.bytes_recv) if network else 0.0,
        "network_transmit_megabytes": float(network.bytes_sent) if network else 0.0,
    }


def _gpu_handles() -> list[Any]:
    """Return NVML handles of the NVIDIA GPUs; empty without the optional `pynvml` or a driver."""
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
