"""What a worker knows before it builds a model: its rank, recipe and data, and the checkpoint from which it starts."""

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.targets import class_names, with_targets
from cluster.record.run_folder import RunFolder
from cluster.runtime.stages import Stages
from cluster.worker.monitor import Client, make_client
from cluster.worker.peers import Start, connect, find_start
from cluster.worker.results import write_quarantine
from cluster.worker.watchdog import Pulse
from perceiver.train.checkpoint.memory import Peer
from perceiver.train.loop import Span
from perceiver.train.spikes import SpikeDetector
from pipelines.feed.ingest import load_data
from pipelines.shards.manifest import Manifest
from pipelines.shards.quarantine import Quarantine


@dataclass(frozen=True)
class WorkerRank:
    """The rank and device of this worker.

    Attributes:
        rank: rank among all workers.
        world: number of workers.
        local_world: number of workers on this machine.
        device: device of the model.
        leads: whether it is the first worker of its node.
    """

    rank: int
    world: int
    local_world: int
    device: torch.device
    leads: bool = True


@dataclass(frozen=True)
class Setup:
    """What the parts of a worker share.

    Attributes:
        me: rank and device.
        recipe: with what the data decides filled in.
        manifest: of the data.
        folder: of the run.
        quarantine: of the samples that this worker cannot use.
        monitor: the way to the driver.
        pulse: what the driver's watchdog knows of this worker.
        peers: the holders of checkpoints in memory; empty without them.
        start: the checkpoint from which the run starts.
        span: the steps of the run.
        recorded: the metrics up to the checkpoint, as JSON lines.
        spikes: the detector of `train.on_spike`, with the losses of the checkpoint; None without the key.
    """

    me: WorkerRank
    recipe: Recipe
    manifest: Manifest
    folder: RunFolder
    quarantine: Quarantine
    monitor: Client
    pulse: Pulse
    peers: Sequence[Peer]
    start: Start
    span: Span
    recorded: str
    spikes: SpikeDetector | None

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.me.rank == 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(class_names(self.recipe, self.manifest))


def open_setup(
    config: Mapping[str, Any], me: WorkerRank, monitor: Client, stages: Stages, resources: contextlib.ExitStack
) -> Setup:
    """Read the recipe and the manifest, and choose the checkpoint; every rank calls this.

    Args:
        config: see `cluster.run.trainer.worker_config`.
        me: rank and device.
        monitor: the way to the driver.
        stages: gets the seconds of each part.
        resources: gets what is to be closed when the worker ends.

    Raises:
        LeaseError: another driver owns the run.
        UserError: a mistake in the recipe or the data.
    """
    recipe = build_recipe(config["recipe"].value)
    if recipe.train.replay_every:  # torch's deterministic algorithms on GPUs require it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    folder = RunFolder(recipe.output, config["run"], config["fence"])
    folder.check_owner()
    quarantine = Quarantine(recipe.data.max_bad_fraction)
    resources.callback(write_quarantine, quarantine, folder, me.rank)
    monitor.send("started", where(), urgent=True)
    pulse = Pulse(
        make_client(config["monitor"], me.rank),
        recipe.cluster.hang_s,
        recipe.cluster.hang_long_s,
        quarantined=lambda: len(quarantine.problems),
    )
    resources.callback(pulse.stop)
    manifest = load_data(recipe.data)
    recipe = with_targets(recipe, manifest)
    stages.end("recipe and data set")
    peers = connect(config["holders"])
    start = find_start(folder, peers, me.rank, me.leads, me.device)
    stages.end("choice of checkpoint")
    recorded = start.store.history(start.step) if start.step else ""
    span = make_span(recipe, manifest.split(recipe.data.train_split).samples, me.world, start.step)
    spikes = build_spikes(recipe, start)
    return Setup(me, recipe, manifest, folder, quarantine, monitor, pulse, peers, start, span, recorded, spikes)


def make_span(recipe: Recipe, samples: int, world: int, start_step: int) -> Span:
    """Return the steps of a run from a step on, on data of so many training samples."""
    training = recipe.train
    return Span(
        start_step=start_step,
        total_steps=max(start_step, training.total_steps(samples)),
        global_batch=training.global_batch,
        accumulation=training.accumulation(world),
        steps_per_epoch=samples / training.global_batch,
        seed=recipe.seed,
    )


def build_spikes(recipe: Recipe, start: Start) -> SpikeDetector | None:
    """Return the detector of `train.on_spike` with the losses of the checkpoint, None without the key."""
    training = recipe.train
    if training.on_spike is None:
        return None
    losses = start.store.manifest(start.step).recent_losses if start.step else ()
    return SpikeDetector(training.spike_window, training.spike_factor, losses)


def where() -> dict[str, Any]:
    """Return this process, its machine, its node in Ray and its device."""
    on_ray = ray.is_initialized()
    node_id = ray.get_runtime_context().get_node_id() if on_ray else ""
    ip = ray.util.get_node_ip_address() if on_ray else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"pid": os.getpid(), "node": platform.node(), "node_id": node_id, "ip": ip, "device": device}
