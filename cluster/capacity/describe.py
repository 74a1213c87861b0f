"""A plan as lines for a terminal and as a dictionary for scripts."""

from dataclasses import asdict
from typing import Any

from cluster.capacity.estimate import RECOVERY_SECONDS, Estimate
from cluster.capacity.workload import Workload


def size(count: float) -> str:
    """Return a number of bytes with a decimal unit."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def flops(count: float) -> str:
    """Return a number of floating-point operations with a unit."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def with_unit(seconds: float) -> str:
    """Return a duration in seconds with a unit."""
    for unit, scale in (("days", 86400 * 2), ("h", 3600), ("min", 120), ("s", 1)):
        if seconds >= scale:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60, 's': 1}[unit]:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def describe(plan: Estimate, workload: Workload) -> list[str]:
    """Return the lines of a plan, one per topic."""
    machines, step, reading, relied = plan.machines, plan.step, plan.ingest, plan.reliability
    account, data, used = workload.account, workload.data, plan.memory
    demand, spot = plan.cost
    done = flops_step(workload)
    basis = (
        "measured on this machine"
        if plan.calibrated
        else (
            f"assumed: matrix products at {machines.device.efficiency:.0%} of the peak, other operations at "
            f"{machines.device.memory_efficiency:.0%} of the memory bandwidth"
        )
    )
    computing = (
        f"{with_unit(step.compute)} including data tasks and Ray's processes"
        if plan.calibrated
        else (
            f"compute {with_unit(step.compute)} ({with_unit(step.traffic)} of it not matrix products), optimizer "
            f"{with_unit(step.optimizer)}"
        )
    )
    frozen = f" ({account.frozen:,} frozen)" if account.frozen else ""
    batch, rows = workload.recipe.train.global_batch, machines.devices * plan.micro_batch * plan.accumulation
    padding = f"; {rows - batch} of {rows} rows are padding" if rows > batch else ""
    return [
        f"on            {machines.devices} x {machines.device.title}, {machines.nodes} node"
        f"{'s' * (machines.nodes > 1)}, {machines.data_cpus:,.0f} CPUs for data",
        f"model         {account.parameters:,} parameters{frozen}, {flops(account.forward_flops)} per sample forward "
        f"({flops(account.executed_flops)} executed), {flops(workload.trace.flops)} forward and backward",
        f"batch         {batch} on {machines.devices} devices x {plan.micro_batch} samples x "
        f"{plan.accumulation} accumulated{padding}; largest micro-batch that fits {plan.largest_micro_batch}",
        f"memory        {size(used.total)} of {machines.device.memory_gb:g} GB per device: "
        f"weights {size(used.weights)}, gradients {size(used.gradients)}, optimizer {size(used.optimizer)}, "
        f"buffers {size(used.buffers)}, activations {size(used.activations)}, libraries {size(used.context)}",
        *_stages(plan),
        f"step          {with_unit(step.total)}: {computing}, communication {with_unit(step.communication)} "
        f"({size(step.communication_bytes)} sent by each device)",
        f"  FLOPs       {flops(done)} forward and backward, {flops(done / machines.devices)} on each device",
        f"  basis       {basis}",
        f"  use         {plan.utilisation:.1%} of the peak; {reading.samples_s:,.0f} samples/s",
        *_extras(plan),
        f"reading       {size(reading.bytes_s)}/s in {reading.requests_s:,.1f} requests/s, {reading.cores_wanted:,.1f} "
        f"of {reading.cores_there:,.1f} CPU cores to decode"
        + ("" if plan.calibrated else f" (assumed: {data.cpu_seconds * 1e3:.3g} ms per sample)"),
        f"checkpoint    {size(relied.checkpoint_bytes)}, {with_unit(relied.save_seconds)} to write, every "
        f"{with_unit(relied.interval_seconds)} (Young-Daly)"
        + (f"; in memory {size(relied.held_bytes)} of each node" if relied.held_bytes else ""),
        f"failures      {relied.failures:.2g} expected (one per {relied.rate.device_hours:,.0f} device hours, "
        f"{with_unit(relied.rate.device_hours * 3600 / machines.devices)} of this run), {RECOVERY_SECONDS:.0f} s to "
        f"recover; goodput {relied.goodput:.1%}",
        f"  rate        {relied.rate.name}: {relied.rate.basis}",
        f"run           {plan.steps:,} steps, {with_unit(plan.hours * 3600)}, {plan.device_hours:,.1f} device hours",
        f"cost          {demand:,.2f} on demand, {spot:,.2f} preemptible (prices of the table)",
        f"breaks first  {bottleneck(plan)}",
    ]


def flops_step(workload: Workload) -> float:
    """Return the floating-point operations of an optimizer step over all devices, forward and backward."""
    return float(workload.trace.flops * workload.recipe.train.global_batch)


def _stages(plan: Estimate) -> list[str]:
    """Return a table of bytes per device by ZeRO stage and micro-batch, with the largest micro-batch that fits."""
    sizes = next(iter(plan.memory_by_stage.values())).totals
    lines = [f"  micro-batch {''.join(f'{micro:>10,}' for micro in sizes)}   largest that fits"]
    for stage, found in plan.memory_by_stage.items():
        totals = "".join(f"{size(total):>10}" for total in found.totals.values())
        lines.append(f"    ZeRO {stage}    {totals}   {found.largest:,}")
    return lines


def _extras(plan: Estimate) -> list[str]:
    """Return the lines of asynchronous evaluation and of elastic runs."""
    lines = []
    if plan.evaluators:
        lines.append("evaluation    asynchronous, on an additional device, included in device hours and cost")
    if plan.fewest:
        count, seconds = plan.fewest
        few = f"{count} of {plan.machines.devices} devices"
        lines.append(f"elastic       continues with {few}: a step then takes {with_unit(seconds)}")
    return lines


def bottleneck(plan: Estimate) -> str:
    """Return what limits this plan first, or would limit it at a larger size."""
    step, reading = plan.step, plan.ingest
    parts = {
        "memory bandwidth: operations other than matrix products, such as softmax and norms": step.traffic / step.total,
        "communication: fewer devices, or a larger global batch": step.communication / step.total,
        "decoding: more CPU nodes, or smaller stored media": reading.cores_wanted / max(reading.cores_there, 1e-9),
        "memory: ZeRO, a smaller micro-batch, activation checkpointing": plan.memory.total
        / (plan.machines.device.memory_gb * 1e9),
        "the global batch: it leaves each device few samples": 1 / max(1, plan.micro_batch * plan.accumulation),
    }
    reason, share = max(parts.items(), key=lambda item: item[1])
    return f"{reason} ({share:.0%} of its limit)"


def tree(plan: Estimate, workload: Workload) -> dict[str, Any]:
    """Return the plan as a dictionary for scripts; bytes and seconds, not rounded."""
    demand, spot = plan.cost
    return {
        "gpu": plan.machines.name,
        "devices": plan.machines.devices,
        "nodes": plan.machines.nodes,
        "data_cpus": plan.machines.data_cpus,
        "calibrated": plan.calibrated,
        "parameters": workload.account.parameters,
        "frozen": workload.account.frozen,
        "flops_forward": workload.account.forward_flops,
        "flops_executed": workload.account.executed_flops,
        "flops_step": flops_step(workload),
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "largest_micro_batch": plan.largest_micro_batch,
        "memory": {**vars(plan.memory), "total": plan.memory.total},
        "memory_by_zero_stage": {
            stage: {"total_by_micro_batch": found.totals, "largest_micro_batch": found.largest}
            for stage, found in plan.memory_by_stage.items()
        },
        "step_seconds": {**vars(plan.step), "total": plan.step.total},
        "utilisation": plan.utilisation,
        "ingest": vars(plan.ingest),
        "reliability": asdict(plan.reliability),
        "steps": plan.steps,
        "hours": plan.hours,
        "evaluators": plan.evaluators,
        "fewest_devices": plan.fewest and plan.fewest[0],
        "step_seconds_of_fewest": plan.fewest and plan.fewest[1],
        "device_hours": plan.device_hours,
        "cost": {"on_demand": demand, "spot": spot},
    }
