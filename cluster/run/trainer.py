"""The Ray Train trainer of a recipe, for `perceiver train` and for the trials of a search."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # the base of TorchTrainer

from cluster.recipe.config import Recipe, for_workers
from cluster.recipe.placement import check_task_memory, connected_nodes, worker_labels, worker_need
from cluster.recipe.preflight import data_cpus, data_need, place_some
from cluster.recipe.resources import worker_cpus
from cluster.record.failures import one_line
from cluster.record.run_folder import RunFolder
from cluster.run.worker import train_worker
from cluster.runtime.process_group import torch_config
from perceiver.tracking.redaction import Unshown
from perceiver.tracking.runs import RunHandle

RESIZE_S = 15.0
"""Seconds between two checks for new nodes, with `cluster.min_workers`."""
REPEAT_S = 5.0
"""Within this time the same failure is reported once: Ray Train repeats it at each health check."""


@dataclass(frozen=True)
class Share:
    """A run's share of the cluster.

    Attributes:
        cpus: logical CPUs for its workers and data tasks.
        taken: CPUs that the run's own driver reserves.
        runs: concurrent runs on the same machines, which divide the cores among the threads of their workers.
    """

    cpus: float
    taken: float = 0
    runs: int = 1


class FailureReporter(UserCallback):
    """Sends an event for each worker failure from which Ray Train recovers.

    Args:
        monitor: address of the run's monitor (an actor's handle).
    """

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor
        self._reported: tuple[int, str, float] | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Report the first failed worker. Ray calls this by keyword, in the controller's process."""
        rank, error = sorted(worker_exceptions.items())[0]
        cause = getattr(error, "cause", None) or error
        reason = one_line(cause)
        before, self._reported = self._reported, (rank, reason, time.monotonic())
        if before and before[:2] == (rank, reason) and time.monotonic() - before[2] < REPEAT_S:
            return
        raised = not type(cause).__module__.startswith("ray.")  # by the worker function; Ray's own: a lost process
        self.monitor.push.remote({"kind": "failure", "rank": 0, "failed": rank, "reason": reason, "raised": raised})


def build_trainer(
    recipe: Recipe,
    folder: RunFolder,
    monitor: Any,
    handle: RunHandle | None,
    share: Share,
    holders: Sequence[tuple[str, Any]] = (),
) -> TorchTrainer:
    """Return the trainer whose ``fit`` starts or resumes a run on Ray Train workers.

    Args:
        recipe: the recipe.
        folder: of the run; the workers resume from its newest checkpoint.
        monitor: address of the monitor for the workers' events (`cluster.worker.monitor.ActorMonitor`).
        handle: the MLflow run, or None.
        share: the run's share of the cluster.
        holders: of checkpoints in memory (`cluster.worker.peers.Holders.addresses`).

    Raises:
        UserError: the workers and data tasks do not fit into the share.
    """
    cluster = recipe.cluster
    elastic = cluster.resolved_address() is not None and cluster.min_workers not in (None, cluster.workers)
    return TorchTrainer(
        train_worker,
        train_loop_config={**worker_config(recipe, folder, monitor, handle, share), "holders": tuple(holders)},
        torch_config=torch_config(cluster),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(cluster.min_workers or 1, cluster.workers) if elastic else cluster.workers,
            elastic_resize_monitor_interval_s=RESIZE_S,
            resources_per_worker=worker_resources(recipe, share),
            use_gpu=cluster.gpus_per_worker > 0,
            label_selector=worker_labels(cluster, connected_nodes() if cluster.avoid else ()) or None,
            placement_strategy=cluster.placement.upper(),
        ),
        run_config=ray.train.RunConfig(
            # A new name for each start: our manifests decide where a run resumes, not Ray's snapshot of the last start.
            name=f"start-{time.time_ns()}",
            # Only references to checkpoints are stored here, so a local folder of the driver's node is enough.
            storage_path=str((folder.local / "ray").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailureReporter(monitor)],
        ),
    )


def keep_reference(trainer: TorchTrainer, event: Mapping[str, Any]) -> None:
    """Write the folder of `Result.checkpoint`, with the step and the URL of our checkpoint in ``checkpoint.json``.

    Ray Train accepts only checkpoints inside its own folder; ours are in the recipe's output folder.

    Args:
        trainer: see `build_trainer`.
        event: an event of the kind `checkpoint`.
    """
    config = trainer.run_config
    folder = Path(str(config.storage_path), str(config.name), f"step-{event['step']:08d}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.json").write_text(json.dumps({"step": event["step"], "uri": event["url"]}))


def worker_resources(recipe: Recipe, share: Share) -> dict[str, float]:
    """Return the resources of each worker: from the share on one machine or in a search, otherwise from the nodes.

    Raises:
        UserError: the workers and data tasks do not fit into the share, or on the nodes of the cluster.
    """
    cluster, nodes, need = recipe.cluster, connected_nodes(), data_need(recipe)
    if not cluster.autoscaling:
        check_task_memory(nodes, need)
    if cluster.resolved_address() is None or share.runs > 1:
        cpus = worker_cpus(cluster, share.cpus, data_cpus(recipe) + share.taken)
    else:
        cpus = place_some(recipe, nodes)
    return {name: amount for name, amount in worker_need(cluster, cpus).items() if amount}


def build_local_trainer(
    recipe: Recipe, folder: RunFolder, monitor: Any, handle: RunHandle | None, share: Share
) -> DataParallelTrainer:
    """Return a trainer whose ``fit`` runs the worker function in this process, as the only worker.

    This is for many short runs in one process: only data tasks are started. ``monitor`` is a
    `cluster.worker.monitor.LocalMonitor`. An exception of the worker is raised, and the worker is not restarted.
    """
    # `TorchTrainer` would destroy the process group after each run, and DeepSpeed keeps using the first one.
    return DataParallelTrainer(
        train_worker,
        train_loop_config=worker_config(recipe, folder, monitor, handle, share),
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name=folder.name),
    )


def worker_config(
    recipe: Recipe, folder: RunFolder, monitor: Any, handle: RunHandle | None, share: Share
) -> dict[str, Any]:
    """Return the argument of `cluster.run.worker.train_worker`."""
    on_cluster = recipe.cluster.resolved_address() is not None
    return {
        "recipe": Unshown(for_workers(recipe)),
        "run": folder.name,
        "monitor": monitor,
        "mlflow": Unshown(handle),
        "fence": folder.fence,
        "local": str(folder.local.resolve()),
        "threads": None if on_cluster else wanted_threads(),
        "runs": share.runs,
        "holders": (),
        "on_cluster": on_cluster,
    }


def wanted_threads() -> int | None:
    """Return the threads per process that the user has set by ``OMP_NUM_THREADS``, if any.

    Read in the driver: Ray sets the variable in its workers when it is not set.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdecimal() and int(threads) else None
