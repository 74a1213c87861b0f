"""How many trials run at a time, and what each of them holds: decided here, so that none waits for another for ever."""

from dataclasses import dataclass

from cluster.local import ClusterConfig, worker_cpus
from cluster.preflight import data_cpus
from cluster.recipe import Recipe
from cluster.trainer import Share
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
        reserved: what Tune reserves for the process of a trial.
    """

    concurrency: int
    share: Share
    here: bool
    reserved: dict[str, float]


def divide(recipe: Recipe, wanted: int | None, trials: int, cpus: float, gpus: float = 0) -> Slots:
    """Divide a cluster's logical CPUs and GPUs among trials of a recipe.

    By default as many trials at a time as there is a CPU (or ``cluster.cpus_per_worker``) for each worker, and a GPU
    where workers want one. Workers get what data tasks leave of their trial's share, so every worker group that is
    waited for fits beside those that run: it starts whole or not at all, and nothing it waits for waits for it.

    Raises:
        UserError: one trial does not fit, or not as many as wanted.
    """
    cluster = recipe.cluster
    concurrency = wanted or _fitting(cluster, trials, cpus, gpus)
    needed_gpus = cluster.workers * cluster.gpus_per_worker * concurrency
    if needed_gpus > gpus:
        raise UserError(
            f"concurrency = {concurrency} trials of {cluster.workers} workers need {needed_gpus:g} GPUs, there are "
            f"{gpus:g}: lower concurrency, cluster.workers or cluster.gpus_per_worker"
        )
    here = cluster.workers == 1
    share = Share(cpus / concurrency, 0 if here else DRIVER_CPUS, concurrency)
    try:
        portion = worker_cpus(cluster, share.cpus, data_cpus(recipe) + share.taken)
    except UserError as error:
        if concurrency == 1:
            raise
        raise UserError(f"concurrency = {concurrency} leaves each trial {share.cpus:.4g} CPUs, and {error}") from None
    reserved = {"CPU": portion} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    return Slots(concurrency, share, here, reserved if here else {"CPU": DRIVER_CPUS})


def _fitting(cluster: ClusterConfig, trials: int, cpus: float, gpus: float) -> int:
    """Return how many trials the cluster holds at a time, at least one."""
    fitting = int(cpus / (cluster.workers * (cluster.cpus_per_worker or 1)))
    if cluster.gpus_per_worker:
        fitting = min(fitting, int(gpus / (cluster.workers * cluster.gpus_per_worker)))
    return max(1, min(fitting, trials))
