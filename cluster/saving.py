"""How a worker's checkpoints are made: the hook of the training room, told of the recipe, the driver and MLflow."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from perceiver.train.checkpoint import Snapshot
from perceiver.train.checkpoint_hook import CheckpointHook, News
from perceiver.train.hooks import EvalHook
from perceiver.train.loop import StepInfo
from perceiver.train.saving import BackgroundSaver, EveryEpochs, Measured

if TYPE_CHECKING:
    from cluster.worker import Job

BEST_TAG = "best_checkpoint_uri"


def checkpoint_hook(
    job: "Job",
    evaluation: EvalHook,
    snapshot: Callable[[StepInfo, Mapping[str, float], int], Snapshot],
    saved: Callable[[int, str], None],
) -> CheckpointHook:
    """Return the hook that saves this worker's checkpoints; ``saved`` is told of each that counts."""
    training, cluster = job.recipe.train, job.recipe.cluster
    every = training.checkpoint_every
    cadence = Measured(job.engine, cluster.mtbf_hours * 3600, job.start_step) if every == "auto" else EveryEpochs(every)

    def best(step: int, url: str) -> None:
        job.tracker.set_tag(BEST_TAG, url)

    def missed(reason: str) -> None:
        job.monitor.send("missed", {"reason": reason}, urgent=True)

    return CheckpointHook(
        job.engine,
        BackgroundSaver(job.folder.checkpoints, training),
        cadence,
        job.history,
        snapshot,
        evaluation.figures,
        News(saved, best, missed),
    )
