"""What a worker measures by itself: optimizer steps with the recipe's model, engine and data, without Ray Data."""

import itertools
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from cluster.recipe.config import Recipe
from perceiver.factory import build_model
from perceiver.optim.schedules import build_schedule
from perceiver.tasks import Batch, build_task
from perceiver.train.engine.deepspeed_config import BatchPlan
from perceiver.train.engine.deepspeed_engine import DeepSpeedEngine
from pipelines.feed.ingest import TrainShare, load_data, train_batches

WARM, LEAST, MOST = 2, 4, 60
"""Steps before the timing begins, and how many are timed."""
DATA_BATCHES = 64
"""Batches at most of the run that fills the caches."""
WRITE_BYTES = 64 << 20


def _base_bytes() -> float:
    """What a worker holds before it builds a model; on a GPU what the device has given away by then."""
    if not torch.cuda.is_available():
        return psutil.Process().memory_full_info().uss  # shared with no other process
    free, total = torch.cuda.mem_get_info()
    return total - free


def _peak_bytes(*, anew: bool = False) -> int:
    """The most memory that this process held since the last call that began `anew`; on a GPU, of the device.

    Where the system keeps no such peak, what the process holds now.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if anew else peak
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        return psutil.Process().memory_info().rss


def measure(recipe: Recipe, micro: Sequence[int], seconds: float) -> dict[str, Any]:
    """Take steps on the same samples again and again; every process of the group calls this.

    Args:
        recipe: with model, optimizer, DeepSpeed section and data.
        micro: samples of a pass, the sizes to measure, in rising order.
        seconds: to spend on each size, about.

    Returns:
        ``base_bytes``, ``sample_cpu_seconds``, ``save_bytes_s`` (of rank 0), ``exchange`` (latency, rate) and
        ``timings``: (size, seconds, bytes).
    """
    dist.barrier()  # what the processes share is only then in the memory of all
    figures: dict[str, Any] = {"base_bytes": _base_bytes()}
    batch, figures["sample_cpu_seconds"] = _batch(recipe, max(micro), seconds)
    before = _peak_bytes(anew=True)
    engine = _engine(recipe, len(load_data(recipe.data).classes), max(micro))
    figures["save_bytes_s"] = _write(Path(recipe.output)) if dist.get_rank() == 0 else 0.0
    figures["exchange"] = _exchange(engine) if dist.get_world_size() > 1 else (0.0, 1e12)
    figures["timings"] = []
    for size in micro:
        _peak_bytes(anew=True)
        part = {name: tensor[:size] for name, tensor in batch.items()}
        spent = _steps(engine, part, seconds)
        figures["timings"].append((size, spent, max(0, _peak_bytes() - before)))
    return figures


def _batch(recipe: Recipe, micro: int, most_s: float) -> tuple[Batch, float]:
    """A batch of real samples, and the CPU seconds to make one of them.

    Samples are made a run at a time, so whole runs are timed, after one that fills the caches.
    """
    data = recipe.data.model_copy(update={"executor": "inline"})
    batches = train_batches(data, load_data(data), TrainShare(recipe.seed, micro, micro, 0, 1_000_000), "cpu")
    run = max(1, recipe.data.run_samples // micro)
    batch = next(itertools.islice(batches, min(run, DATA_BATCHES), None))
    began, clock, taken = time.process_time(), time.perf_counter(), 0
    while taken < 2 * run and (taken < run or time.perf_counter() - clock < most_s):
        batch = next(batches)
        taken += 1
    return batch, (time.process_time() - began) / (taken * micro)


def _engine(recipe: Recipe, classes: int, micro: int) -> DeepSpeedEngine:
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, classes=classes)
    schedule = build_schedule(recipe.optim.schedule, 1_000_000, 1000.0)
    plan = BatchPlan(micro, 1, dist.get_world_size())
    return DeepSpeedEngine(
        model,
        build_task(recipe.task, classes=classes),
        recipe.optim,
        schedule,
        recipe.deepspeed,
        plan,
        precision=recipe.train.precision,
    )


def _steps(engine: DeepSpeedEngine, batch: Batch, most_s: float) -> float:
    """Median seconds of an optimizer step on this batch."""
    batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
    seconds: list[float] = []
    began = time.perf_counter()
    for number in range(MOST + WARM):
        dist.barrier()
        start = time.perf_counter()
        engine.step([batch], number)
        if number >= WARM:
            seconds.append(time.perf_counter() - start)
        spent = torch.tensor(time.perf_counter() - began, device=engine.device)
        dist.broadcast(spent, 0)
        if spent > most_s and len(seconds) >= LEAST:
            break
    return statistics.median(seconds)


def _exchange(engine: DeepSpeedEngine) -> tuple[float, float]:
    """Latency (s) and rate (bytes/s sent by a process) of an all-reduce, from a small and a large one."""
    world = dist.get_world_size()
    times = []
    for elements in (1024, 4 << 20):
        tensor = torch.zeros(elements, device=engine.device)
        rounds = []
        for _ in range(7):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()  # a GPU answers when it has begun
            rounds.append(time.perf_counter() - start)
        times.append(statistics.median(rounds))
    sent = 2 * (world - 1) / world * 4 * ((4 << 20) - 1024)
    return times[0], sent / max(1e-6, times[1] - times[0])


def _write(folder: Path) -> float:
    """Bytes a second written to a folder, until they are on the disk."""
    path = folder / f".calibration-{os.getpid()}"
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(WRITE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return WRITE_BYTES / (time.perf_counter() - began)
