"""Workers of Ray Train that measure: `cluster.capacity.rehearsal`, its task as JSON on stdin.

Each worker first takes optimizer steps on fixed samples, at the same time as the others. Then it takes real steps with
Ray Data, which show what a step costs in addition: data tasks, Ray's own processes, and waiting for other workers.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.targets import with_targets
from cluster.record.failures import failure_reason
from cluster.run.trainer import Share, worker_resources
from cluster.run.worker import build_engine, find_rank, first_model, training_batches
from cluster.runtime.local import cluster_cpus, start_ray
from cluster.runtime.process_group import torch_config
from cluster.runtime.ray_internals import rest_data_scheduler
from cluster.worker.setup import WorkerRank
from perceiver.optim.schedules import build_schedule
from perceiver.tasks import Batch, build_task
from perceiver.tracking.redaction import Unshown
from perceiver.train.engine.deepspeed_config import BatchPlan
from perceiver.train.engine.deepspeed_engine import DeepSpeedEngine
from perceiver.train.loop import Span, train
from pipelines.feed.ingest import TrainShare, load_data, train_batches
from pipelines.shards.quarantine import Quarantine

WARM, LEAST, MOST = 2, 4, 60
"""Untimed steps at the beginning, and the least and most timed steps."""
DATA_BATCHES = 64
"""Most batches to fill the caches."""
WRITE_BYTES = 64 << 20
SHORTEST, TIMES = 24, 3
"""Least number of real steps, and their duration relative to that of a measured size."""
LEFT_OUT = 3
"""The first 1/LEFT_OUT of the real steps is not timed: processes still start, and samples are buffered."""


def rehearse(config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure as a worker; return the figures of `measure`, and ``seconds``: the mean of a real step."""
    recipe, me = build_recipe(config["recipe"].value), find_rank(1)
    figures = measure(recipe, config["micro"], config["seconds"])
    number = max(SHORTEST, round(TIMES * config["seconds"] / figures["timings"][-1][1]))
    steps = torch.tensor(number, device=me.device)
    dist.broadcast(steps, 0)
    return {**figures, "seconds": _real_steps(recipe, me, int(steps))}


def _real_steps(recipe: Recipe, me: WorkerRank, steps: int) -> float:
    """Take a worker's steps without evaluation, checkpoints and tracking; return the mean seconds of a step."""
    rest_data_scheduler()
    manifest, training = load_data(recipe.data), recipe.train
    recipe, classes = with_targets(recipe, manifest), len(manifest.classes)
    epoch_steps = manifest.split(recipe.data.train_split).samples / training.global_batch
    span = Span(0, steps, training.global_batch, training.accumulation(me.world), epoch_steps, recipe.seed)
    batches = training_batches(recipe, manifest, me, (0, steps), Quarantine())
    model, task = first_model(recipe, classes, restored=True), build_task(recipe.task, classes=classes)
    engine = build_engine(recipe, model, task, span, me)
    seconds: list[float] = []
    train(engine, batches, [lambda info: seconds.append(info.seconds)], span)
    return statistics.fmean(seconds[len(seconds) // LEFT_OUT :])


def _base_bytes() -> float:
    """Return the unshared memory of a worker before it builds a model; on a GPU the used memory of the device."""
    if not torch.cuda.is_available():
        return psutil.Process().memory_full_info().uss  # shared with no other process
    free, total = torch.cuda.mem_get_info()
    return total - free


def _peak_bytes(*, reset: bool = False) -> int:
    """Return the peak memory of this process since the last `reset`; on a GPU, of the device.

    If the system does not record the peak, return the current memory.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else peak
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        return psutil.Process().memory_info().rss


def measure(recipe: Recipe, micro: Sequence[int], seconds: float) -> dict[str, Any]:
    """Take optimizer steps on fixed samples; every process of the group calls this.

    Args:
        recipe: with model, optimizer, DeepSpeed section and data.
        micro: samples per pass, the sizes to measure, in ascending order.
        seconds: approximate time for each size.

    Returns:
        ``base_bytes``, ``sample_cpu_seconds``, ``save_bytes_s`` (of rank 0), ``exchange`` (latency, rate) and
        ``timings``: (size, seconds, bytes).
    """
    dist.barrier()  # afterwards all processes have loaded what they share
    figures: dict[str, Any] = {"base_bytes": _base_bytes()}
    batch, figures["sample_cpu_seconds"] = _batch(recipe, max(micro), seconds)
    before = _peak_bytes(reset=True)
    manifest = load_data(recipe.data)
    engine = _engine(with_targets(recipe, manifest), len(manifest.classes), max(micro))
    figures["save_bytes_s"] = _write(Path(recipe.output)) if dist.get_rank() == 0 else 0.0
    figures["exchange"] = _exchange(engine) if dist.get_world_size() > 1 else (0.0, 1e12)
    figures["timings"] = []
    for size in micro:
        _peak_bytes(reset=True)
        part = {name: tensor[:size] for name, tensor in batch.items()}
        spent = _steps(engine, part, seconds)
        figures["timings"].append((size, spent, max(0, _peak_bytes() - before)))
    return figures


def _batch(recipe: Recipe, micro: int, most_s: float) -> tuple[Batch, float]:
    """Return a batch of real samples, and the CPU seconds per sample.

    Samples are produced in runs, so whole runs are timed, after one that fills the caches.
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
    schedule = build_schedule(recipe.optim.schedule, 1_000_000, 1000.0)
    plan = BatchPlan(micro, 1, dist.get_world_size())
    return DeepSpeedEngine(
        first_model(recipe, classes, restored=True),
        build_task(recipe.task, classes=classes),
        recipe.optim,
        schedule,
        recipe.deepspeed,
        plan,
        precision=recipe.train.precision,
        compile=recipe.train.compile,
        half_residual=recipe.train.bf16_residual,
    )


def _steps(engine: DeepSpeedEngine, batch: Batch, most_s: float) -> float:
    """Return the median seconds of an optimizer step on this batch."""
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
    """Return the latency (s) and rate (bytes/s sent by a process) of an all-reduce, from a small and a large one."""
    world = dist.get_world_size()
    times = []
    for elements in (1024, 4 << 20):
        tensor = torch.zeros(elements, device=engine.device)
        rounds = []
        for _ in range(7):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()  # on a GPU the call above only starts the operation
            rounds.append(time.perf_counter() - start)
        times.append(statistics.median(rounds))
    sent = 2 * (world - 1) / world * 4 * ((4 << 20) - 1024)
    return times[0], sent / max(1e-6, times[1] - times[0])


def _write(folder: Path) -> float:
    """Return the bytes per second written to a folder and synchronized to the disk."""
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


def main() -> None:
    """Start a local Ray instance, take the steps, print the figures as one line of JSON."""
    from cluster.capacity.rehearsal import rehearse  # workers import it by this name, not from `__main__`

    task = json.load(sys.stdin)
    recipe = build_recipe(task["recipe"])
    start_ray(recipe.cluster)
    cluster = recipe.cluster
    trainer = TorchTrainer(
        rehearse,
        train_loop_config={**task, "recipe": Unshown(task["recipe"])},
        torch_config=torch_config(cluster),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            resources_per_worker=worker_resources(recipe, Share(cluster_cpus())),
            use_gpu=cluster.gpus_per_worker > 0,
        ),
        run_config=ray.train.RunConfig(name="rehearsal", storage_path=task["folder"]),
    )
    try:
        figures = trainer.fit().return_value
    except Exception as error:  # noqa: BLE001  any error of Ray becomes one line, the last
        sys.exit(failure_reason(error))
    ray.shutdown()
    sys.stdout.write("\n" + json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
