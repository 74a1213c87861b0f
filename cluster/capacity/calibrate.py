"""Measuring this machine with a recipe, in a short run by Ray Train: `cluster.capacity.rehearsal` is what runs."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.capacity.calibration import Calibration, Timing, calibration_file, load_calibration, matches
from cluster.recipe.config import Recipe, for_workers
from cluster.recipe.resources import machine_cpus
from cluster.runtime.hardware import Device
from cluster.runtime.local import set_quiet_environment
from perceiver.config import UserError
from perceiver.storage import write_whole
from pipelines.feed.ingest import load_data

TIMEOUT_S = 300
SECONDS = 1.5
"""Time to spend on each size, about."""


def this_device() -> str:
    """Name of this machine's device, cpu without a GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def check_device(name: str, device: Device) -> None:
    """Refuse to measure for a plan that could not use the figures.

    Raises:
        UserError: this machine has other devices than the table's `device`, called `name` there.
    """
    here = this_device()
    if not matches(device.match, here):
        raise UserError(
            f"--calibrate measures this machine, whose device is {here}; the plan is for --gpu {name} "
            f"({device.title}): leave --calibrate out, or name this machine's device with --gpu"
        )


def calibrate(recipe: Recipe, workers: int, seconds: float = SECONDS) -> Calibration:
    """Measure, keep the figures for `perceiver plan`, and return them; under a minute on a quiet machine.

    What was measured before with other numbers of workers is kept.

    Args:
        recipe: with model, data, batch and output.
        workers: of the plan; so many are measured, or as many as this machine has devices (cores without a GPU).
        seconds: for each size of a step, about.

    Raises:
        UserError: the recipe's data is not there, the output is no local folder, or a process failed.
    """
    set_quiet_environment()
    load_data(recipe.data)
    if "://" in recipe.output:
        raise UserError(f"--calibrate writes to a local folder to see how fast it is; output is {recipe.output}")
    try:
        Path(recipe.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {recipe.output} ({error.strerror}): set output= to a folder of yours") from None
    most = torch.cuda.device_count() if torch.cuda.is_available() else machine_cpus()
    found = _rehearse(recipe, min(workers, most), seconds)
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
    write_whole(None, path, result.model_dump_json(indent=1))
    return result


def _timings(figures: dict[str, Any], surroundings: float) -> list[Timing]:
    """The measured steps without the exchange of gradients, which is counted by itself."""
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
    """Samples of a pass to measure on each of so many processes: what the recipe would have, and half of it."""
    micro = recipe.train.micro_batch or max(2, recipe.train.global_batch // processes)
    return sorted({max(1, micro // 2), micro})


def _rehearse(recipe: Recipe, most: int, seconds: float) -> dict[str, Any]:
    """Measure in workers of Ray Train, at most as many as the batch has samples.

    Raises:
        UserError: a worker failed, or all took too long.
    """
    workers = min(most, recipe.train.global_batch)
    there = {"workers": workers, "gpus_per_worker": float(torch.cuda.is_available()), "address": None}
    tree = for_workers(recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=there)}))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="perceiver-rehearsal-") as folder:
        task = {"recipe": tree, "micro": _sizes(recipe, workers), "seconds": seconds, "folder": folder}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "cluster.capacity.rehearsal"],
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
    """How much longer the steps of a run by Ray take than `alone` says."""
    training, workers = recipe.train, found["processes"]
    parts = training.micro(workers), training.accumulation(workers)
    return max(1.0, found["seconds"] / alone.step_seconds(training.global_batch, *parts, workers))
