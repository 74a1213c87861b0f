"""The estimate of a run: memory, time, communication, reading, checkpoints, failures and cost.

Every figure is a function of the workload (`workload`), the machines (`hardware`) and, if there is one, the calibration
(`calibrate`). Nothing here uses Ray or a device.
"""

import math
from dataclasses import dataclass, replace

from cluster.capacity.calibrate import Calibration
from cluster.capacity.failures import DEFAULT, SOURCES, FailureRate
from cluster.capacity.workload import Workload
from cluster.recipe.memory import held_bytes, state_bytes
from cluster.runtime.hardware import Device
from perceiver.config import UserError
from perceiver.kernels.shared_kv import GPU_SCORES

RECOVERY_SECONDS = 120.0
"""Seconds from a failure to the next new step, without the lost work: an assumption; see docs/reliability.md."""
STORE_BYTES_S = 0.5e9
"""Bytes per second that a worker writes to the object store: an assumption."""
MEMORY_MARGIN = 0.92
"""Share of a device's memory that a plan may use; the rest is for fragmentation."""
AUTOCAST_BYTES = 1.25
"""Traffic under bf16 autocast, as a multiple of the float32 traffic of a trace, which lacks the casts: they outweigh
the halved tensors. This and the next five are fitted to one H200 (benchmarks/results/2026-11-29-gpu.md)."""
COMPILED_BYTES = 0.5
"""Share of that traffic that remains where `train.compile` fuses a Perceiver's layers: 36 of 70 to 75 ms."""
RESIDUAL_BYTES = 0.92
"""Share of traffic and activations with `train.bf16_residual`: 34 of 36 ms, 19.7 of 21.6 GB."""
AUTOCAST_ACTIVATIONS = 0.6
"""Share of the float32 activations that autocast keeps."""
FLOAT32_SHARE = 0.16
"""Share of the TF32 peak at which a step's float32 attention (`shared_kv`, and torch's for wide heads) was computed.
Large products alone reach 0.6 to 0.8; why these are slower was not found out."""
SCORE_COPIES = 3
"""Arrays of float32 scores that the backward pass of `shared_kv` has in memory at a time."""
BUCKET_ELEMENTS = 500_000_000
"""Largest number of elements in DeepSpeed's gradient buffer (perceiver/train/engine/deepspeed_config.py)."""


@dataclass(frozen=True)
class Machines:
    """The machines of a planned run.

    Attributes:
        device: the kind of device.
        name: its name in the hardware table.
        devices: number of devices, one worker each.
        nodes: number of machines.
        data_cpus: CPU cores that the workers leave for data tasks, including CPU-only nodes.
    """

    device: Device
    name: str
    devices: int
    nodes: int
    data_cpus: float


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    context: float
    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.context + self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class StageMemory:
    """Memory of a device under a ZeRO stage: total bytes by micro-batch, and the largest that fits, 0 for none."""

    totals: dict[int, float]
    largest: int


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step by part; reading is concurrent with the rest, `traffic` is a part of `compute`."""

    compute: float
    traffic: float
    optimizer: float
    communication: float
    communication_bytes: float
    data: float

    @property
    def total(self) -> float:
        """Wall time in seconds."""
        return max(self.compute + self.optimizer + self.communication, self.data)


@dataclass(frozen=True)
class Ingest:
    """The reading rates that training at full speed needs."""

    samples_s: float
    bytes_s: float
    requests_s: float
    cores_wanted: float
    cores_there: float


@dataclass(frozen=True)
class Reliability:
    """Checkpoints and failures of a run; `goodput` is the share of time spent on new steps.

    `held_bytes` is the host memory of each node for checkpoints in memory, 0 without them.
    """

    rate: FailureRate
    checkpoint_bytes: float
    held_bytes: float
    save_seconds: float
    interval_seconds: float
    failures: float
    goodput: float


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run; `fewest` is the smallest number of devices of an elastic run, with its step time."""

    machines: Machines
    micro_batch: int
    accumulation: int
    memory: Memory
    memory_by_stage: dict[int, StageMemory]
    largest_micro_batch: int
    step: Step
    ingest: Ingest
    reliability: Reliability
    steps: int
    hours: float
    utilisation: float
    calibrated: bool
    evaluators: int = 0
    fewest: tuple[int, float] | None = None

    @property
    def device_hours(self) -> float:
        """Devices times hours, including the device of asynchronous evaluation."""
        return self.hours * (self.machines.devices + self.evaluators)

    @property
    def cost(self) -> tuple[float, float]:
        """Cost at the prices of the table: on demand, and preemptible."""
        device = self.machines.device
        return self.device_hours * device.price_hour, self.device_hours * device.price_hour_spot


def estimate(
    workload: Workload,
    machines: Machines,
    calibration: Calibration | None = None,
    failures: FailureRate = SOURCES[DEFAULT],
) -> Estimate:
    """Return the estimate of a run.

    Raises:
        UserError: the run does not fit into the devices' memory.
    """
    train = workload.recipe.train
    micro, accumulation = train.micro(machines.devices), train.accumulation(machines.devices)
    used = memory(workload, machines, micro, workload.zero_stage, calibration)
    largest = largest_micro_batch(workload, machines, workload.zero_stage, calibration)
    sizes = sorted({1, max(1, micro // 2), micro, max(1, largest)})
    by_stage = {
        stage: StageMemory(
            {size: memory(workload, machines, size, stage, calibration).total for size in sizes},
            largest_micro_batch(workload, machines, stage, calibration),
        )
        for stage in range(4)
    }
    if largest < micro:
        _refuse_memory(workload, machines, micro, largest, by_stage)
    times = step_time(workload, machines, micro, accumulation, calibration)
    reading = ingest(workload, machines, times, calibration)
    steps = workload.total_steps
    relied = reliability(workload, machines, steps * times.total, calibration, failures)
    hours = steps * times.total / relied.goodput / 3600
    peak = _peak(workload, machines.device) * machines.devices
    return Estimate(
        machines,
        micro,
        accumulation,
        used,
        by_stage,
        largest,
        times,
        reading,
        relied,
        steps,
        hours,
        workload.trace.flops * train.global_batch / times.total / peak,
        calibration is not None,
        int(train.eval_async),
        _fewest(workload, machines, calibration),
    )


def _fewest(workload: Workload, machines: Machines, calibration: Calibration | None) -> tuple[int, float] | None:
    """Return the smallest number of devices of an elastic run (`cluster.min_workers`), and its seconds per step."""
    train, least = workload.recipe.train, workload.recipe.cluster.min_workers
    if least is None or least >= machines.devices:
        return None
    nodes = math.ceil(least * machines.nodes / machines.devices)
    small = replace(machines, devices=least, nodes=nodes, data_cpus=machines.data_cpus * nodes / machines.nodes)
    if largest_micro_batch(workload, small, workload.zero_stage, calibration) < train.micro(least):
        raise UserError(
            f"cluster.min_workers = {least}: a micro-batch of {train.micro(least)} samples does not fit on {least} "
            "devices: set train.micro_batch, or a larger cluster.min_workers"
        )
    return least, step_time(workload, small, train.micro(least), train.accumulation(least), calibration).total


def check_starving(plan: Estimate, workload: Workload) -> None:
    """Refuse a plan whose devices would wait for data.

    Raises:
        UserError: the CPU cores for data tasks do not decode fast enough.
    """
    reading, recipe = plan.ingest, workload.recipe
    if reading.cores_wanted > reading.cores_there:
        raise UserError(
            f"the devices would wait for data: {reading.samples_s:,.0f} samples/s need {reading.cores_wanted:,.1f} CPU "
            f"cores to decode, {reading.cores_there:,.1f} are available: add CPU nodes (--data-cpus "
            f"{math.ceil(reading.cores_wanted - reading.cores_there)} more), or use fewer devices"
        )
    tasks = recipe.data.tasks * plan.machines.devices
    if reading.cores_wanted > tasks:
        wanted = math.ceil(reading.cores_wanted / plan.machines.devices)
        raise UserError(
            f"the devices would wait for data: data.tasks = {recipe.data.tasks} for each of {plan.machines.devices} "
            f"workers decodes on at most {tasks} cores, {reading.cores_wanted:,.1f} are needed: set data.tasks={wanted}"
        )


def _refuse_memory(
    workload: Workload, machines: Machines, micro: int, largest: int, by_stage: dict[int, StageMemory]
) -> None:
    limit = machines.device.memory_gb * MEMORY_MARGIN
    fits = [stage for stage, found in by_stage.items() if found.totals[micro] <= limit * 1e9]
    changes = []
    if largest >= 1:
        share = -(-workload.recipe.train.global_batch // machines.devices)
        changes.append(f"set train.micro_batch={max(d for d in range(1, largest + 1) if share % d == 0)}")
    if fits and fits[0] != workload.zero_stage:
        changes.append(f"set deepspeed.zero_stage={fits[0]}")
    changes.append("take devices with more memory" if not changes else "or take devices with more memory")
    needed = by_stage[workload.zero_stage].totals[micro]
    raise UserError(
        f"a micro-batch of {micro} needs {needed / 1e9:.1f} GB on each device, {limit:.1f} of "
        f"{machines.device.memory_gb:g} GB can be used: {', '.join(changes)}"
    )


def _half(workload: Workload, device: Device) -> bool:
    """Return whether matrix products are in bfloat16; `precision: auto` means on devices where that is faster."""
    precision = workload.recipe.train.precision
    return precision == "bf16" or (precision == "auto" and device.bf16_tflops > device.fp32_tflops)


def _peak(workload: Workload, device: Device) -> float:
    return 1e12 * (device.bf16_tflops if _half(workload, device) else device.fp32_tflops)


def memory(workload: Workload, machines: Machines, micro: int, stage: int, calibration: Calibration | None) -> Memory:
    """Return the bytes per device under a ZeRO stage: float32 weights, gradients, the optimizer's moments, activations.

    Under ZeRO 1 and 2 DeepSpeed keeps a float32 copy of the rank's part of the weights in addition to the weights;
    under ZeRO 3 only that part.
    """
    account, device = workload.account, machines.device
    share = AUTOCAST_ACTIVATIONS * _residual(workload) if _half(workload, device) else 1.0
    float32 = account.float32_activation_bytes
    kept = (account.activation_bytes - float32) * share + float32
    # Where nearly all is frozen, hardly anything is kept for the backward pass.
    activations = micro * max(kept, share * workload.trace.working_bytes)
    if _on_gpu(device):
        activations += SCORE_COPIES * 4 * min(micro * workload.trace.scores, GPU_SCORES)
    context = machines.device.context_gb * 1e9
    if calibration:
        processes = machines.devices // machines.nodes
        context = calibration.base_bytes(processes)
        passing = calibration.passing_bytes(
            micro, processes, lambda world: sum(_states(workload, world, workload.zero_stage))
        )
        activations = max(activations, passing)
    return Memory(context, *_states(workload, machines.devices, stage), activations=activations)


def _states(workload: Workload, world: int, stage: int) -> tuple[float, float, float, float]:
    """Return the bytes of weights, gradients, optimizer and DeepSpeed's buffer on one of `world` devices."""
    values, trained = 4.0 * workload.account.parameters, 4.0 * workload.account.trained
    moments = 3 if workload.recipe.train.ema else 2
    return (
        values / (world if stage == 3 else 1),
        trained / (world if stage >= 2 else 1),
        moments * trained / (world if stage else 1) + (trained / world if stage in (1, 2) else 0),
        min(trained, 4.0 * BUCKET_ELEMENTS) if world > 1 or stage else 0,
    )


def largest_micro_batch(workload: Workload, machines: Machines, stage: int, calibration: Calibration | None) -> int:
    """Return the largest micro-batch that fits on a device under a ZeRO stage, at most a worker's whole share."""
    share = -(-workload.recipe.train.global_batch // machines.devices)
    fixed = memory(workload, machines, 0, stage, calibration).total
    each = (memory(workload, machines, share, stage, calibration).total - fixed) / share
    free = machines.device.memory_gb * 1e9 * MEMORY_MARGIN - fixed
    return max(0, min(share, int(free / max(1.0, each))))


def step_time(
    workload: Workload, machines: Machines, micro: int, accumulation: int, calibration: Calibration | None
) -> Step:
    """Return the seconds of a step's parts, from the calibration or a roofline over the traced operations."""
    wire_bytes, wire_seconds = communication(workload, machines, calibration)
    if calibration:
        alone = calibration.step_seconds(
            workload.recipe.train.global_batch, micro, accumulation, machines.devices, machines.nodes
        )
        slowed = calibration.surroundings(machines.devices // machines.nodes)
        return Step(alone * slowed, 0.0, 0.0, wire_seconds, wire_bytes, 0.0)
    compute = accumulation * roofline(workload, machines.device, micro)
    speed = machines.device.memory_gbytes_s * 1e9 * machines.device.memory_efficiency
    parts = pass_seconds(workload, machines.device, micro)
    traffic = accumulation * (parts["kernel"] + parts["other"])
    moved = 7 * 4 * workload.account.trained / (machines.devices if workload.zero_stage else 1)
    optimizer = moved / speed
    reading = workload.recipe.train.global_batch * decode_cpu(workload, None) / max(machines.data_cpus, 1e-9)
    return Step(compute, traffic, optimizer, wire_seconds, wire_bytes, reading)


def roofline(workload: Workload, device: Device, micro: int) -> float:
    """Return the seconds of a forward and backward pass: matrix products by FLOPs or traffic, the rest by traffic."""
    parts = pass_seconds(workload, device, micro)
    launch = parts.pop("launch")
    return max(sum(parts.values()), launch)


def pass_seconds(workload: Workload, device: Device, micro: int) -> dict[str, float]:
    """Return the seconds of a pass over `micro` samples by part; `launch` is the host's, beside the others."""
    trace, half = workload.trace, _half(workload, device)
    speed = device.memory_gbytes_s * 1e9 * device.memory_efficiency
    products = max(
        (trace.flops - trace.float32_flops) / (_peak(workload, device) * device.efficiency),
        trace.product_bytes * (0.5 if half else 1.0) / speed,
    )
    rate = device.fp32_tflops * device.efficiency
    if half and device.tf32_tflops:  # the engine allows TF32 with bf16 alone
        rate = device.tf32_tflops * FLOAT32_SHARE
    float32 = max(trace.float32_flops / (1e12 * rate), trace.float32_product_bytes / speed)
    return {
        "products": micro * products,
        "float32_products": micro * float32,
        "kernel": micro * trace.kernel_flops / (device.fp32_tflops * 1e12 * device.kernel_efficiency),
        "other": other_bytes(workload, device, micro) / speed,
        "launch": trace.operations * device.launch_us * 1e-6,
    }


def other_bytes(workload: Workload, device: Device, micro: int) -> float:
    """Return the bytes that operations other than matrix products move in a pass over `micro` samples."""
    trace, share = workload.trace, 1.0
    if _half(workload, device):
        share = AUTOCAST_BYTES * _residual(workload) * (COMPILED_BYTES if _compiled(workload, device) else 1.0)
    return share * (micro * trace.other_bytes + trace.pass_bytes) + micro * trace.float32_other_bytes


def _on_gpu(device: Device) -> bool:
    return device.match != "cpu"


def _residual(workload: Workload) -> float:
    return RESIDUAL_BYTES if workload.recipe.train.bf16_residual else 1.0


def _compiled(workload: Workload, device: Device) -> bool:
    """Return whether `train.compile` compiles the layers; other models than a Perceiver have none to compile."""
    latent = "latents" in type(workload.recipe.model).model_fields
    return latent and _on_gpu(device) and workload.recipe.train.compile is not False and workload.zero_stage < 3


def communication(workload: Workload, machines: Machines, calibration: Calibration | None) -> tuple[float, float]:
    """Return the bytes that a device sends per step, and the seconds, not overlapped with computation.

    A ring moves 2 (W - 1) / W of the gradients for an all-reduce (or reduce-scatter and gather); ZeRO 3 gathers the
    weights twice and scatters the gradients. Frozen weights have no gradients. The slowest link of the ring counts.
    """
    world = machines.devices
    if world == 1:
        return 0.0, 0.0
    trained, gathered = workload.account.trained, workload.account.parameters
    values = trained + 2 * gathered if workload.zero_stage == 3 else 2 * trained
    sent = (world - 1) / world * 4.0 * values
    if calibration and machines.nodes == 1:
        return sent, calibration.exchange_latency + sent / calibration.exchange_bytes_s
    gbytes = machines.device.link_gbytes_s if machines.nodes == 1 else machines.device.network_gbytes_s
    return sent, sent / (gbytes * 1e9 * 0.8) + 20e-6 * math.log2(world)


def decode_cpu(workload: Workload, calibration: Calibration | None) -> float:
    """Return the CPU seconds to decode and augment a sample."""
    return calibration.sample_cpu_seconds if calibration else workload.data.cpu_seconds


def ingest(workload: Workload, machines: Machines, step: Step, calibration: Calibration | None) -> Ingest:
    """Return the reading rates for devices that never wait."""
    pace = step.compute + step.optimizer + step.communication
    samples = workload.recipe.train.global_batch / pace
    size = samples * workload.data.sample_bytes
    return Ingest(
        samples, size, size / workload.data.group_bytes, samples * decode_cpu(workload, calibration), machines.data_cpus
    )


def reliability(
    workload: Workload,
    machines: Machines,
    seconds: float,
    calibration: Calibration | None,
    failures: FailureRate = SOURCES[DEFAULT],
) -> Reliability:
    """Return the checkpoints at Young and Daly's interval sqrt(2 x save time x time between failures), and the goodput.

    A checkpoint contains weights, both moments and the moving average, if there is one, in float32; each device writes
    its part.
    """
    size = float(state_bytes(workload.recipe, workload.account.trained, workload.account.frozen))
    rate = calibration.save_bytes_s if calibration else STORE_BYTES_S
    save = size / (rate * (machines.devices if workload.zero_stage else 1)) + 1.0
    between = failures.device_hours * 3600 / machines.devices
    interval = math.sqrt(2 * save * between)
    lost = save / interval + interval / (2 * between) + RECOVERY_SECONDS / between
    in_memory = workload.recipe.train.checkpoint_memory_every is not None
    held = held_bytes(int(size), machines.nodes) if in_memory else 0
    return Reliability(failures, size, held, save, interval, seconds / between, max(0.05, 1 - lost))
