"""A node about to be taken away: Ray says so beforehand; the workers save, and start again on those that stay."""

from typing import Any


def announced() -> Any | None:
    """Return what Ray Train has told this worker of a node of the group that is drained; None if there is nothing.

    `ray.train.get_preemption_info` says the same after a barrier over all workers, at each call. The training loop
    agrees on a stop by itself, so each worker just reads its own note.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info
    except (ImportError, AttributeError, RuntimeError):  # no worker of Ray Train, or another version of it
        return None


def leave(step: int) -> None:
    """End this worker, so that Ray Train starts the group again, where no node is drained or with a node that joined.

    Raises:
        RayActorError: always; of the kind that Ray Train counts among preemptions, not among `cluster.max_failures`.
    """
    from ray.exceptions import RayActorError

    why = "a node has joined" if announced() is None else "its node or another's is drained"
    raise RayActorError(error_msg=f"{why}, step {step} is saved", preempted=True)
