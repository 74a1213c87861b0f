"""The policy for a loss that is NaN or infinite: stop, skip the step, or roll back to the last checkpoint."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from perceiver.config import UserError
from perceiver.train.hooks import History
from perceiver.train.loop import RollBack, StepInfo

log = logging.getLogger(__name__)

BAD = "train/bad_loss"
"""Recorded as 1 at each step whose loss or gradient is NaN or infinite."""


@dataclass
class BadLossHook:
    """Handles a NaN or infinite loss; the same on all ranks, since the loss is that of the global batch.

    The engine does not change the weights when the gradient is not finite, so skipping a step means continuing. Bad
    steps are counted across restarts, through the recorded metrics.

    Attributes:
        policy: `train.on_bad_loss`.
        limit: `train.bad_loss_limit`.
        history: records the bad steps.
        keep: write the sample ids of the steps (first, last], counted from 1, to a file.
        last_checkpoint: return the step that a roll-back restores; None without a checkpoint.
    """

    policy: Literal["stop", "skip", "rollback"]
    limit: int
    history: History
    keep: Callable[[int, int], None]
    last_checkpoint: Callable[[], int | None]

    def __post_init__(self) -> None:
        self.met = sum(BAD in row for row in self.history.rows)

    def __call__(self, info: StepInfo) -> None:
        """Apply the policy to the loss of a step.

        Raises:
            UserError: the policy is to stop, the limit is reached, or there is no checkpoint to roll back to.
            RollBack: the policy is to roll back.
        """
        if math.isfinite(info.result.loss) and not info.result.skipped:
            return
        self.met += 1
        what = f"the loss is {info.result.loss} at step {info.step}"
        advice = "lower optim.lr or set optim.clip, then run again with --resume to continue from the last checkpoint"
        self.keep(info.step - 1, info.step)
        if self.policy == "stop" and not math.isfinite(info.result.loss):
            raise UserError(f"{what}: {advice}, or set train.on_bad_loss to skip or rollback")
        self.history.record(info.step, {BAD: 1.0})
        if self.met > self.limit and self.policy != "stop":
            raise UserError(f"{what}, no. {self.met} (train.bad_loss_limit = {self.limit}): {advice}")
        log.warning("%s (gradient norm %s); train.on_bad_loss = %s", what, info.result.grad_norm, self.policy)
        if self.policy == "rollback" and not info.last:
            self._roll_back(info, what, advice)

    def _roll_back(self, info: StepInfo, what: str, advice: str) -> None:
        target = self.last_checkpoint()
        if target is None:
            raise UserError(f"{what} and there is no checkpoint to roll back to: {advice}")
        self.keep(target, info.step)
        raise RollBack(info.step)
