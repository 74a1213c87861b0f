"""The Ray Train trainer of a recipe: one place for `perceiver train` and for the trials of a search."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.recipe.config import Recipe, for_workers
from cluster.recipe.placement import check_memory, connected_nodes, worker_need
from cluster.recipe.preflight import data_cpus, data_need, place_some
from cluster.recipe.resources import worker_cpus
from cluster.record.failures import one_line
from cluster.record.run_folder import RunFolder
from cluster.run.worker import train_worker
from cluster.runtime.process_group import torch_config
from perceiver.tracking.runs import RunHandle

RESIZE_S = 15.0
"""Between two looks for nodes that have joined, with `cluster.min_workers`."""
REPEAT_S = 5.0
"""Ray Train reports the same failure at each health check, until all workers have ended."""


@dataclass(frozen=True)
class Share:
    """What of the cluster a run may use.

    Attributes:
        cpus: logical CPUs for its workers and data tasks.
        taken: CPUs that the run's own driver reserves.
        runs: how many runs share the machines at a time, so that the threads of all their workers fit the cores.
    """

    cpus: float
    taken: float = 0
    runs: int = 1


class FailureReporter(UserCallback):
    """Sends an event for each worker failure that Ray Train recovers from.

    Args:
        monitor: address of the run's monitor (an actor's handle).
    """

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor
        self._told: tuple[int, str, float] | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Report the first worker that failed and why. Called by Ray, by keyword, in the controller's process."""
        rank, error = sorted(worker_exceptions.items())[0]
        reason = one_line(getattr(error, "cause", None) or error)
        before, self._told = self._told, (rank, reason, time.monotonic())
        if before and before[:2] == (rank, reason) and time.monotonic() - before[2] < REPEAT_S:
            return
        self.monitor.push.remote({"kind": "failure", "rank": 0, "failed": rank, "reason": reason})


def build_trainer(
    recipe: Recipe, folder: RunFolder, monitor: Any, handle: RunHandle | None, share: Share
) -> TorchTrainer:
    """Return the trainer whose ``fit`` starts or resumes the run of a folder on Ray Train workers.

    Args:
        recipe: what to train.
        folder: of the run; the workers continue from its newest checkpoint.
        monitor: address of the monitor that takes their events (`cluster.run.monitor.ActorMonitor`).
        handle: the MLflow run, or None.
        share: the part of the cluster that is the run's.

    Raises:
        UserError: the workers and data tasks do not fit into the share.
    """
    cluster = recipe.cluster
    elastic = cluster.resolved_address() is not None and cluster.min_workers not in (None, cluster.workers)
    return TorchTrainer(
        train_worker,
        train_loop_config=worker_config(recipe, folder, monitor, handle, share),
        torch_config=torch_config(cluster),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(cluster.min_workers or 1, cluster.workers) if elastic else cluster.workers,
            elastic_resize_monitor_interval_s=RESIZE_S,
            resources_per_worker=worker_resources(recipe, share),
            use_gpu=cluster.gpus_per_worker > 0,
            label_selector=cluster.worker_labels or None,
            placement_strategy=cluster.placement.upper(),
        ),
        run_config=ray.train.RunConfig(
            # A new name at each start: our manifests decide where a run continues, not Ray's snapshot of the last one.
            name=f"start-{time.time_ns()}",
            # Only references to checkpoints are stored here, so a local folder of the driver's node is enough.
            storage_path=str((folder.local / "ray").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailureReporter(monitor)],
        ),
    )


def keep_reference(trainer: TorchTrainer, event: Mapping[str, Any]) -> None:
    """Write what `Result.checkpoint` of a trainer refers to: a folder with ``checkpoint.json``, the step and the URL.

    Ray Train takes only checkpoints below its own folder, and ours are stored where the recipe says.

    Args:
        trainer: see `build_trainer`.
        event: of the kind `checkpoint`.
    """
    config = trainer.run_config
    place = Path(str(config.storage_path), str(config.name), reference_name(event["step"]))
    place.mkdir(parents=True, exist_ok=True)
    (place / "checkpoint.json").write_text(json.dumps({"step": event["step"], "uri": event["url"]}))


def reference_name(step: int) -> str:
    """Return the name of the folder that refers to the checkpoint of a step."""
    return f"step-{step:08d}"


def worker_resources(recipe: Recipe, share: Share) -> dict[str, float]:
    """Return what each worker reserves: on one machine or in a search by the share, otherwise by the nodes.

    Raises:
        UserError: the workers and data tasks do not fit into the share, or onto the nodes of the cluster.
    """
    cluster, nodes, need = recipe.cluster, connected_nodes(), data_need(recipe)
    if not cluster.autoscaling:
        check_memory(nodes, need)
    if cluster.resolved_address() is None or share.runs > 1:
        cpus = worker_cpus(cluster, share.cpus, data_cpus(recipe) + share.taken)
    else:
        cpus = place_some(recipe, nodes)
    return {name: amount for name, amount in worker_need(cluster, cpus).items() if amount}


def build_local_trainer(
    recipe: Recipe, folder: RunFolder, monitor: Any, handle: RunHandle | None, share: Share
) -> DataParallelTrainer:
    """Return a trainer whose ``fit`` runs the same worker function in this process, which is then the only worker.

    For many short runs in one process: nothing is started but the data tasks. ``monitor`` is a
    `cluster.run.monitor.LocalMonitor`. A failure is raised as it is, and nothing starts the worker again.
    """
    # `TorchTrainer` would end the process group after each run, and DeepSpeed keeps the first one that it met.
    return DataParallelTrainer(
        train_worker,
        train_loop_config=worker_config(recipe, folder, monitor, handle, share),
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name=folder.name),
    )


def worker_config(
    recipe: Recipe, folder: RunFolder, monitor: Any, handle: RunHandle | None, share: Share
) -> dict[str, Any]:
    """Return what `cluster.run.worker.train_worker` is called with."""
    return {
        "recipe": for_workers(recipe),
        "run": folder.name,
        "monitor": monitor,
        "mlflow": handle.to_json() if handle else None,
        "local": str(folder.local.resolve()),
        "runs": share.runs,
        "on_cluster": recipe.cluster.resolved_address() is not None,
    }
