"""How many trials run at a time, and what each of them holds: decided here, so that none waits for another for ever."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.recipe.config import Recipe
from cluster.recipe.placement import LARGEST_DEFAULT_SHARE, Node, place, worker_need
from cluster.recipe.preflight import data_cpus, data_need
from cluster.recipe.resources import ClusterConfig, worker_cpus
from cluster.run.trainer import Share
from perceiver.config import UserError

DRIVER_CPUS = 0.01
"""CPUs that the process of a trial reserves beside those of its workers."""


@dataclass(frozen=True)
class Slots:
    """How the cluster is divided among trials.

    Attributes:
        concurrency: trials at a time.
        share: what one trial's workers and data tasks may use.
        here: the trial's only worker runs in the trial's own process; otherwise a worker group is started for it.
        portion: logical CPUs of one worker.
        reserved: what Tune reserves for the process of a trial.
        labels: labels that the node of a trial's process must have.
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

    By default as many trials at a time as there is a CPU (or ``cluster.cpus_per_worker``) for each worker, a GPU where
    workers want one, and room for their data tasks. Workers get what data tasks leave of their trial's share, so every
    worker group that is waited for fits beside those that run: it starts whole or not at all, and nothing it waits for
    waits for it. With ``cluster.autoscaling`` a trial gets what it needs, whatever there is yet.

    Args:
        recipe: of the trials.
        wanted: trials at a time; None: as many as fit.
        trials: how many there are.
        cpus: of the cluster.
        gpus: of the cluster.
        nodes: of the cluster where it is known: workers must fit on single nodes, with labels and custom resources.

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
    """Return each trial's part of the CPUs; on several nodes no worker's is more than one node may have."""
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
    """Refuse trials whose workers and data tasks the GPUs, or the single nodes, do not hold all at a time."""
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
    """Return how many trials at a time there are CPUs and GPUs for, at least one."""
    fitting = int(cpus / (cluster.workers * (cluster.cpus_per_worker or 1)))
    if cluster.gpus_per_worker:
        fitting = min(fitting, int(gpus / (cluster.workers * cluster.gpus_per_worker)))
    return max(1, min(fitting, trials))
