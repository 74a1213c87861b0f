"""Measuring this machine with a recipe: a few optimizer steps in one process, then in as many as there are cores."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from cluster.capacity.calibration import Calibration, Timing, calibration_file, matches
from cluster.capacity.hardware import Device
from cluster.local import machine_cpus, set_quiet_environment
from cluster.recipe import Recipe, for_workers
from perceiver.config import UserError
from pipelines.ingest import load_data

TIMEOUT_S = 300
SECONDS = 4.0
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
    """Measure, keep the figures for `perceiver plan`, and return them; about half a minute on a quiet machine.

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
        base_bytes=alone["base_bytes"],
    )
    path = calibration_file(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result.model_dump_json(indent=1))
    return result


def _timings(figures: dict[str, Any]) -> list[Timing]:
    """The measured steps without the exchange of gradients, which is counted by itself."""
    latency = figures["exchange"][0]
    return [Timing(processes=figures["processes"], micro_batch=micro, seconds=max(1e-6, seconds - latency), bytes=size)
            for micro, seconds, size in figures["timings"]]


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
    command = [sys.executable, "-m", "cluster.capacity.probe"]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": str(port),
                              "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"})
        for rank in range(processes)
    ]  # fmt: skip
    for process in running:
        assert process.stdin is not None
        process.stdin.write(json.dumps(task))
        process.stdin.close()
        process.stdin = None
    output = first_output(running, TIMEOUT_S)
    return {"processes": processes, **json.loads(output.strip().splitlines()[-1])}


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
