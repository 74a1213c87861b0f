"""What a worker tells Ray Train and asks of it: reports of evaluations and checkpoints, notices of preemption."""

import time
from collections.abc import Mapping
from typing import Any

import ray.train

from perceiver.train.hooks import History
from perceiver.train.loop import StepInfo

ASK_S = 2.0
"""Seconds between two requests for preemption notices."""


class RayReporter:
    """Reports evaluations and committed checkpoints to Ray Train, for `Result`, the dashboard and Tune.

    Every rank reports equally often, in the same order; rank 0's metrics count. Nothing is uploaded, and a resumed run
    reads nothing that Ray Train stores.

    Args:
        history: the recorded metrics.
        on_ray: whether this is a worker of a group; a worker in the driver's process reports nothing.
    """

    def __init__(self, history: History, on_ray: bool) -> None:
        self.history, self.on_ray = history, on_ray

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Report an evaluation."""
        if self.on_ray:
            ray.train.report({"step": step, **figures})

    def committed(self, step: int, url: str) -> None:
        """Report a committed checkpoint by reference, with the metrics of the last evaluation."""
        if not self.on_ray:
            return
        scores = self.history.evaluations()
        metrics = {"step": step, "checkpoint_uri": url, **(scores[max(scores)] if scores else {})}
        storage: Any = ray.train.get_context().get_storage()
        path = f"{storage.experiment_fs_path}/step-{step:08d}"  # written by `cluster.run.trainer.keep_reference`
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint(path, storage.storage_filesystem),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )


class PreemptionHook:
    """Asks Ray Train periodically whether a node of the group is about to be preempted; all ranks ask together.

    Args:
        asks: whether this rank decides when to ask.

    Attributes:
        announced: whether a node is about to be preempted. The workers then save, and Ray Train restarts the group.
    """

    def __init__(self, asks: bool) -> None:
        self.asks, self.announced = asks and hasattr(ray.train, "get_preemption_info"), False
        self._asked = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time to ask."""
        return self.asks and time.monotonic() - self._asked > ASK_S

    def __call__(self, info: StepInfo) -> None:
        if info.flags.ask_cluster:
            self._asked = time.monotonic()
            self.announced = ray.train.get_preemption_info() is not None


def exit_preempted(step: int) -> None:
    """Exit this worker, so that Ray Train restarts the group on the remaining nodes.

    Raises:
        RayActorError: always; Ray Train counts it as a preemption, not towards `cluster.max_failures`.
    """
    from ray.exceptions import RayActorError

    raise RayActorError(error_msg=f"a node is about to be preempted, step {step} is saved", preempted=True)
