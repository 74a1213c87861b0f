"""`perceiver plan`: an estimate of what a run needs and costs."""

import math
import time
from typing import TYPE_CHECKING, Any

import click

from perceiver.cli._types import Number
from perceiver.tracking.printable import say, say_all, say_json

if TYPE_CHECKING:
    from cluster.capacity.estimate import Machines
    from cluster.runtime.hardware import Device


@click.command(
    epilog="""\b
Examples:
  perceiver plan recipes/train/quickstart.yaml --gpu cpu --gpus 2 --calibrate
  perceiver plan recipes/train/imagenet_perceiver.yaml --gpu h100 --gpus 64 \\
      --samples 1281167 --sample-bytes 110000 --classes 1000"""
)
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpu", default="h100", show_default=True, help="Device in the hardware table; cpu for CPU cores.")
@click.option(
    "--gpus", type=click.IntRange(1, 100_000), help="Number of devices, one worker each; default: cluster.workers."
)
@click.option(
    "--nodes",
    type=click.IntRange(1, 100_000),
    help="Number of nodes; default: the fewest that share the devices evenly.",
)
@click.option(
    "--data-cpus",
    type=Number(0, 10_000_000),
    help="CPU cores for decoding; default: the nodes' cores less one per device.",
)
@click.option(
    "--samples",
    type=click.IntRange(1, 10**12),
    help="Number of training samples, if the data is not prepared yet.",
)
@click.option("--sample-bytes", type=Number(1, 1e12), help="Stored bytes per sample.")
@click.option("--classes", type=click.IntRange(1, 1_000_000), help="Number of classes.")
@click.option(
    "--failures",
    metavar="SOURCE",
    default="llama3",
    show_default=True,
    help="Rate of failures: llama3, rsc1, rsc2 or rsc1024 as published, or device hours per failure.",
)
@click.option("--hardware", metavar="FILE", help="A hardware table with other devices and prices.")
@click.option("--calibrate", is_flag=True, help="First measure this machine with the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON line.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    gpu: str,
    hardware: str | None,
    failures: str,
    calibrate: bool,
    as_json: bool,
    **sizes: Any,
) -> int:
    """Estimate the memory, time and cost of a run.

    Prints memory, step time, communication, reading, checkpoints, failures, hours and cost of RECIPE. A run that does
    not fit in memory or would wait for data is refused (exit code 2) with the key to change.
    """
    from cluster.capacity.calibrate import calibrate as measure
    from cluster.capacity.calibrate import check_device, load_calibration
    from cluster.capacity.describe import describe, tree
    from cluster.capacity.estimate import check_starving, estimate
    from cluster.capacity.failures import failure_rate
    from cluster.capacity.workload import build_workload
    from cluster.recipe.config import load_recipe
    from cluster.runtime.hardware import load_hardware

    rate = failure_rate(failures)
    plan_of = load_recipe(recipe, overrides)
    place = _place(
        gpu,
        load_hardware(hardware).device(gpu),
        sizes.pop("gpus") or plan_of.cluster.workers,
        sizes.pop("nodes"),
        sizes.pop("data_cpus"),
    )
    if calibrate:
        check_device(gpu, place.device)
        say("measuring this machine ...", err=True)
        began = time.monotonic()
        measure(plan_of, place.devices)
        say(f"measured in {time.monotonic() - began:.0f} s", err=True)
    calibration = load_calibration(plan_of, place.device.match)
    work = build_workload(plan_of, **sizes)
    found = estimate(work, place, calibration, rate)
    check_starving(found, work)
    if as_json:
        say_json(tree(found, work))
    else:
        say_all(describe(found, work))
    return 0


def _place(name: str, device: "Device", devices: int, nodes: int | None, data_cpus: float | None) -> "Machines":
    """Return the devices of the run, as many on each node; on CPUs, workers and data tasks share the cores.

    Raises:
        UserError: the nodes have too few devices, or share them unevenly.
    """
    from cluster.capacity.estimate import Machines
    from perceiver.config import UserError

    least = math.ceil(devices / device.devices_per_node)
    even = next(count for count in range(least, devices + 1) if devices % count == 0)
    machines = nodes or even
    if machines < least:
        raise UserError(
            f"--gpus {devices} --nodes {nodes}: a node has {device.devices_per_node} devices "
            f"(devices.{name}.devices_per_node of the hardware table): set --nodes {even}, or describe other nodes in "
            "a file given with --hardware"
        )
    if devices % machines:
        raise UserError(f"--gpus {devices} do not divide over --nodes {nodes}: set --nodes {even}")
    cores = machines * device.node_cpus - (devices if name != "cpu" else 0)
    return Machines(device, name, devices, machines, max(0.0, cores) if data_cpus is None else data_cpus)
