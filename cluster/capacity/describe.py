"""A plan as lines for a terminal and as a tree for scripts."""

from typing import Any

from cluster.capacity.estimate import DEVICE_HOURS_A_FAILURE, RECOVERY_SECONDS, Estimate
from cluster.capacity.workload import Workload


def size(count: float) -> str:
    """Bytes in a unit that reads well, powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def flops(count: float) -> str:
    """Floating-point operations in a unit that reads well."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def duration(seconds: float) -> str:
    """Seconds in a unit that reads well."""
    for unit, scale in (("days", 86400 * 2), ("h", 3600), ("min", 120), ("s", 1)):
        if seconds >= scale:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60, 's': 1}[unit]:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def describe(plan: Estimate, workload: Workload) -> list[str]:
    """The plan, a topic a line."""
    place, step, reading, relied = plan.place, plan.step, plan.ingest, plan.reliability
    account, data, used = workload.account, workload.data, plan.memory
    demand, spot = plan.cost
    done = flops_step(workload)
    basis = (
        "measured on this machine"
        if plan.calibrated
        else (
            f"assumed: products at {place.device.efficiency:.0%} of the peak, all else at "
            f"{place.device.memory_efficiency:.0%} of the memory's speed"
        )
    )
    computing = (
        f"with what data tasks and Ray take of it {duration(step.compute)}"
        if plan.calibrated
        else (
            f"compute {duration(step.compute)} ({duration(step.traffic)} of it not matrix products), optimizer "
            f"{duration(step.optimizer)}"
        )
    )
    batch, rows = workload.recipe.train.global_batch, place.devices * plan.micro_batch * plan.accumulation
    padding = f"; {rows - batch} of {rows} rows are padding" if rows > batch else ""
    return [
        f"on            {place.devices} x {place.device.title}, {place.nodes} node{'s' * (place.nodes > 1)}, "
        f"{place.data_cpus:,.0f} CPUs for data",
        f"model         {account.parameters:,} parameters, {flops(account.forward_flops)} a sample forward "
        f"({flops(account.executed_flops)} executed), {flops(workload.trace.flops)} forward and backward",
        f"batch         {batch} on {place.devices} devices x {plan.micro_batch} samples x "
        f"{plan.accumulation} accumulated{padding}; largest micro-batch that fits {plan.largest_micro_batch}",
        f"memory        {size(used.total)} of {place.device.memory_gb:g} GB a device: weights {size(used.weights)}, "
        f"gradients {size(used.gradients)}, optimizer {size(used.optimizer)}, buffers {size(used.buffers)}, "
        f"activations {size(used.activations)}, libraries {size(used.context)}",
        *_stages(plan),
        f"step          {duration(step.total)}: {computing}, communication {duration(step.communication)} "
        f"({size(step.communication_bytes)} sent by each device)",
        f"  FLOPs       {flops(done)} forward and backward, {flops(done / place.devices)} on each device",
        f"  basis       {basis}",
        f"  use         {plan.utilisation:.1%} of the peak; {reading.samples_s:,.0f} samples/s",
        *_extras(plan),
        f"reading       {size(reading.bytes_s)}/s in {reading.requests_s:,.1f} requests/s, {reading.cores_wanted:,.1f} "
        f"of {reading.cores_there:,.1f} CPU cores to decode"
        + ("" if plan.calibrated else f" (assumed: {data.cpu_seconds * 1e3:.3g} ms a sample)"),
        f"checkpoint    {size(relied.checkpoint_bytes)}, {duration(relied.save_seconds)} to write, every "
        f"{duration(relied.interval_seconds)} (Young-Daly)",
        f"failures      {relied.failures:.2g} expected (one in {DEVICE_HOURS_A_FAILURE:,} device hours), "
        f"{RECOVERY_SECONDS:.0f} s to go on; goodput {relied.goodput:.1%}",
        f"run           {plan.steps:,} steps, {duration(plan.hours * 3600)}, {plan.device_hours:,.1f} device hours",
        f"cost          {demand:,.2f} on demand, {spot:,.2f} on devices that can be taken away (prices of the table)",
        f"breaks first  {bottleneck(plan)}",
    ]


def flops_step(workload: Workload) -> float:
    """Floating-point operations of an optimizer step over all devices, forward and backward."""
    return float(workload.trace.flops * workload.recipe.train.global_batch)


def _stages(plan: Estimate) -> list[str]:
    """A table: bytes on a device by ZeRO stage and micro-batch, with the largest micro-batch that fits."""
    sizes = next(iter(plan.memory_by_stage.values())).totals
    lines = [f"  micro-batch {''.join(f'{micro:>10,}' for micro in sizes)}   largest that fits"]
    for stage, found in plan.memory_by_stage.items():
        totals = "".join(f"{size(total):>10}" for total in found.totals.values())
        lines.append(f"    ZeRO {stage}    {totals}   {found.largest:,}")
    return lines


def _extras(plan: Estimate) -> list[str]:
    """Lines of what only some runs have: evaluation beside training, fewer workers."""
    lines = []
    if plan.evaluators:
        lines.append("evaluation    beside training, on one device more, counted in device hours and cost")
    if plan.fewest:
        count, seconds = plan.fewest
        few = f"{count} of {plan.place.devices} devices"
        lines.append(f"elastic       goes on with {few}: a step then takes {duration(seconds)}")
    return lines


def bottleneck(plan: Estimate) -> str:
    """What limits this plan first, or would at a larger size."""
    step, reading = plan.step, plan.ingest
    parts = {
        "the memory's speed: all that is no matrix product, such as softmax and norms": step.traffic / step.total,
        "communication: fewer devices, or a larger global batch": step.communication / step.total,
        "decoding: more CPU nodes, or smaller stored media": reading.cores_wanted / max(reading.cores_there, 1e-9),
        "memory: ZeRO, a smaller micro-batch, activation checkpointing": plan.memory.total
        / (plan.place.device.memory_gb * 1e9),
        "the global batch: it leaves each device few samples": 1 / max(1, plan.micro_batch * plan.accumulation),
    }
    reason, share = max(parts.items(), key=lambda item: item[1])
    return f"{reason} ({share:.0%} of its limit)"


def tree(plan: Estimate, workload: Workload) -> dict[str, Any]:
    """The plan for scripts; bytes and seconds, nothing rounded."""
    demand, spot = plan.cost
    return {
        "gpu": plan.place.name,
        "devices": plan.place.devices,
        "nodes": plan.place.nodes,
        "data_cpus": plan.place.data_cpus,
        "calibrated": plan.calibrated,
        "parameters": workload.account.parameters,
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
        "reliability": vars(plan.reliability),
        "steps": plan.steps,
        "hours": plan.hours,
        "evaluators": plan.evaluators,
        "fewest_devices": plan.fewest and plan.fewest[0],
        "step_seconds_of_fewest": plan.fewest and plan.fewest[1],
        "device_hours": plan.device_hours,
        "cost": {"on_demand": demand, "spot": spot},
    }
