"""A loss that is NaN or infinite: stopped, skipped or rolled back, the same on all ranks, with the samples named."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perceiver.config import UserError
from perceiver.train.bad_loss import BAD, BadLossHook
from perceiver.train.checkpoint.ledger import SampleLog
from perceiver.train.checkpoint.store import CheckpointStore, Snapshot
from perceiver.train.hooks import History, MetricsHook
from perceiver.train.loop import Batch, Span, StepInfo, train
from tests.perceiver.train.toy import toy_batches, toy_engine

BAD_STEP, SAVED, LAST = 8, 5, 12


def batches(start: int, stop: int, bad: tuple[int, ...] = (BAD_STEP,)) -> Iterator[Batch]:
    """Yield toy batches with sample ids; those of the bad steps, counted from 1, contain infinity."""
    for index, batch in enumerate(toy_batches(start, stop), start):
        if index + 1 in bad:
            batch["x"] = batch["x"] * torch.inf
        yield {**batch, "sample_id": torch.arange(8) + 8 * index}


class Run:
    """A toy run that saves at one step and records what the hook does."""

    def __init__(self, folder: Path, policy: Any, limit: int = 10, history: str = "") -> None:
        self.engine, self.store, self.history = toy_engine(), CheckpointStore(str(folder)), History(history)
        self.samples, self.kept, self.losses, self.restored = SampleLog(), [], {}, []
        self.hook = BadLossHook(policy, limit, self.history, self.keep, self.newest)

    def keep(self, first: int, last: int) -> None:
        self.kept.append((first, last))

    def newest(self) -> int | None:
        found = self.store.newest()
        return found.step if found else None

    def after(self, info: StepInfo) -> None:
        self.losses[info.step] = info.result.loss
        if info.step == SAVED:
            self.store.save(self.engine, Snapshot(info.step, 0, {}, {}, {}, {}, self.history.text()))

    def train(self, source: Iterator[Batch], start: int = 0) -> None:
        hooks = [self.samples, self.hook, MetricsHook(self.history, 4), self.after]
        train(self.engine, source, hooks, Span(start, LAST, 8, 1, 4.0, 0), restore=self.restore)

    def restore(self, step: int) -> None:
        self.restored.append(step)
        with self.store.fetch(SAVED) as local:
            self.engine.load(local)


def test_stop_names_the_step_and_keeps_its_samples(tmp_path: Path) -> None:
    run = Run(tmp_path, "stop")
    with pytest.raises(UserError, match=r"(nan|inf).* step 8\b.*train\.on_bad_loss"):
        run.train(batches(0, LAST))
    assert run.kept == [(7, 8)]


def test_skip_leaves_the_weights_and_continues(tmp_path: Path) -> None:
    run = Run(tmp_path, "skip")
    run.train(batches(0, LAST))
    assert list(run.losses) == list(range(1, LAST + 1)) and run.kept == [(7, 8)]
    assert [row["step"] for row in run.history.rows if BAD in row] == [8]
    window = next(row for row in run.history.rows if row["step"] == 8 and "train/loss" in row)
    assert window["train/skipped_steps"] == 1 and window["train/loss"] < torch.inf
    assert all(p.isfinite().all() for p in run.engine.module.parameters())


def test_too_many_are_refused_over_restarts_too(tmp_path: Path) -> None:
    run = Run(tmp_path, "skip", limit=2)
    run.train(batches(0, LAST, bad=(3, 8)))
    again = Run(tmp_path, "skip", limit=2, history=run.history.text())
    with pytest.raises(UserError, match=r"3.*train\.bad_loss_limit.*2"):
        again.train(batches(0, LAST, bad=(2,)))


def rolled_back(folder: Path) -> Run:
    """Train a run that rolls back once."""
    run = Run(folder, "rollback")
    run.train(batches(0, LAST))
    assert run.restored == [BAD_STEP]
    return run


def test_rollback_restores_the_saved_weights_and_skips_the_window(tmp_path: Path) -> None:
    run = rolled_back(tmp_path / "a")
    assert run.kept == [(BAD_STEP - 1, BAD_STEP), (SAVED, BAD_STEP)]
    reference = Run(tmp_path / "b", "stop")
    with run.store.fetch(SAVED) as local:
        reference.engine.load(local)
    reference.train(batches(BAD_STEP, LAST), start=BAD_STEP)
    assert {step: loss for step, loss in run.losses.items() if step > BAD_STEP} == reference.losses
    assert rolled_back(tmp_path / "c").losses == run.losses


def test_rollback_without_a_checkpoint_stops(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 2.*no checkpoint"):
        Run(tmp_path, "rollback").train(batches(0, LAST, bad=(2,)))


@pytest.mark.slow
def test_every_engine_goes_back_as_if_it_had_just_been_started(tmp_path: Path) -> None:
    """The skipped steps change neither weights nor moments, nor ZeRO's copies of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.perceiver.train.engine.roll_back_worker", str(tmp_path)]
    environment = {**os.environ, **place, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=500)
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = {"skipped": True, "refused": True, "same": True}
    assert len(found) == 5 and all(state == wanted for state in found.values()), found
