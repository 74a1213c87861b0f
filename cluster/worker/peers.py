"""Checkpoints in memory on a Ray cluster: an actor per node that holds them, and the checkpoint a run starts from.

The actors reserve no CPU and belong to the driver, so they outlive the workers and end with the run.
`perceiver.train.checkpoint.memory` has what they do.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.recipe.config import Recipe
from cluster.recipe.memory import check_room
from cluster.recipe.placement import connected_nodes
from cluster.record.run_folder import RunFolder
from perceiver.config import UserError
from perceiver.storage import cache_folder, first_line
from perceiver.train.checkpoint.ledger import SampleLog
from perceiver.train.checkpoint.memory import Held, PartHolder, Peer, Save, find_held, lay_out
from perceiver.train.checkpoint.store import CheckpointStore
from perceiver.train.engine.protocol import Engine

log = logging.getLogger(__name__)

ANSWER_S = 60.0
"""A holder that does not answer within this time counts as lost."""


class Holders:
    """The driver's end: a holder on each node of the cluster.

    Attributes:
        addresses: node and handle of each, for `connect`.
    """

    def __init__(self, recipe: Recipe, state: int) -> None:
        """Start the actors, if the recipe has checkpoints in memory.

        Args:
            recipe: the recipe.
            state: bytes of the whole training state.

        Raises:
            UserError: a node has too little memory.
        """
        self.addresses: list[tuple[str, Any]] = []
        if recipe.train.checkpoint_memory_every is None:
            return
        nodes = [node for node in connected_nodes() if node.node_id]
        if recipe.cluster.resolved_address() is not None:  # the machine of a local instance is checked before
            check_room(state, nodes)
        actor: Any = ray.remote(PartHolder)
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            self.addresses.append((node.node_id, actor.options(num_cpus=0, scheduling_strategy=here).remote()))

    def close(self) -> None:
        """Kill the actors."""
        for _, handle in self.addresses:
            ray.kill(handle)


class ActorPeer:
    """A worker's end of a holder; a call that fails raises Ray's error."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def begin(self, save: Save, rank: int, sizes: Mapping[str, int], keep: Save | None) -> None:
        """See `Peer`."""
        self._call("begin", save, rank, dict(sizes), keep)

    def add(self, save: Save, rank: int, name: str, offset: int, chunk: bytes) -> None:
        """See `Peer`."""
        self._call("add", save, rank, name, offset, chunk)

    def finish(self, save: Save, rank: int, manifest: str) -> None:
        """See `Peer`."""
        self._call("finish", save, rank, manifest)

    def held(self) -> dict[tuple[Save, int], str]:
        """See `Peer`."""
        return self._call("held")

    def read(self, save: Save, rank: int, name: str, offset: int, length: int) -> bytes:
        """See `Peer`."""
        return self._call("read", save, rank, name, offset, length)

    def _call(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._handle, method).remote(*arguments), timeout=ANSWER_S)


def connect(addresses: Sequence[tuple[str, Any]]) -> list[Peer]:
    """Return the holders in the order in which this worker sends to them: its own node's, then the next nodes'."""
    if not addresses:
        return []
    ring = sorted(addresses, key=lambda address: address[0])
    here = ray.get_runtime_context().get_node_id()
    first = next((place for place, (node, _) in enumerate(ring) if node == here), 0)
    return [ActorPeer(handle) for _, handle in (*ring[first:], *ring[:first])]


def staging_store(folder: RunFolder) -> CheckpointStore:
    """Return this node's local store, in which checkpoints in memory are written and laid out."""
    driver = f"{folder.url} {folder.fence.id if folder.fence else ''}"
    place = cache_folder("memory", hashlib.sha256(driver.encode()).hexdigest()[:16])
    return CheckpointStore(str(place), folder.fence)


@dataclass(frozen=True)
class Start:
    """The checkpoint from which workers start.

    Attributes:
        step: its step; 0 without one.
        store: where it is read.
        origin: where it was.
        save: of a checkpoint in memory.
        stored: step of the newest checkpoint in storage that counts, up to which the ledger is written; 0 without one.
    """

    step: int
    store: CheckpointStore
    origin: Literal["storage", "memory"] = "storage"
    stored: int = 0
    save: Save | None = None

    @property
    def place(self) -> str:
        """Return the URL of the checkpoint, or that it was in memory."""
        return "memory" if self.origin == "memory" else self.store.location(self.step)

    def samples(self, into: SampleLog) -> None:
        """Add the samples that the ledger lacks to a log (rank 0, which then writes those of all ranks)."""
        if self.origin == "memory":
            for path in sorted(Path(self.store.folder(self.step)).glob("samples-*.parquet")):
                into.load(path.read_bytes())
            into.forget(self.stored)


def find_start(folder: RunFolder, peers: Sequence[Peer], rank: int, leads: bool, device: torch.device) -> Start:
    """Return the newest checkpoint of storage and memory; rank 0 decides for all ranks, which all call this.

    Args:
        folder: of the run.
        peers: the holders; empty without checkpoints in memory.
        rank: of this worker.
        leads: whether this worker is the first of its node, which lays out what the node's workers read.
        device: of the collectives.
    """
    store, staging = folder.checkpoints, staging_store(folder)
    if leads and peers:
        shutil.rmtree(staging.root, ignore_errors=True)  # what killed workers have left
    lease = folder.fence.number if folder.fence else 0
    held = find_held(peers, lease) if rank == 0 else None
    stored = 0
    if rank == 0:
        stored = max(store.steps(), default=0) if held else 0
        if held is None or held.save[0] < stored:
            stored = _newest(store)
        if held is not None and held.save[0] <= stored:
            held = None
    step, token = held.save if held else (0, 0)
    step, token, stored = _decide([step, token, stored], device)
    if not step:
        return Start(stored, store, stored=stored)
    if _all(_laid_out(staging, peers, (step, token), lease) if leads else True, device):
        return Start(step, staging, "memory", stored, (step, token))
    stored = newest_step(store, rank, device)
    return Start(stored, store, stored=stored)


def newest_step(store: CheckpointStore, rank: int, device: torch.device) -> int:
    """Return the step of the newest checkpoint that verifies, 0 for none; rank 0 decides for all ranks."""
    (step,) = _decide([_newest(store) if rank == 0 else 0], device)
    return step


def _newest(store: CheckpointStore) -> int:
    """Return the step of the newest checkpoint that counts, 0 without one."""
    found = store.newest()
    return found.step if found else 0


def _laid_out(staging: CheckpointStore, peers: Sequence[Peer], save: Save, lease: int) -> bool:
    """Lay out the checkpoint of a save on this node; return whether that succeeded."""
    try:
        held: Held | None = find_held(peers, lease)
        if held is None or held.save != save:
            raise OSError(f"the parts of step {save[0]} are not there any more")
        lay_out(held, staging)
    except (OSError, UserError) as error:
        log.warning("the checkpoint of step %d in memory is not used: %s", save[0], first_line(error))
        return False
    return True


def end_start(start: Start, engine: Engine, leads: bool) -> None:
    """Remove what was laid out for a start, once all workers have read it; every rank calls this."""
    if start.origin == "memory":
        engine.sum([0.0])
        if leads:
            shutil.rmtree(start.store.root, ignore_errors=True)


def _decide(values: Sequence[int], device: torch.device) -> list[int]:
    """Return the values of rank 0."""
    chosen = torch.tensor(values, dtype=torch.int64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(chosen, 0)
    return chosen.tolist()


def _all(value: bool, device: torch.device) -> bool:
    """Return whether a value is true on all ranks."""
    least = torch.tensor(int(value), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return bool(least)
