"""Evaluation in a separate process: when it is requested, what is recorded and kept, what a resume repeats."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perceiver.train.checkpoint.hook import BackgroundSaver, CheckpointHook, EveryEpochs, Listeners
from perceiver.train.checkpoint.store import CheckpointStore
from perceiver.train.config import KeepBest, SavingConfig
from perceiver.train.engine.protocol import StepResult
from perceiver.train.hooks import AsyncEvalHook, History, Scored, last_due
from perceiver.train.loop import StepInfo
from tests.perceiver.train.checkpoint.test_hook import snapshot
from tests.perceiver.train.toy import toy_engine

TOTAL, EPOCH = 40, 10


def info(step: int) -> StepInfo:
    return StepInfo(step, TOTAL, step / EPOCH, 8, 0.1, 0.0, StepResult(step - 1, 0.5, {}, 1.0, 0.1, False))


class Desk:
    """Evaluates on the test's call."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.ready: list[Scored] = []
        self.on_wait: Callable[[], Any] = lambda: None

    def ask(self, step: int) -> None:
        self.asked.append(step)

    def results(self, wait: bool) -> list[Scored]:
        if wait:
            self.on_wait()
        ready, self.ready = self.ready, []
        return ready

    def answer(self, **metrics: float) -> None:
        """Finish the evaluation that was requested last."""
        self.ready.append(Scored(self.asked[-1], metrics))


def evaluations(history: History) -> dict[int, float]:
    return {int(row["step"]): row["eval/accuracy"] for row in history.rows if "eval/accuracy" in row}


def test_the_first_checkpoint_since_an_evaluation_fell_due_is_asked_for() -> None:
    desk, history = Desk(), History()
    hook = AsyncEvalHook(history, 1.0, desk)
    for step in range(1, 14):
        hook(info(step))
        assert hook.wanted(info(step)) == (step == 10)
        if step in (7, 12):  # the one of step 10 could not be saved
            hook.saved(step)
    assert desk.asked == [12] and hook.in_use() == {12}
    desk.answer(accuracy=0.5)
    hook(info(14))
    assert evaluations(history) == {12: 0.5} and hook.in_use() == set()


def test_of_those_that_wait_the_newest_is_taken() -> None:
    desk, history = Desk(), History()
    hook = AsyncEvalHook(history, 1.0, desk)
    for step in range(1, 31):
        hook(info(step))
        if step % 10 == 0:
            hook.saved(step)
    assert desk.asked == [10] and hook.in_use() == {10, 30}
    desk.answer(accuracy=0.5)
    hook(info(31))
    assert desk.asked == [10, 30] and evaluations(history) == {10: 0.5}


def test_the_last_step_waits_for_the_rest_and_asks_for_nothing() -> None:
    desk, history = Desk(), History()
    hook = AsyncEvalHook(history, 1.0, desk)
    for step in range(1, TOTAL):
        hook(info(step))
        if step in (10, 30):
            hook.saved(step)
    desk.on_wait = lambda: desk.answer(accuracy=desk.asked[-1] / 100)
    hook(info(TOTAL))
    assert desk.asked == [10, 30] and evaluations(history) == {10: 0.1, 30: 0.3}
    assert not hook.wanted(info(TOTAL))


def test_a_user_who_stops_waits_for_nothing() -> None:
    desk = Desk()
    hook = AsyncEvalHook(History(), 1.0, desk, stop_requested=lambda: True)
    hook(info(10))
    hook.saved(10)
    hook(info(TOTAL))
    assert hook.in_use() == {10}


def test_one_that_failed_and_one_nobody_waits_for_leave_no_figures() -> None:
    desk, history = Desk(), History()
    hook = AsyncEvalHook(history, 1.0, desk)
    hook(info(10))
    hook.saved(10)
    desk.ready.append(Scored(5, {"accuracy": 0.9}))
    hook(info(11))
    assert hook.in_use() == {10}
    desk.answer()
    hook(info(12))
    assert evaluations(history) == {} and hook.in_use() == set()


@pytest.mark.parametrize(
    ("scored", "recorded", "asked"),
    [
        ({}, {}, [25]),  # the evaluation due at step 20 was interrupted
        ({10: {"accuracy": 0.1}}, {10: 0.1}, [25]),
        ({20: {"accuracy": 0.2}}, {20: 0.2}, []),
        ({22: {"accuracy": 0.2}, 30: {"accuracy": 0.9}}, {22: 0.2}, []),  # 30 is after the checkpoint: discarded
    ],
)
def test_a_resume_makes_up_for_what_was_cut_off(
    scored: dict[int, dict[str, float]], recorded: dict[int, float], asked: list[int]
) -> None:
    desk, history = Desk(), History()
    AsyncEvalHook(history, 1.0, desk, start_step=25, steps_per_epoch=EPOCH, scored=scored)
    assert evaluations(history) == recorded and desk.asked == asked


def test_a_resume_takes_from_the_history_what_it_knows() -> None:
    desk = Desk()
    history = History('{"step": 20, "eval/accuracy": 0.4}\n')
    AsyncEvalHook(history, 1.0, desk, start_step=25, steps_per_epoch=EPOCH, scored={20: {"accuracy": 0.4}})
    assert len(history.rows) == 1 and desk.asked == []


@pytest.mark.parametrize(
    ("step", "steps_per_epoch", "epochs", "due"),
    [(9, 10, 1, None), (10, 10, 1, 10), (29, 10, 1, 20), (25, 12.5, 1, 25), (24, 12.5, 1, 13), (7, 10, 0.2, 6)],
)
def test_the_step_at_which_an_evaluation_fell_due_last(
    step: int, steps_per_epoch: float, epochs: float, due: int | None
) -> None:
    assert last_due(step, steps_per_epoch, epochs) == due
    seen = [
        s
        for s in range(1, step + 1)
        if StepInfo(s, 100, s / steps_per_epoch, 8, 0.1, 0.0, StepResult(s, 0.5, {}, 1.0, 0.1, False)).completes(epochs)
    ]
    assert (seen[-1] if seen else None) == due


def test_the_best_is_found_by_figures_that_come_later(tmp_path: Path) -> None:
    """A checkpoint is kept until it is evaluated, and permanently if it is the best; MLflow is notified."""
    told: list[int] = []
    desk, history, engine = Desk(), History(), toy_engine()
    config = SavingConfig(keep_checkpoints=1, keep_best=KeepBest(metric="eval/accuracy"))
    hook = AsyncEvalHook(history, 1.0, desk)
    saver = BackgroundSaver(CheckpointStore(str(tmp_path)), config, scores=history.evaluations, in_use=hook.in_use)
    listeners = Listeners(saved=lambda step, url: hook.saved(step), best=lambda step, url: told.append(step))
    checkpoints = CheckpointHook(
        engine, saver, EveryEpochs(0.5), history, snapshot, lambda info: {}, listeners, hook.wanted
    )
    for step in range(1, TOTAL + 1):
        desk.on_wait = lambda: desk.answer(accuracy=0.5)
        if step == 19:
            desk.answer(accuracy=0.9)  # of step 10, which is no longer the newest
        if step == 27:
            desk.answer(accuracy=0.6)  # of step 20
        hook(info(step))
        checkpoints(info(step))
        saver.join()
        if step == 16:
            assert saver.store.steps() == [10, 15]
    assert desk.asked == [10, 20, 30] and told == [10]
    assert saver.store.steps() == [10, 40]
    assert evaluations(history) == {10: 0.9, 20: 0.6, 30: 0.5}
