"""Schedules against values calculated by hand from the papers' descriptions."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from perceiver.optim.schedules import (
    ConstantSchedule,
    CosineSchedule,
    FlatCosineSchedule,
    LinearSchedule,
    PolynomialSchedule,
    ScheduleConfig,
    StepSchedule,
    build_schedule,
)


def test_constant_is_one() -> None:
    multiplier = build_schedule(ConstantSchedule(), total_steps=10, steps_per_epoch=5)
    assert [multiplier(step) for step in (0, 5, 9, 100)] == [1.0] * 4


def test_step_drops_at_the_start_of_its_epochs() -> None:
    """Perceiver's ImageNet recipe: 0.1 at epochs 84, 102, 114 of 120, here with 10 steps per epoch."""
    config = StepSchedule(milestones=(84, 102, 114))
    multiplier = build_schedule(config, total_steps=1200, steps_per_epoch=10)
    expected = {0: 1, 839: 1, 840: 0.1, 1019: 0.1, 1020: 0.01, 1139: 0.01, 1140: 0.001, 1199: 0.001}
    assert {step: pytest.approx(multiplier(step)) for step in expected} == expected


def test_cosine_with_warmup() -> None:
    multiplier = build_schedule(CosineSchedule(warmup_steps=4), total_steps=12, steps_per_epoch=3)
    assert [multiplier(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert multiplier(4) == 1.0
    assert multiplier(6) == pytest.approx((1 + math.sqrt(0.5)) / 2)  # a quarter of the way down: cos 45 degrees
    assert multiplier(8) == pytest.approx(0.5)
    assert multiplier(12) == pytest.approx(0.0)
    assert multiplier(50) == pytest.approx(0.0)


def test_cosine_ends_at_its_final_value() -> None:
    multiplier = build_schedule(CosineSchedule(final=0.1), total_steps=10, steps_per_epoch=5)
    assert multiplier(0) == 1.0
    assert multiplier(5) == pytest.approx(0.55)
    assert multiplier(10) == pytest.approx(0.1)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial_and_linear_decay_as_torch_does(power: float) -> None:
    """After a warm-up of 4 steps, against torch's own scheduler over the rest."""
    kinds = [PolynomialSchedule(power=power, warmup_steps=4), *([LinearSchedule(warmup_steps=4)] if power == 1 else [])]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=8, power=power)
    wanted = [0.25, 0.5, 0.75, 1.0]
    for _ in range(10):
        wanted.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    for config in kinds:
        multiplier = build_schedule(config, total_steps=12, steps_per_epoch=3)
        assert [multiplier(step) for step in range(14)] == pytest.approx(wanted)


def test_linear_ends_at_its_final_value() -> None:
    multiplier = build_schedule(LinearSchedule(final=0.2), total_steps=10, steps_per_epoch=5)
    assert [multiplier(step) for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_flat_cosine_is_half_and_half() -> None:
    """Perceiver IO: 55 epochs flat, 55 epochs of cosine to 0."""
    multiplier = build_schedule(FlatCosineSchedule(), total_steps=110, steps_per_epoch=1)
    assert {multiplier(step) for step in range(56)} == {1.0}
    assert multiplier(55 + 55 // 2) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 27 / 55))
    assert multiplier(109) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 54 / 55))


def test_warmup_fraction_is_of_all_steps() -> None:
    multiplier = build_schedule(ConstantSchedule(warmup_fraction=0.2), total_steps=10, steps_per_epoch=5)
    assert [multiplier(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "cosine", "warmup_steps": 3, "warmup_fraction": 0.1}, "warmup_steps.*warmup_fraction"),
        ({"kind": "cosine", "milestones": [3]}, "cosine.milestones"),
        ({"kind": "step"}, "step.milestones"),
        ({"kind": "sine"}, "sine"),
        ({"kind": "polynomial", "power": 0}, "polynomial.power"),
        ({"kind": "linear", "final": 1.5}, "linear.final"),
        ({"kind": "linear", "power": 2}, "linear.power"),
    ],
)
def test_bad_schedules_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ScheduleConfig).validate_python(given)


def test_a_schedule_that_begins_at_a_step_is_that_of_a_run_of_the_rest() -> None:
    kinds = (
        CosineSchedule(warmup_steps=4),
        FlatCosineSchedule(warmup_fraction=0.25, final=0.1),
        StepSchedule(milestones=(1, 2)),
        LinearSchedule(warmup_steps=3),
        PolynomialSchedule(power=1.5, final=0.1),
    )
    for config in kinds:
        whole = build_schedule(config.model_copy(update={"start": 100}), total_steps=112, steps_per_epoch=3)
        rest = build_schedule(config, total_steps=12, steps_per_epoch=3)
        assert [whole(step) for step in range(100, 112)] == [rest(step) for step in range(12)]
        assert whole(7) == rest(0)
    assert build_schedule(CosineSchedule(start=20), total_steps=10, steps_per_epoch=5)(3) == 1.0
