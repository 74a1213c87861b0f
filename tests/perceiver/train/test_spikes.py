"""A loss spike: judged by the last losses alone, stopped, skipped or rolled back, and the same after a resume."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perceiver.config import UserError
from perceiver.train.bad_loss import SPIKE
from perceiver.train.loop import Batch
from perceiver.train.spikes import SpikeDetector
from tests.perceiver.train.test_bad_loss import LAST, SAVED, Run
from tests.perceiver.train.toy import toy_batches

HIGH_STEP = 8


def batches(start: int = 0) -> Iterator[Batch]:
    """Yield toy batches; the targets of one step are far off."""
    for index, batch in enumerate(toy_batches(start, LAST), start):
        batch["y"] = batch["y"] + 100.0 * (index + 1 == HIGH_STEP)
        yield {**batch, "sample_id": torch.arange(8) + 8 * index}


def spiky(folder: Path, policy: Any, losses: list[float] | None = None) -> Run:
    run = Run(folder, "stop")
    run.hook.on_spike, run.hook.spikes = policy, SpikeDetector(10, 10.0, losses or [])
    if policy == "skip":
        run.engine.refuse = run.hook.spikes.is_spike
    return run


def test_a_spike_is_above_the_spread_of_the_window() -> None:
    noise = random.Random(0)
    detector = SpikeDetector(100, 10.0, [2.0 + noise.gauss(0, 0.05) for _ in range(100)])
    assert detector.limit == pytest.approx(2.5, abs=0.1)
    assert detector.is_spike(3.0) and not detector.is_spike(2.3)
    assert SpikeDetector(100, 10.0, [2.0] * 100).limit == pytest.approx(2.2), "a flat curve has a least spread"
    assert not SpikeDetector(100, 10.0, [2.0] * 19).is_spike(1e9), "too few losses"


def test_one_spike_does_not_hide_the_next() -> None:
    losses = [2.0] * 60 + [50.0] * 40
    assert SpikeDetector(100, 10.0, losses).is_spike(50.0)


def test_stop_names_loss_step_and_limit(tmp_path: Path) -> None:
    run = spiky(tmp_path, "stop")
    with pytest.raises(UserError, match=r"step 8, a spike \(.*above.*train\.on_spike"):
        run.train(batches())
    assert run.kept == [(7, 8)]


def test_skip_leaves_the_weights(tmp_path: Path) -> None:
    run, weights = spiky(tmp_path, "skip"), []
    after = run.after

    def keep(info: Any) -> None:
        weights.append([param.detach().clone() for param in run.engine.module.parameters()])
        after(info)

    run.after = keep  # pyright: ignore[reportAttributeAccessIssue]
    run.train(batches())
    same = [all(map(torch.equal, one, two)) for one, two in zip(weights, weights[1:], strict=False)]
    assert [index + 2 for index, equal in enumerate(same) if equal] == [HIGH_STEP]
    assert [row["step"] for row in run.history.rows if SPIKE in row] == [HIGH_STEP] and len(run.losses) == LAST


def test_rollback_restores_the_saved_weights(tmp_path: Path) -> None:
    run = spiky(tmp_path, "rollback")
    run.train(batches())
    assert run.restored == [HIGH_STEP] and run.kept == [(HIGH_STEP - 1, HIGH_STEP), (SAVED, HIGH_STEP)]
    assert run.hook.reason.startswith("a spike")


def test_a_resumed_run_has_the_window_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = spiky(tmp_path / "a", "skip")
    whole.train(batches())
    part = spiky(tmp_path / "b", "skip")
    seen: list[float] = []

    def saved(info: Any) -> None:
        if info.step == SAVED:
            assert part.hook.spikes is not None
            seen.extend(part.hook.spikes.losses)

    part.after = saved  # pyright: ignore[reportAttributeAccessIssue]
    part.train(batches())
    resumed = spiky(tmp_path / "c", "skip", seen)
    with whole.store.fetch(SAVED) as local:
        resumed.engine.load(local)
    resumed.train(batches(SAVED), start=SAVED)
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > SAVED}
    assert resumed.hook.spikes is not None and whole.hook.spikes is not None
    assert resumed.hook.spikes.losses == whole.hook.spikes.losses


def test_off_nothing_happens(tmp_path: Path) -> None:
    run = Run(tmp_path, "stop")
    run.train(batches())
    assert len(run.losses) == LAST and not run.kept
