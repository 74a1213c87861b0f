"""When a run ends early: which evaluation decides, and that the loop ends alike when it is resumed."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from perceiver.train.config import EarlyStop, TrainConfig
from perceiver.train.hooks import EarlyStopHook, EvalHook, History
from perceiver.train.loop import Flags, Span, StepInfo, train
from tests.perceiver.train.toy import toy_batches, toy_engine

NAN = math.nan


@pytest.mark.parametrize(
    ("values", "config", "step"),
    [
        ([3, 2, 2, 1, 1, 1], {"patience": 2}, 6),
        ([3, 2, 2, 2, 1, 0], {"patience": 2}, 4),
        ([3, 2, 1, 0], {"patience": 1}, None),
        ([3, 2.9, 2.85, 2.5], {"patience": 2, "min_delta": 0.2}, 3),
        ([1, 2, 3, 3, 2], {"patience": 2, "mode": "max"}, 5),
        ([NAN, NAN, 1], {"patience": 2}, 2),
        ([1, NAN, 0.5, NAN, NAN], {"patience": 2}, 5),
        ([], {}, None),
    ],
)
def test_the_evaluation_that_ends_the_run(values: list[float], config: dict[str, Any], step: int | None) -> None:
    evaluations = {number: {"eval/loss": value} for number, value in enumerate(values, 1)}
    found = EarlyStop.model_validate(config).decided({**evaluations, 99: {"eval/other": 0.0}})
    assert (found and found[0]) == step
    if found:
        assert "eval/loss" in found[1] and f"step {step}" in found[1]


class Worse:
    """An evaluation whose loss rises from the second time."""

    def __init__(self, engine: Any, history: History) -> None:
        self.engine, self.history = engine, history

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def evaluate(self, batches: Any) -> dict[str, float]:
        return {"loss": 1.0 + len(self.history.evaluations())}


def run(history: History, start: int, stop_at: int = 100) -> tuple[int, list[StepInfo], EarlyStopHook]:
    engine: Any = Worse(toy_engine(), history)
    evaluation = EvalHook(history, engine, list, epochs=1.0)
    early = EarlyStopHook(EarlyStop(patience=2), history)
    seen: list[StepInfo] = []
    span = Span(start, 20, global_batch=4, accumulation=1, steps_per_epoch=2, seed=0)

    def poll() -> Flags:
        return Flags(stop=start + len(seen) + 1 == stop_at, enough=early.enough())

    if early.over(start):
        return start, seen, early
    return train(engine, toy_batches(start, 20), [evaluation, early, seen.append], span, poll=poll), seen, early


def test_the_run_ends_one_step_after_the_decision_with_an_evaluation_of_its_weights() -> None:
    history = History()
    step, seen, early = run(history, 0)
    assert step == 7 and early.ended and [info.last for info in seen] == [False] * 6 + [True]
    assert list(history.evaluations()) == [2, 4, 6, 7]
    assert early.over(7) and not early.over(6)


@pytest.mark.parametrize("stop_at", [1, 5, 6])
def test_a_resumed_run_ends_at_the_same_step(stop_at: int) -> None:
    first = History()
    step, _, early = run(first, 0, stop_at)
    assert step == stop_at and not early.ended
    again = History(first.text())
    assert run(again, stop_at)[0] == 7 and list(again.evaluations()) == [2, 4, 6, 7]
    ended = run(History(again.text()), 7)
    assert ended[0] == 7 and not ended[1]


def test_the_best_checkpoint_by_the_metric_is_kept_unless_another_is_wanted() -> None:
    given: dict[str, Any] = {"epochs": 1, "early_stop": {"metric": "eval/accuracy", "mode": "max"}}
    best = TrainConfig.model_validate(given).keep_best
    assert best is not None and (best.metric, best.mode, best.count) == ("eval/accuracy", "max", 1)
    best = TrainConfig.model_validate({**given, "keep_best": {"metric": "eval/loss", "mode": "min"}}).keep_best
    assert best is not None and best.metric == "eval/loss"
    assert TrainConfig(epochs=1).keep_best is None
    with pytest.raises(ValidationError, match="early_stop.metric"):
        TrainConfig.model_validate({"epochs": 1, "early_stop": {"metric": 3}})
