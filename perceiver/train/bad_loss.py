"""The policy for a loss that is NaN, infinite or a spike: stop, skip the step, or roll back to the last checkpoint."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from perceiver.config import UserError
from perceiver.train.hooks import History
from perceiver.train.loop import RollBack, StepInfo
from perceiver.train.spikes import SpikeDetector

log = logging.getLogger(__name__)

BAD = "train/bad_loss"
"""Recorded as 1 at each step whose loss or gradient is NaN or infinite."""
SPIKE = "train/loss_spike"
"""Recorded as 1 at each step whose loss is a spike."""
Policy = Literal["stop", "skip", "rollback"]


@dataclass
class BadLossHook:
    """Handles a NaN or infinite loss, and a spike; the same on all ranks, since the loss is that of the global batch.

    The engine does not change the weights when the gradient is not finite, so skipping a step means continuing. Bad
    steps are counted across restarts, through the recorded metrics. A spike is skipped by the engine, see `Engine`.

    Attributes:
        policy: `train.on_bad_loss`.
        limit: `train.bad_loss_limit`.
        history: records the bad steps.
        keep: write the sample ids of the steps (first, last], counted from 1, to a file.
        last_checkpoint: return the step that a roll-back restores; None without a checkpoint.
        on_spike: `train.on_spike`.
        spikes: detects spikes; None without the key.
        reason: what the last bad loss was.
    """

    policy: Policy
    limit: int
    history: History
    keep: Callable[[int, int], None]
    last_checkpoint: Callable[[], int | None]
    on_spike: Policy | None = None
    spikes: SpikeDetector | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        self.met = sum(BAD in row or SPIKE in row for row in self.history.rows)

    def __call__(self, info: StepInfo) -> None:
        """Apply the policy to the loss of a step.

        Raises:
            UserError: the policy is to stop, the limit is reached, or there is no checkpoint to roll back to.
            RollBack: the policy is to roll back.
        """
        loss = info.result.loss
        high = self.spikes.limit if self.spikes is not None else None
        if self.on_spike is not None and high is not None and math.isfinite(loss) and loss > high:
            self.reason = f"a spike ({loss:.4g}, above {high:.4g})"
            self._react(info, self.on_spike, "on_spike", SPIKE)
        elif not math.isfinite(loss) or info.result.skipped:
            self.reason = "NaN or infinite"
            self._react(info, self.policy, "on_bad_loss", BAD)
        elif self.spikes is not None:
            self.spikes.add(loss)

    def _react(self, info: StepInfo, policy: Policy, key: str, name: str) -> None:
        self.met += 1
        what = f"the loss is {info.result.loss} at step {info.step}"
        if name == SPIKE:
            what += f", {self.reason}"
        advice = "lower optim.lr or set optim.clip, then run again with --resume to continue from the last checkpoint"
        self.keep(info.step - 1, info.step)
        if policy == "stop" and (name == SPIKE or not math.isfinite(info.result.loss)):
            raise UserError(f"{what}: {advice}, or set train.{key} to skip or rollback")
        self.history.record(info.step, {name: 1.0})
        if self.met > self.limit and policy != "stop":
            raise UserError(f"{what}, no. {self.met} (train.bad_loss_limit = {self.limit}): {advice}")
        log.warning("%s (gradient norm %s); train.%s = %s", what, info.result.grad_norm, key, policy)
        if policy == "rollback" and not info.last:
            self._roll_back(info, what, advice)

    def _roll_back(self, info: StepInfo, what: str, advice: str) -> None:
        target = self.last_checkpoint()
        if target is None:
            raise UserError(f"{what} and there is no checkpoint to roll back to: {advice}")
        self.keep(target, info.step)
        raise RollBack(info.step, what)
