"""The number of concurrent trials and their resources, divided so that no trial waits indefinitely for another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.recipe.config import Recipe
from cluster.recipe.placement import LARGEST_DEFAULT_SHARE, Node, place, worker_need
from cluster.recipe.preflight import data_cpus, data_need
from cluster.recipe.resources import ClusterConfig, worker_cpus
from cluster.run.trainer import Share
from perceiver.config import UserError

DRIVER_CPUS = 0.01
"""CPUs that the process of a trial reserves in addition to those of its workers."""


@dataclass(frozen=True)
class Slots:
    """The division of the cluster among trials.

    Attributes:
        concurrency: trials at a time.
        share: resources of one trial's workers and data tasks.
        here: the trial's only worker runs in the trial's own process; otherwise the trial has a worker group.
        portion: logical CPUs of one worker.
        reserved: resources that Tune reserves for the process of a trial.
        labels: required labels of the node of a trial's process.
    """

    concurrency: int
    share: Share
    here: bool
    portion: float
    reserved: dict[str, float]
    labels: dict[str, str]


def divide(
    recipe: Recipe, wanted: int | None, trials: int, cpus: float, gpus: float = 0, nodes: Sequence[Node] = ()
) -> Slots:
    """Divide a cluster's logical CPUs and GPUs among trials of a recipe.

    By default as many trials run at a time as there are CPUs (or ``cluster.cpus_per_worker``) and GPUs for all their
    workers, and room for their data tasks. Workers get the part of their trial's share that its data tasks do not need,
    so each worker group fits next to those that run: it starts completely or not at all, without a deadlock. With
    ``cluster.autoscaling`` a trial gets what it needs, whatever nodes there are now.

    Args:
        recipe: of the trials.
        wanted: trials at a time; None: as many as fit.
        trials: number of trials.
        cpus, gpus: of the cluster.
        nodes: of the cluster if known: workers must fit on single nodes, with labels and custom resources.

    Raises:
        UserError: one trial does not fit, or not as many as wanted.
    """
    concurrency = wanted or _most(recipe.cluster, trials, cpus, gpus)
    while True:
        try:
            slots = _slots(recipe, concurrency, cpus, several=len(nodes) > 1)
            if not recipe.cluster.autoscaling:
                _check_room(recipe, slots, gpus, nodes)
            return slots
        except UserError as error:
            if concurrency == 1:
                raise
            if wanted:
                share = f"{cpus / concurrency:.4g} CPUs"
                raise UserError(f"concurrency = {concurrency} leaves each trial {share}, and {error}") from None
            concurrency -= 1


def _slots(recipe: Recipe, concurrency: int, cpus: float, several: bool) -> Slots:
    """Return each trial's share of the CPUs; on several nodes no worker has more than a default share of one node."""
    cluster, here = recipe.cluster, recipe.cluster.workers == 1
    taken = 0 if here else DRIVER_CPUS
    others, share = data_cpus(recipe) + taken, cpus / concurrency
    usual = others + cluster.workers * (cluster.cpus_per_worker or LARGEST_DEFAULT_SHARE)
    if cluster.autoscaling:
        share = max(share, usual)
    if several and cluster.cpus_per_worker is None:
        share = min(share, usual)
    portion = worker_cpus(cluster, share, others)
    reserved = {name: amount for name, amount in worker_need(cluster, portion).items() if amount}
    labels = dict(cluster.worker_labels) if here else {}
    held = reserved if here else {"CPU": taken}
    return Slots(concurrency, Share(share, taken, concurrency), here, portion, held, labels)


def _check_room(recipe: Recipe, slots: Slots, gpus: float, nodes: Sequence[Node]) -> None:
    """Refuse concurrent trials whose workers and data tasks do not fit on the GPUs or the nodes."""
    cluster, count = recipe.cluster, slots.concurrency
    needed_gpus = cluster.workers * cluster.gpus_per_worker * count
    if needed_gpus > gpus:
        raise UserError(
            f"{count} trials of {cluster.workers} workers at a time need {needed_gpus:g} GPUs, there are "
            f"{gpus:g}: lower concurrency, cluster.workers or cluster.gpus_per_worker"
        )
    if nodes:
        data = data_need(recipe)
        all_workers = {"workers": cluster.workers * count, "cpus_per_worker": slots.portion}
        place(cluster.model_copy(update=all_workers), nodes, replace(data, cpus=data.cpus * count))


def _most(cluster: ClusterConfig, trials: int, cpus: float, gpus: float) -> int:
    """Return the number of concurrent trials that the CPUs and GPUs allow, at least one."""
    fitting = int(cpus / (cluster.workers * (cluster.cpus_per_worker or 1)))
    if cluster.gpus_per_worker:
        fitting = min(fitting, int(gpus / (cluster.workers * cluster.gpus_per_worker)))
    return max(1, min(fitting, trials))
