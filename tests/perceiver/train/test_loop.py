"""The loop and its hooks with the plain engine: no Ray, no DeepSpeed."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from perceiver.train.config import TrainConfig
from perceiver.train.engine.protocol import StepResult
from perceiver.train.hooks import EvalHook, History, MetricsHook, window_metrics
from perceiver.train.loop import Flags, Hook, RollBack, Span, StepInfo, train
from tests.perceiver.train.toy import toy_batches, toy_engine


def span(start: int, total: int, accumulation: int = 1) -> Span:
    return Span(start, total, global_batch=8, accumulation=accumulation, steps_per_epoch=5.0, seed=3)


def info(step: int = 1, loss: float = 1.0, seconds: float = 0.5, wait: float = 0.1) -> StepInfo:
    result = StepResult(step - 1, loss, {"accuracy": 0.25}, 2.0, 0.1, False)
    return StepInfo(step, 10, step / 5, 8, seconds, wait, result)


def test_hooks_see_every_step_in_order() -> None:
    seen: list[tuple[int, float, bool]] = []
    done = train(toy_engine(), toy_batches(0, 10), [lambda i: seen.append((i.step, i.epoch, i.last))], span(0, 10))
    assert done == 10
    assert [s for s, _, _ in seen] == list(range(1, 11))
    assert seen[4][1] == pytest.approx(1.0)
    assert [last for _, _, last in seen] == [False] * 9 + [True]


def test_a_stop_ends_after_the_step_and_reaches_the_hooks() -> None:
    seen: list[StepInfo] = []
    done = train(toy_engine(), toy_batches(0, 10), [seen.append], span(0, 10), poll=lambda: Flags(stop=len(seen) == 3))
    assert done == 4
    assert [(i.flags.stop, i.last) for i in seen] == [(False, False)] * 3 + [(True, True)]


def test_a_roll_back_skips_the_later_hooks_and_continues_with_the_next_batch() -> None:
    seen: list[int] = []
    restored: list[int] = []

    def bad(info: StepInfo) -> None:
        if info.step == 2:
            raise RollBack(info.step, "bad")

    hooks: list[Hook] = [bad, lambda info: seen.append(info.step)]
    assert train(toy_engine(), toy_batches(0, 4), hooks, span(0, 4), restore=restored.append) == 4
    assert (seen, restored) == ([1, 3, 4], [2])


def test_two_halves_with_dropout_equal_one_run() -> None:
    """The random state is a function of the step, so a resumed run draws what an unbroken one would."""
    whole, halves = toy_engine(dropout=0.5), toy_engine(dropout=0.5)
    losses: list[float] = []
    train(whole, toy_batches(0, 6), [lambda i: losses.append(i.result.loss)], span(0, 6))
    again: list[float] = []
    train(halves, toy_batches(0, 3), [lambda i: again.append(i.result.loss)], span(0, 3))
    train(halves, toy_batches(3, 6), [lambda i: again.append(i.result.loss)], span(3, 6))
    assert again == losses


def test_metrics_are_means_over_a_window() -> None:
    metrics = window_metrics([info(1, loss=1.0, seconds=0.5, wait=0.1), info(2, loss=3.0, seconds=1.5, wait=0.1)])
    assert metrics["train/loss"] == 2.0
    assert metrics["train/samples_per_s"] == pytest.approx(16 / 2.0)
    assert metrics["train/data_wait"] == pytest.approx(0.1)


def test_a_figure_that_some_steps_lack_is_the_mean_of_the_others() -> None:
    """A batch of a general task may have no sample of a skill."""
    steps = [info(number, loss=1.0, seconds=1.0, wait=0.0) for number in (1, 2, 3)]
    figures = [{"loss": 1.0, "accuracy": 0.5}, {"loss": 1.0}, {"loss": 1.0, "accuracy": 1.0, "none": 0.0}]
    window = [
        replace(one, result=replace(one.result, metrics=found)) for one, found in zip(steps, figures, strict=True)
    ]
    metrics = window_metrics(window)
    assert metrics["train/accuracy"] == 0.75 and metrics["train/none"] == 0


def test_history_rows_come_each_window_and_survive_as_text() -> None:
    sunk: list[int] = []
    history = History(sinks=[lambda step, metrics, time_s: sunk.append(step)])
    train(toy_engine(), toy_batches(0, 5), [MetricsHook(history, 2)], span(0, 5))
    assert [row["step"] for row in history.rows] == [2, 4, 5] == sunk
    assert History(history.text()).rows == history.rows


def test_evaluation_is_due_after_each_epoch_and_at_the_end() -> None:
    history, engine = History(), toy_engine()
    hook = EvalHook(history, engine, lambda: toy_batches(100, 102), 0.4)
    train(engine, toy_batches(0, 5), [hook], span(0, 5))
    assert [row["step"] for row in history.rows] == [2, 4, 5]
    assert hook.latest["loss"] == history.rows[-1]["eval/loss"]


@pytest.mark.parametrize("settings", [{}, {"epochs": 1, "steps": 2}])
def test_length_is_given_once(settings: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=r"train\.epochs.*train\.steps"):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("per_epoch", "wanted"), [(5.0, [5, 10]), (31.25, [32, 63, 94, 125]), (0.4, list(range(1, 11)))]
)
def test_a_step_completes_an_epoch_once(per_epoch: float, wanted: list[int]) -> None:
    result = StepResult(0, 1.0, {}, None, 0.1, False)
    steps = range(1, wanted[-1] + 1)
    infos = [StepInfo(s, 999, s / per_epoch, 8, 1.0, 0.0, result) for s in steps]
    assert [i.step for i in infos if i.completes(1.0)] == wanted


@pytest.mark.parametrize(
    ("samples", "epochs", "batch", "steps"),
    [
        (1000, 30, 120, 250),  # 30 x (1000 / 120) in floating point is more than 250
        (4000, 1, 64, 63),
        (4000, 10, 64, 625),
        (4000, 0.5, 64, 32),
        (1000, 0.07, 1, 70),  # 0.07 x 1000 in floating point is more than 70
        (1, 1, 128, 1),
    ],
)
def test_steps_of_a_run_are_rounded_up_once(samples: int, epochs: float, batch: int, steps: int) -> None:
    assert TrainConfig(epochs=epochs, global_batch=batch).total_steps(samples) == steps
    assert TrainConfig(steps=7, global_batch=batch).total_steps(samples) == 7


@pytest.mark.parametrize(
    ("batch", "micro", "world", "portion"),
    [
        (96, 16, 2, (16, 3)),
        (128, None, 2, (64, 1)),
        (32, None, 3, (11, 1)),
        (32, 4, 3, (4, 3)),
        (32, 16, 5, (7, 1)),
        (2, None, 5, (1, 1)),
    ],
)
def test_any_number_of_workers_shares_out_a_batch(
    batch: int, micro: int | None, world: int, portion: tuple[int, int]
) -> None:
    config = TrainConfig(steps=1, global_batch=batch, micro_batch=micro)
    assert (config.micro(world), config.accumulation(world)) == portion
    assert config.rows(world) == portion[0] * portion[1] and config.rows(world) * world >= batch
