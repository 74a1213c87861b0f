"""Calibration of this machine for a recipe: measured in a short run of Ray Train, stored in the user's cache."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from cluster.recipe.config import Recipe, for_workers
from cluster.recipe.resources import machine_cpus
from cluster.recipe.statistics import with_statistics
from cluster.runtime.hardware import Device
from cluster.runtime.local import set_quiet_environment
from perceiver.config import Config, Count, NonNegative, Positive, Real, UserError
from perceiver.environment import DISTRIBUTION, ENGINES, installed_version
from perceiver.hashing import short_hash
from perceiver.storage import cache_folder, refusing, write_whole
from pipelines.feed.ingest import load_data
from pipelines.shards.manifest import content_digest, file_versions

SOFTWARE = (DISTRIBUTION, *ENGINES)
TIMEOUT_S = 300
SECONDS = 1.5
"""Approximate seconds spent on each size."""


Amount = Annotated[Real, Field(ge=0, le=1e15)]
"""Bytes, measured."""
Rate = Annotated[Real, Field(gt=0, le=1e15)]
"""Bytes per second, measured."""


class Timing(Config):
    """Time and memory of a training pass on each of several concurrent processes."""

    processes: Count = Field(description="workers on the machine")
    micro_batch: Count = Field(description="samples per pass")
    seconds: Positive = Field(description="median of a step with the optimizer, without the gradient all-reduce")
    bytes: Amount = Field(description="peak memory of a step: weights, optimizer and activations")
    base_bytes: Amount = Field(
        description="memory of a process before it builds a model, without what it shares with other processes"
    )
    surroundings: Real = Field(
        default=1.0,
        ge=1,
        le=1e6,
        description="factor by which a step takes longer in a real run: Ray's own processes, data tasks, waiting for "
        "other workers",
    )


class Calibration(Config):
    """Measurements of one recipe on one machine."""

    device: str = Field(description="name of the device, or cpu")
    cores: Count = Field(description="CPU cores of the machine")
    timings: tuple[Timing, ...] = Field(min_length=2, description="time and memory of training passes")
    sample_cpu_seconds: Positive = Field(description="CPU time to read, decode and augment a sample")
    exchange_latency: NonNegative = Field(description="seconds of a small all-reduce")
    exchange_bytes_s: Rate = Field(description="bytes per second that a process sends in a large all-reduce")
    save_bytes_s: Rate = Field(description="bytes per second written to the output folder")

    def compute_seconds(self, micro: int, processes: int) -> float:
        """Return the seconds of a training pass of `micro` samples on each of `processes` concurrent processes.

        Linear in the samples through the two measured sizes; scaled by the cores per process if more processes share
        them than were measured.
        """
        small, large = self._measured(processes)
        each = (large.seconds - small.seconds) / max(1, large.micro_batch - small.micro_batch)
        seconds = max(large.seconds + each * (micro - large.micro_batch), 0.2 * small.seconds)
        return seconds * (processes / large.processes if processes > large.processes else 1.0)

    def step_seconds(self, batch: int, micro: int, accumulation: int, processes: int, nodes: int = 1) -> float:
        """Return the seconds of an isolated step: passes, optimizer, and the CPU time of data tasks on shared cores."""
        passes = accumulation * self.compute_seconds(micro, processes // nodes)
        return passes + batch * self.sample_cpu_seconds / self.cores / nodes

    def passing_bytes(self, micro: int, processes: int, state_bytes: Callable[[int], float]) -> float:
        """Return the bytes of activations and buffers of a step of `micro` samples, without the model's state.

        Linear in the samples through the two measured sizes; a part does not depend on the samples.

        Args:
            micro: samples per pass.
            processes: processes on the machine.
            state_bytes: returns the bytes of weights, gradients and optimizer for a number of workers.
        """
        small, large = self._measured(processes)
        each = max(0.0, large.bytes - small.bytes) / max(1, large.micro_batch - small.micro_batch)
        return max(0.0, large.bytes - state_bytes(large.processes) + each * (micro - large.micro_batch))

    def surroundings(self, processes: int) -> float:
        """Return the factor by which a step takes longer in a real run with `processes` workers on a machine."""
        return self._measured(processes)[1].surroundings

    def base_bytes(self, processes: int) -> float:
        """Return the unshared bytes of a worker before it builds a model, with `processes` workers on a machine."""
        return self._measured(processes)[1].base_bytes

    def _measured(self, processes: int) -> tuple[Timing, Timing]:
        """Return the smallest and the largest measured step of the nearest number of processes."""
        nearest = min({timing.processes for timing in self.timings}, key=lambda count: (abs(count - processes), count))
        here = sorted((t for t in self.timings if t.processes == nearest), key=lambda t: t.micro_batch)
        return here[0], here[-1]


def calibration_file(recipe: Recipe) -> Path:
    """Return the path of a recipe's calibration, which depends on what changes its speed, not on its length or name.

    The content of the data and the versions of the software count, too.
    """
    parts: dict[str, Any] = dict.fromkeys(("model", "task", "optim", "data", "deepspeed"), True)
    facts = recipe.model_dump(mode="json", include={**parts, "train": {"precision"}})
    facts["content"], facts["software"] = _content(recipe), {name: installed_version(name) for name in SOFTWARE}
    return cache_folder("calibrations", f"{short_hash(facts)}.json")


def _content(recipe: Recipe) -> list[str]:
    """Return what identifies the content of a recipe's data; empty if they are not there."""
    try:
        manifest, splits = load_data(recipe.data), [recipe.data.train_split]
        return [content_digest(manifest, splits), file_versions(manifest, splits)]
    except UserError:
        return []


def load_calibration(recipe: Recipe, device: str) -> Calibration | None:
    """Return this machine's calibration of a recipe, None without one for a device whose name contains `device`."""
    try:
        found = Calibration.model_validate_json(calibration_file(recipe).read_text())
    except (FileNotFoundError, ValidationError):
        return None
    return found if matches(device, found.device) else None


def matches(device: str, name: str) -> bool:
    """Return whether a device name of a machine matches a device of the hardware table (its key `match`)."""
    return device.lower() in name.lower()


def this_device() -> str:
    """Return the name of this machine's device, cpu without a GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def check_device(name: str, device: Device) -> None:
    """Refuse to calibrate for a plan with other devices than this machine's.

    Raises:
        UserError: this machine's device is not the table's `device` with the name `name`.
    """
    here = this_device()
    if not matches(device.match, here):
        raise UserError(
            f"--calibrate measures this machine, whose device is {here}; the plan is for --gpu {name} "
            f"({device.title}): omit --calibrate, or set --gpu to this machine's device"
        )


def calibrate(recipe: Recipe, workers: int, seconds: float = SECONDS) -> Calibration:
    """Measure, store the calibration for `perceiver plan`, and return it; takes under a minute on an idle machine.

    Earlier measurements with other numbers of workers are kept.

    Args:
        recipe: with model, data, batch and output.
        workers: of the plan; at most this machine's number of devices (cores without a GPU) is measured.
        seconds: approximate time for each size of a step.

    Raises:
        UserError: the recipe's data is missing, the output is not a local folder, or a process failed.
    """
    set_quiet_environment()
    manifest = load_data(recipe.data)
    if "://" in recipe.output:
        raise UserError(f"--calibrate measures writing to a local folder; output = {recipe.output}: set output= to one")
    with refusing(recipe.output, "set output= to a writable folder"):
        Path(recipe.output).mkdir(parents=True, exist_ok=True)
    most = torch.cuda.device_count() if torch.cuda.is_available() else machine_cpus()
    found = _rehearse(with_statistics(recipe, manifest), min(workers, most), seconds)
    before = load_calibration(recipe, this_device())
    before = before if before and before.cores == machine_cpus() else None
    latency, rate = found["exchange"]
    if before and found["processes"] == 1:
        latency, rate = before.exchange_latency, before.exchange_bytes_s
    kept = [timing for timing in before.timings if timing.processes != found["processes"]] if before else []
    result = Calibration(
        device=this_device(),
        cores=machine_cpus(),
        timings=(*kept, *_timings(found, 1.0)),
        sample_cpu_seconds=found["sample_cpu_seconds"],
        exchange_latency=latency,
        exchange_bytes_s=rate,
        save_bytes_s=found["save_bytes_s"],
    )
    slowed = _surroundings(recipe, result, found)
    result = result.model_copy(update={"timings": (*kept, *_timings(found, slowed))})
    path = calibration_file(recipe)
    write_whole(path, result.model_dump_json(indent=1))
    return result


def _timings(figures: dict[str, Any], surroundings: float) -> list[Timing]:
    """Return the measured steps without the gradient all-reduce, which is counted separately."""
    latency = figures["exchange"][0]
    return [
        Timing(
            processes=figures["processes"],
            micro_batch=micro,
            seconds=max(1e-6, seconds - latency),
            bytes=size,
            base_bytes=figures["base_bytes"],
            surroundings=surroundings,
        )
        for micro, seconds, size in figures["timings"]
    ]


def _sizes(recipe: Recipe, processes: int) -> list[int]:
    """Return the sizes of a pass to measure with `processes` workers: the recipe's, and half of it."""
    micro = recipe.train.micro_batch or max(2, recipe.train.global_batch // processes)
    return sorted({max(1, micro // 2), micro})


def _rehearse(recipe: Recipe, most: int, seconds: float) -> dict[str, Any]:
    """Measure with workers of Ray Train, at most one per sample of the batch.

    Raises:
        UserError: a worker failed, or the measurement took too long.
    """
    workers = min(most, recipe.train.global_batch)
    there = {"workers": workers, "gpus_per_worker": float(torch.cuda.is_available()), "address": None}
    tree = for_workers(recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=there)}))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="perceiver-rehearsal-") as folder:
        task = {"recipe": tree, "micro": _sizes(recipe, workers), "seconds": seconds, "folder": folder}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "perceiver_train.module", "cluster.capacity.rehearsal"],
                input=json.dumps(task),
                env=environment,
                text=True,
                capture_output=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"--calibrate took longer than {TIMEOUT_S:g} s: lower train.global_batch") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"--calibrate: a step with this recipe failed on this machine: {reason}")
    return {"processes": workers, **json.loads(done.stdout.strip().splitlines()[-1])}


def _surroundings(recipe: Recipe, alone: Calibration, found: Mapping[str, Any]) -> float:
    """Return the factor by which real steps take longer than `alone` predicts, at least 1."""
    training, workers = recipe.train, found["processes"]
    parts = training.micro(workers), training.accumulation(workers)
    return max(1.0, found["seconds"] / alone.step_seconds(training.global_batch, *parts, workers))
