"""What happens when the loss is no number: stop, skip the step, or roll back and pass the window's samples over."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from perceiver.config import UserError
from perceiver.train.hooks import History
from perceiver.train.loop import StepInfo

log = logging.getLogger(__name__)

BAD = "train/bad_loss"
"""Recorded as 1 at each step whose loss or gradient was no number."""


class RollBack(Exception):
    """Asks for the weights of the last checkpoint; training goes on behind the step whose loss was no number."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss of step {step} is no number")
        self.step = step


@dataclass
class BadLossHook:
    """Acts on a loss that is NaN or infinite; the same on all ranks, since the loss is that of the global batch.

    A step whose gradient is not finite leaves the weights as they were (the engine sees to it), so to skip it is to go
    on. The steps are counted over restarts, in the recorded metrics.

    Attributes:
        policy, limit: `train.on_bad_loss` and `train.bad_loss_limit`.
        keep: leaves the sample ids of the steps (first, last], both counted from 1, in a file.
        last_checkpoint: the step that a roll-back would go to; None if there is no checkpoint yet.
    """

    policy: Literal["stop", "skip", "rollback"]
    limit: int
    history: History
    keep: Callable[[int, int], None]
    last_checkpoint: Callable[[], int | None]

    def __post_init__(self) -> None:
        self.met = sum(BAD in row for row in self.history.rows)

    def __call__(self, info: StepInfo) -> None:
        """See the class.

        Raises:
            UserError: the policy is to stop, there were too many, or nothing to roll back to.
            RollBack: the policy is to roll back.
        """
        if math.isfinite(info.result.loss) and not info.result.skipped:
            return
        self.met += 1
        what = f"the loss is {info.result.loss} at step {info.step}"
        advice = "lower optim.lr or set optim.clip, then run again with --resume to go on from the last checkpoint"
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
