"""Measuring this machine with a recipe: steps in one process, in as many as there are cores, and in a short run."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from cluster.capacity.calibration import Calibration, Timing, calibration_file, matches
from cluster.capacity.hardware import Device
from cluster.capacity.rehearsal import SHORTEST
from cluster.local import machine_cpus, set_quiet_environment
from cluster.recipe import Recipe, for_workers
from perceiver.config import UserError
from pipelines.ingest import load_data

TIMEOUT_S = 300
SECONDS = 2.5
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
        raise UserError(f"--calibrate measures this machine, whose device is {here}; the plan is for --gpu {name} "
                        f"({device.title}): leave --calibrate out, or name this machine's device with --gpu")


def calibrate(recipe: Recipe, seconds: float = SECONDS) -> Calibration:
    """Measure, keep the figures for `perceiver plan`, and return them; about a minute and a half on a quiet machine.

    Each size of a step is taken for so many seconds, about.

    Raises:
        UserError: the recipe's data is not there, the output is no local folder, or a process failed.
    """
    set_quiet_environment()
    load_data(recipe.data)
    if "://" in recipe.output:
        raise UserError(f"--calibrate writes to a local folder to see how fast it is; output is {recipe.output}")
    Path(recipe.output).mkdir(parents=True, exist_ok=True)
    most = torch.cuda.device_count() if torch.cuda.is_available() else machine_cpus()
    found = [_measure(recipe, processes, seconds) for processes in sorted({1, most})]
    alone, together = found[0], found[-1]
    latency, rate = together["exchange"]
    result = Calibration(
        device=this_device(),
        cores=machine_cpus(),
        timings=tuple(timing for figures in found for timing in _timings(figures)),
        sample_cpu_seconds=alone["sample_cpu_seconds"],
        exchange_latency=latency,
        exchange_bytes_s=rate,
        save_bytes_s=alone["save_bytes_s"],
    )
    result = result.model_copy(update={"surroundings": _surroundings(recipe, result, most, seconds)})
    path = calibration_file(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result.model_dump_json(indent=1))
    return result


def _timings(figures: dict[str, Any]) -> list[Timing]:
    """The measured steps without the exchange of gradients, which is counted by itself."""
    latency = figures["exchange"][0]
    return [Timing(processes=figures["processes"], micro_batch=micro, seconds=max(1e-6, seconds - latency), bytes=size,
                   base_bytes=figures["base_bytes"])
            for micro, seconds, size in figures["timings"]]


def _surroundings(recipe: Recipe, alone: Calibration, most: int, seconds: float) -> float:
    """How much longer the steps of a run by Ray take than `alone` says, with as many workers as divide the batch."""
    training = recipe.train
    workers = max(n for n in range(1, most + 1) if training.global_batch % (n * (training.micro_batch or 1)) == 0)
    parts = training.micro(workers), training.accumulation(workers)
    expected = alone.step_seconds(training.global_batch, *parts, workers)
    there = {"workers": workers, "gpus_per_worker": float(torch.cuda.is_available()), "address": None}
    tree = for_workers(recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=there)}))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="perceiver-rehearsal-") as folder:
        task = {"recipe": tree, "steps": max(SHORTEST, round(3 * seconds / expected)), "folder": folder}
        process = _start("cluster.capacity.rehearsal", task, environment)
        figures = json.loads(first_output([process], TIMEOUT_S).strip().splitlines()[-1])
    return max(1.0, figures["seconds"] / expected)


def _measure(recipe: Recipe, processes: int, seconds: float) -> dict[str, Any]:
    """Run the processes side by side; return the figures of the first one."""
    micro = max(2, recipe.train.global_batch // processes)
    if recipe.train.micro_batch:
        micro = recipe.train.micro_batch
    task = {
        "recipe": for_workers(recipe),
        "threads": max(1, machine_cpus() // processes),
        "micro": sorted({max(1, micro // 2), micro}),
        "folder": str(Path(recipe.output).resolve()),
        "seconds": seconds,
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    running = [_start("cluster.capacity.probe", task, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
               for rank in range(processes)]
    output = first_output(running, TIMEOUT_S)
    return {"processes": processes, **json.loads(output.strip().splitlines()[-1])}


def _start(module: str, task: Mapping[str, Any], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Start a module of ours and give it its task."""
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=dict(environment))
    assert process.stdin is not None
    process.stdin.write(json.dumps(task))
    process.stdin.close()
    process.stdin = None
    return process


def first_output(running: Sequence["subprocess.Popen[str]"], timeout_s: float) -> str:
    """Wait for all processes; return what the first of them printed.

    Raises:
        UserError: one failed, the reason being that of the one that ended first, for which the others may then wait;
            or they took too long.
    """
    with ThreadPoolExecutor(len(running)) as pool:
        waiting = {pool.submit(process.communicate): process for process in running}
        try:
            for ended in as_completed(waiting, timeout=timeout_s):
                if waiting[ended].returncode:
                    reason = (ended.result()[1].strip().splitlines() or ["no message"])[-1]
                    raise UserError(f"--calibrate: a step with this recipe failed on this machine: {reason}")
        except TimeoutError:
            raise UserError(f"--calibrate took longer than {timeout_s:g} s: lower train.global_batch") from None
        finally:
            for process in running:
                process.kill()
        return next(iter(waiting)).result()[0]
