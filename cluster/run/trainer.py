"""The Ray Train trainer of a recipe: one place for `perceiver train` and for the trials of a search."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.recipe.config import Recipe, absolute, for_workers
from cluster.recipe.placement import check_memory, connected_nodes, worker_need
from cluster.recipe.preflight import data_cpus, data_need, place_some, shared_out
from cluster.record.run_folder import RunFolder
from cluster.runtime import local
from perceiver.tracking.runs import RunHandle


@dataclass(frozen=True)
class Share:
    """What of the cluster a run may use.

    Attributes:
        cpus: logical CPUs for its workers and data tasks.
        taken: what of the CPUs the run's own driver holds.
        runs: how many runs share the machines at a time, so that the threads of all their workers fit the cores.
        shared: whether other runs come and go on the same Ray.
    """

    cpus: float
    taken: float = 0
    runs: int = 1
    shared: bool = False


def build_trainer(recipe: Recipe, folder: RunFolder, monitor: Any, handle: RunHandle | None, share: Share) -> Any:
    """Return the trainer whose ``fit`` starts or resumes the run of a folder on Ray Train workers.

    Args:
        recipe: what to train.
        folder: the run's place; its newest checkpoint is where the workers go on.
        monitor: the actor that takes their events (`cluster.run.monitor.start_monitor`).
        handle: the MLflow run, or None.
        share: the part of the cluster that is the run's.

    Raises:
        UserError: the workers and data tasks do not fit into the share.
    """
    import ray.train

    from cluster.run.callbacks import FailureReporter
    from cluster.run.worker import train_worker
    from cluster.runtime.elastic import LOOK_S, ElasticTrainer
    from cluster.runtime.process_group import torch_config
    from cluster.runtime.slim import SlimTrainer

    cluster = recipe.cluster
    counts = shared_out(recipe) if cluster.resolved_address() else (cluster.workers,)
    elastic = len(counts) > 1
    make = partial(ElasticTrainer, counts=counts, monitor=monitor) if elastic else SlimTrainer
    return make(
        train_worker,
        own_ray=cluster.resolved_address() is None and not share.shared,
        train_loop_config=worker_config(recipe, folder, monitor, handle, share),
        backend_config=torch_config(cluster),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(counts[0], counts[-1]) if elastic else cluster.workers,
            elastic_resize_monitor_interval_s=LOOK_S,
            resources_per_worker=worker_resources(recipe, share),
            use_gpu=cluster.gpus_per_worker > 0,
            label_selector=cluster.worker_labels or None,
            placement_strategy=cluster.placement.upper(),
        ),
        run_config=ray.train.RunConfig(
            # A name of its own for each start: our checkpoints say where to go on, not Ray's snapshot of the last time.
            name=f"start-{time.time_ns()}",
            storage_path=absolute(folder.location("ray")),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailureReporter(monitor)],
        ),
    )


def worker_resources(recipe: Recipe, share: Share) -> dict[str, float]:
    """Return what each worker holds: on a machine of our own or in a search from the share, else by the nodes.

    Raises:
        UserError: the workers and data tasks do not fit into the share, or onto the nodes of the cluster.
    """
    cluster, nodes, need = recipe.cluster, connected_nodes(), data_need(recipe)
    if not cluster.autoscaling:
        check_memory(nodes, need)
    if cluster.resolved_address() is None or share.runs > 1:
        cpus = local.worker_cpus(cluster, share.cpus, data_cpus(recipe) + share.taken)
    else:
        cpus = place_some(recipe, nodes)
    return {name: amount for name, amount in worker_need(cluster, cpus).items() if amount}


def build_local_trainer(recipe: Recipe, folder: RunFolder, monitor: Any, handle: RunHandle | None, share: Share) -> Any:
    """Return a trainer whose ``fit`` runs the same worker function in this process, which is then the only worker.

    For many short runs in one process: nothing is started but the data tasks. ``monitor`` is a
    `cluster.run.monitor.LocalMonitor`. A failure is raised as it is, and nobody starts the worker again.
    """
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from cluster.run.worker import train_worker

    # With a backend the process group would end after each run, and DeepSpeed keeps the first one it met.
    configs: Any = {
        "scaling_config": ray.train.ScalingConfig(num_workers=0),
        "run_config": ray.train.RunConfig(name=folder.name),
    }
    return DataParallelTrainer(
        train_worker,
        train_loop_config=worker_config(recipe, folder, monitor, handle, share),
        **configs,
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
    }
