"""The weights of G-blend: hand-computed cases, the losses of a history, and estimates during a run."""

import json
from typing import Any

import pytest

from perceiver.config import UserError
from perceiver.train.blending import BlendHook, Losses, blend_weights, recorded_losses
from perceiver.train.engine.protocol import StepResult
from perceiver.train.hooks import History
from perceiver.train.loop import Flags, StepInfo


def losses(**pairs: tuple[float, float]) -> dict[str, Losses]:
    return {name: Losses(*pair) for name, pair in pairs.items()}


def test_weights_are_gain_over_squared_overfitting() -> None:
    """dG 0.2 and 0.1, dO 0.2 and 0.05: 0.2 / 0.04 = 5 and 0.1 / 0.0025 = 40."""
    before = losses(audio=(1.0, 1.0), video=(1.0, 1.1))
    after = losses(audio=(0.6, 0.8), video=(0.85, 1.0))
    assert blend_weights(before, after) == {"audio": pytest.approx(5 / 45), "video": pytest.approx(40 / 45)}


def test_weights_depend_on_changes_not_on_levels() -> None:
    """A classifier that had overfitted before, by 3, and does not overfit more has the weight of one that never did."""
    before = losses(audio=(0.5, 3.5), video=(0.5, 0.5))
    after = losses(audio=(0.3, 3.4), video=(0.3, 0.4))
    assert blend_weights(before, after) == pytest.approx({"audio": 0.5, "video": 0.5})


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        (losses(audio=(0.5, 1.1), video=(0.9, 0.9)), {"audio": 0, "video": 1}),  # the first generalises worse
        (losses(audio=(0.5, 1.0), video=(0.9, 1.0)), {"audio": 0.5, "video": 0.5}),  # none has gained
        (losses(audio=(0.9, 0.9), video=(0.8, 0.8)), {"audio": 1 / 3, "video": 2 / 3}),  # dO 0 counts as 1e-4
    ],
)
def test_edges(after: dict[str, Losses], wanted: dict[str, float]) -> None:
    assert blend_weights(losses(audio=(1, 1), video=(1, 1)), after) == pytest.approx(wanted)


def test_the_order_of_the_published_weights() -> None:
    """Kinetics, R3D-50: .014 for sound, which overfits most, .356 for both and .630 for sight."""
    before = losses(audio=(6, 6), video=(6, 6), joint=(6, 6))
    after = losses(audio=(2.0, 5.0), video=(2.2, 3.4), joint=(1.6, 3.2))
    found = blend_weights(before, after)
    assert found["audio"] < 0.1 < found["joint"] < found["video"] and sum(found.values()) == pytest.approx(1)


ROWS: list[dict[str, float]] = [
    {"step": 5, "train/loss": 0.9, "train/epoch": 0.5},
    {"step": 10, "train/loss": 0.7, "train/epoch": 1.0},
    {"step": 10, "eval/loss": 0.85},
    {"step": 15, "train/loss": 0.5, "train/epoch": 1.5},
    {"step": 20, "train/loss": 0.3, "train/epoch": 2.0},
    {"step": 20, "eval/loss": 0.75},
]


def test_losses_of_a_history() -> None:
    found = recorded_losses(ROWS)
    assert {epoch: (one.train, one.held_out) for epoch, one in found.items()} == {
        1.0: (pytest.approx(0.8), 0.85),
        2.0: (pytest.approx(0.4), 0.75),
    }
    with pytest.raises(UserError, match="1 evaluations"):
        recorded_losses(ROWS[:4])
    with pytest.raises(UserError, match="eval/loss_video"):
        recorded_losses(ROWS, "video")


class Falling:
    """An engine whose losses fall with each evaluation, those of the training split (1) faster than the others (0)."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def evaluate(self, batches: Any) -> dict[str, float]:
        at, fast = self.calls // 2, sum(batches)
        self.calls += 1
        return {f"loss_{name}": 1 - at * speed * (1 + fast) for name, speed in (("audio", 0.01), ("joint", 0.03))}


class Task:
    blend: dict[str, float]

    def __init__(self) -> None:
        self.blend = {"audio": 1.0, "joint": 1.0}


def info(step: int, total: int = 12) -> StepInfo:
    result = StepResult(step, 1.0, {}, None, 0.1, False)
    return StepInfo(step, total, step / 4, 8, 1.0, 0.0, result, Flags(), ())


def trained(steps: range, text: str = "", calls: int = 0) -> tuple[Task, History]:
    task, history = Task(), History(text)
    hook = BlendHook(history, Falling(calls), task, (lambda: [1], lambda: [0]), every=1)  # type: ignore[arg-type]
    hook.begin()
    for step in steps:
        hook(info(step))
    return task, history


def test_a_run_estimates_again_and_a_resumed_one_does_the_same() -> None:
    """dG = 0.01 and 0.03, dO = the same: weights 1/0.01 and 1/0.03."""
    task, history = trained(range(1, 13))
    assert task.blend == pytest.approx({"audio": 0.75, "joint": 0.25})
    rows = [{key: value for key, value in row.items() if key != "time"} for row in history.rows]
    assert [row["step"] for row in rows if "blend/weight_audio" in row] == [4, 8], "after the last epoch none is needed"
    assert rows[0] == {"step": 0, "blend/train_audio": 1.0, "blend/train_joint": 1.0}
    _, first = trained(range(1, 7))
    again, resumed = trained(range(7, 13), first.text(), calls=4)
    assert again.blend == task.blend
    for one, other in zip(history.rows, resumed.rows, strict=True):
        assert json.dumps({**one, "time": 0}) == json.dumps({**other, "time": 0})
