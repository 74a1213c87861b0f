"""Learning-rate schedules: pure functions from the step to a multiplier of the learning rate.

Steps are counted from 0: step s is the (s+1)-th update of the run. A schedule has no state, so a resumed run
continues exactly.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from perceiver.config import Config, CountOrZero, Positive, Probability, Real, Scale

Schedule = Callable[[int], float]


class _WarmUp(Config):
    """Linear warm-up, available in every schedule: step s of W is multiplied by (s + 1) / W."""

    start: CountOrZero = Field(
        default=0,
        description="Step at which the schedule begins, warm-up included: the last step of a finished run that is "
        "resumed for longer. Steps before it have the rate of the first one.",
    )
    warmup_steps: CountOrZero = Field(default=0, description="Steps of linear warm-up.")
    warmup_fraction: Real = Field(
        default=0.0, ge=0, lt=1, description="Warm-up as a share of all steps, instead of warmup_steps."
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> "_WarmUp":
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("both warmup_steps and warmup_fraction are given; wanted one of them")
        return self


class ConstantSchedule(_WarmUp):
    """A constant learning rate (ModelNet40: Perceiver §4.3)."""

    kind: Literal["constant"] = Field(default="constant", description="Selects this schedule.")


class StepSchedule(_WarmUp):
    """Multiply by gamma at each milestone (ImageNet: 0.1 at epochs 84, 102, 114, Perceiver §4.1)."""

    kind: Literal["step"] = Field(default="step", description="Selects this schedule.")
    milestones: tuple[Positive, ...] = Field(description="Epochs at whose start the rate is multiplied by gamma.")
    gamma: Scale = Field(default=0.1, description="Factor at each milestone.")


class CosineSchedule(_WarmUp):
    """Half a cosine from the end of the warm-up to the end of the run."""

    kind: Literal["cosine"] = Field(default="cosine", description="Selects this schedule.")
    final: Probability = Field(default=0.0, description="Multiplier at the end of the run.")


class LinearSchedule(_WarmUp):
    """A straight line from the end of the warm-up to the end of the run."""

    kind: Literal["linear"] = Field(default="linear", description="Selects this schedule.")
    final: Probability = Field(default=0.0, description="Multiplier at the end of the run.")


class PolynomialSchedule(_WarmUp):
    """(1 - progress) ** power from the end of the warm-up to the end of the run; power 1 is the linear schedule."""

    kind: Literal["polynomial"] = Field(default="polynomial", description="Selects this schedule.")
    power: Real = Field(default=2.0, gt=0, le=100, description="Exponent of the decay.")
    final: Probability = Field(default=0.0, description="Multiplier at the end of the run.")


class FlatCosineSchedule(_WarmUp):
    """Constant, then half a cosine to the end (ImageNet: half and half, Perceiver IO appendix A.1)."""

    kind: Literal["flat_cosine"] = Field(default="flat_cosine", description="Selects this schedule.")
    flat_fraction: Real = Field(default=0.5, ge=0, lt=1, description="Share of all steps before the decay begins.")
    final: Probability = Field(default=0.0, description="Multiplier at the end of the run.")


ScheduleConfig = Annotated[
    ConstantSchedule | StepSchedule | LinearSchedule | PolynomialSchedule | CosineSchedule | FlatCosineSchedule,
    Field(discriminator="kind"),
]


def build_schedule(config: ScheduleConfig, total_steps: int, steps_per_epoch: float) -> Schedule:
    """Return the schedule of a run: a function from the step, counted from 0, to the multiplier of the learning rate.

    Beyond the last step the multiplier stays at its final value. A schedule with a `start` runs from there to the end.

    Args:
        config: kind of schedule and warm-up.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps per epoch (for milestones), not necessarily whole.
    """
    assert total_steps > 0 and steps_per_epoch > 0, (total_steps, steps_per_epoch)
    length = max(1, total_steps - config.start)
    warmup = config.warmup_steps or round(config.warmup_fraction * length)
    shape = _shape(config, warmup, length, steps_per_epoch)

    def multiplier(step: int) -> float:
        step = max(0, step - config.start)
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return ramp * shape(step)

    return multiplier


def _shape(config: ScheduleConfig, warmup: int, total_steps: int, steps_per_epoch: float) -> Schedule:
    """Return the multiplier without warm-up."""
    if isinstance(config, StepSchedule):
        starts = [milestone * steps_per_epoch for milestone in config.milestones]
        return lambda step: config.gamma ** sum(step >= start for start in starts)
    if isinstance(config, CosineSchedule):
        return lambda step: _half_cosine(step, warmup, total_steps, config.final)
    if isinstance(config, FlatCosineSchedule):
        start = round(config.flat_fraction * total_steps)
        return lambda step: _half_cosine(step, start, total_steps, config.final)
    if isinstance(config, LinearSchedule | PolynomialSchedule):
        power = config.power if isinstance(config, PolynomialSchedule) else 1.0
        return lambda step: config.final + (1 - config.final) * (1 - _progress(step, warmup, total_steps)) ** power
    return lambda step: 1.0


def _half_cosine(step: int, start: int, end: int, final: float) -> float:
    """Return 1 up to `start`, then half a cosine down to `final` at `end`."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, start, end)))


def _progress(step: int, start: int, end: int) -> float:
    """Return the share of the steps from `start` to `end` that are done, in [0, 1]."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
