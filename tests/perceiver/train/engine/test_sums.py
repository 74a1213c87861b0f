"""The sums of a step: read on a GPU without waiting for the update, and of one rank without its device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perceiver.train.engine.protocol import MetricSums, PendingSums
from perceiver.train.engine.ranks import Ranks
from tests.perceiver.train.engine.engine_toys import ToyTask

SHAPES = {"": torch.Size(), "loss": torch.Size(), "correct": torch.Size()}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Work:
    """A collective that notes when it is waited for."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def wait(self) -> None:
        self.calls.append("wait")


def test_a_gpu_copies_the_sums_when_they_are_fetched_and_reads_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    values = torch.tensor([4.0, 6.0, 3.0], dtype=torch.float64)

    def copied(device: str, non_blocking: bool) -> torch.Tensor:
        calls.append(f"copy to {device}, non_blocking={non_blocking}")
        return values.clone()

    class Event:
        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    vector: Any = SimpleNamespace(is_cuda=True, to=copied)
    pending = PendingSums(SHAPES, vector, Work(calls))
    pending.fetch()
    assert calls == ["wait", "copy to cpu, non_blocking=True", "record"]
    values.zero_()
    loss, _ = pending.summarise(ToyTask())
    assert loss == 1.5 and calls[3:] == ["synchronize"]
    assert pending.summarise(ToyTask())[0] == 1.5, "read again"


def test_on_cpus_nothing_is_fetched() -> None:
    calls: list[str] = []
    pending = PendingSums(SHAPES, torch.tensor([4.0, 6.0, 3.0], dtype=torch.float64), Work(calls))
    pending.fetch()
    assert calls == []
    assert pending.summarise(ToyTask())[0] == 1.5 and calls == ["wait"]


def test_one_rank_sums_numbers_without_its_device() -> None:
    """The meta device keeps no values, so they cannot have been there."""
    assert Ranks(torch.device("meta")).sum([1, 0.5, True]) == [1.0, 0.5, 1.0]


@gpu
def test_fetched_sums_are_those_before_later_work() -> None:
    device = torch.device("cuda")
    sums = MetricSums(Ranks(device))
    figures = {"": 4.0, "loss": 6.0, "correct": 3.0}
    sums.totals = {name: torch.tensor(value, device=device) for name, value in figures.items()}
    pending = sums.start()
    pending.fetch()
    product = torch.ones(4096, 4096, device=device)
    for _ in range(20):
        product = product @ product * 1e-4
    pending.vector.zero_()
    assert pending.summarise(ToyTask())[0] == 1.5
