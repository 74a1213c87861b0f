"""A profile of some steps: what it writes, what it refuses, and that it does not change training."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from perceiver.config import UserError
from perceiver.report.run import ReportData, run_report
from perceiver.train.config import ProfileConfig
from perceiver.train.loop import Hook, RollBack, Span, StepInfo, train
from perceiver.train.profiling import divide, profiling
from tests.perceiver.train.toy import toy_batches, toy_engine

TRACE, SUMMARY = "profile/rank-00000.json.gz", "profile/rank-00000.json"
Files = dict[str, bytes]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def run(config: ProfileConfig | None, start: int = 0, *, after: Hook = lambda info: None) -> tuple[list[float], Files]:
    """Return the losses up to step 6, and the files of the profile."""
    losses: list[float] = []
    files: Files = {}
    hooks: list[Hook] = [lambda info: losses.append(info.result.loss), after]
    hooks = [*profiling(config, 0, start, files.__setitem__), *hooks]
    span = Span(start, 6, global_batch=8, accumulation=1, steps_per_epoch=5.0, seed=3)
    train(toy_engine(dropout=0.5), toy_batches(start, 6), hooks, span, restore=lambda step: None)
    return losses, files


def steps_in(trace: bytes) -> list[int]:
    """Return the steps whose end a trace marks."""
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace))["traceEvents"]}
    return sorted(int(name.rpartition(" ")[2]) for name in names if name.startswith("perceiver: step "))


def test_a_profile_has_the_chosen_steps_and_changes_no_loss(group: None) -> None:
    def communicate(info: StepInfo) -> None:
        torch.distributed.all_reduce(torch.ones(300_000))

    losses, files = run(ProfileConfig(steps=(3, 4), memory=True), after=communicate)
    assert losses == run(None)[0]
    assert steps_in(files[TRACE]) == [3, 4]
    found = json.loads(files[SUMMARY])
    assert found["steps"] == [3, 4] and sum(found["split"].values()) == pytest.approx(1)
    assert all(share > 0 for share in found["split"].values()), found["split"]
    calls = {row["name"]: row["calls"] for row in found["operators"]}
    assert calls["aten::addmm"] == 4, "two linear layers in two steps"

    page = run_report(ReportData("a run", history=[], profiles=[found]))["index.html"].decode()
    assert "aten::addmm" in page and "3 to 4" in page and "memory MB" in page


@pytest.mark.parametrize(("start", "steps"), [(0, [2, 3]), (2, [3]), (3, None)])
def test_a_run_that_resumes_profiles_only_steps_still_to_come(start: int, steps: list[int] | None) -> None:
    files = run(ProfileConfig(steps=(2, 3)), start)[1]
    assert (steps_in(files[TRACE]) if files else None) == steps


def test_other_ranks_rolled_back_steps_and_a_disk_that_is_full() -> None:
    def roll_back(info: StepInfo) -> None:
        if info.step == 4:
            raise RollBack(info.step, "bad")

    assert run(ProfileConfig(steps=(2, 3), ranks=(1,)))[1] == {}
    assert steps_in(run(ProfileConfig(steps=(3, 4)), after=roll_back)[1][TRACE]) == [3, 4]

    def full(name: str, content: bytes) -> None:
        raise UserError(f"cannot write {name}")

    span = Span(0, 3, global_batch=8, accumulation=1, steps_per_epoch=5.0, seed=3)
    assert train(toy_engine(), toy_batches(0, 3), profiling(ProfileConfig(steps=(1, 2)), 0, 0, full), span) == 3


def test_a_time_span_is_divided_into_parts_that_do_not_overlap() -> None:
    found = divide((0, 10), waits=[(-5, 1)], compute=[(0.5, 2), (1.5, 3)], communication=[(2, 5), (9, 12)])
    assert found == pytest.approx({"data wait": 0.1, "compute": 0.2, "communication": 0.3, "host": 0.4})


@pytest.mark.parametrize("steps", [(5, 4), (1, 101), (0, 3)])
def test_steps_out_of_order_or_too_many_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="steps"):
        ProfileConfig(steps=steps)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": (9, 11)}, r"steps = \[9, 11\].*10 steps"),
        ({"steps": (9, 10), "ranks": (0, 2)}, r"ranks = \[0, 2\].*rank 2 .*workers = 2"),
    ],
)
def test_steps_and_ranks_that_do_not_exist_are_refused(config: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProfileConfig.model_validate(config).check(total_steps=10, workers=2)
