"""Workers that are slow for some time are found by their own compute times, and their nodes can be avoided."""

from typing import Any

import pytest
import torch

from cluster.recipe.placement import DataNeed, Node, place, worker_labels
from cluster.recipe.resources import ClusterConfig
from cluster.run.console import straggler_line
from cluster.run.metrics import RunMetrics
from cluster.run.stragglers import Stragglers, slowness
from perceiver.config import UserError
from perceiver.train.engine.timing import ForwardTimer


def pulse(rank: int, seconds: float | None, steps: int = 0) -> dict[str, Any]:
    return {"kind": "pulse", "rank": rank, "forward_s": seconds, "steps": steps, "last": False, "quarantined": 0}


def watch(times: list[list[float | None]], steps: int = 1) -> list[tuple[float, dict[str, Any]]]:
    """Return when which worker was named; ``times`` has a list by rank for each pulse, every 2 s."""
    found, dog = [], Stragglers(1.5, 60.0)
    for rank in range(len(times[0])):
        dog.note({"kind": "started", "rank": rank, "pid": 7, "node": f"host-{rank}", "node_id": "", "ip": "::1"}, 0.0)
    for turn, row in enumerate(times):
        for rank, seconds in enumerate(row):
            if (event := dog.note(pulse(rank, seconds, steps * turn), 2.0 * turn)) is not None:
                found.append((2.0 * turn, event))
    return found


def test_a_worker_that_is_slow_for_a_time_is_named_once_with_its_node() -> None:
    [(when, event)] = watch([[0.1, 0.11, 0.1, 0.25]] * 100)
    assert 60 <= when <= 62 and event["rank"] == 3 and event["times"] == pytest.approx(2.5)
    line = straggler_line(event)
    assert "worker 3 on host-3" in line and "2.5 times the median" in line


def test_of_two_workers_one_can_be_slow() -> None:
    assert [event["rank"] for _, event in watch([[0.1, 0.2]] * 50)] == [1]


@pytest.mark.parametrize(
    "times",
    [
        [[0.1, 0.14, 0.1, 0.12]] * 100,
        [[0.1, 0.1, 0.1, 0.5]] * 20 + [[0.1, 0.1, 0.1, 0.1]] * 5 + [[0.1, 0.1, 0.1, 0.5]] * 20,
        [[0.3]] * 100,
        [[None, None]] * 100,
    ],
    ids=["within the factor", "for short times", "alone", "not measured"],
)
def test_others_are_not_named(times: list[list[float | None]]) -> None:
    assert watch(times) == []


def test_a_worker_that_was_slow_in_its_last_steps_before_a_hang_is_not_named() -> None:
    assert watch([[0.1, 0.5]] * 100, steps=0) == []


def test_restarted_workers_are_measured_anew() -> None:
    dog = Stragglers(1.5, 0.0)
    for rank in (0, 1):
        dog.note({"kind": "started", "rank": rank, "pid": 7, "node": "host"}, 0.0)
    dog.note(pulse(1, 9.0), 1.0)
    dog.note({"kind": "failure", "rank": 0}, 2.0)
    assert dog.note(pulse(0, 1.0), 3.0) is None and slowness({}) == {}


def test_the_slowest_worker_is_a_metric() -> None:
    seen: dict[str, float] = {}
    metrics = RunMetrics(seen.__setitem__)
    for rank, seconds in enumerate((0.1, 0.1, 0.3)):
        metrics.note(pulse(rank, seconds))
    assert seen["perceiver_slowest_worker"] == pytest.approx(3)


def test_the_forward_passes_of_a_step_are_summed() -> None:
    timer = ForwardTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.measure():
            torch.ones(10).sum()
    assert (timer.take() or 0) > 0 and timer.take() == 0


NODES = [
    Node("10.0.0.1", {"CPU": 4.0}, node_id="a" * 56, host="first"),
    Node("10.0.0.2", {"CPU": 4.0}, node_id="b" * 56, host="second"),
]


@pytest.mark.parametrize("name", ["b" * 56, "second", "10.0.0.2"])
def test_a_node_to_avoid_gets_no_workers(name: str) -> None:
    config = ClusterConfig(workers=4, cpus_per_worker=1, avoid=(name,))
    assert worker_labels(config, NODES) == {"ray.io/node-id": f"!in({'b' * 56})"}
    place(config, NODES, DataNeed(1, 1))
    with pytest.raises(UserError, match=r"cluster\.workers"):
        place(config.model_copy(update={"workers": 5}), NODES, DataNeed(0, 1))


@pytest.mark.parametrize(("avoid", "words"), [(("third",), "'third' matches no node"), (("first", "second"), "every")])
def test_what_cannot_be_avoided_is_refused(avoid: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        worker_labels(ClusterConfig(workers=1, avoid=avoid), NODES)


def test_without_the_key_the_labels_are_the_recipe_s() -> None:
    assert worker_labels(ClusterConfig(worker_labels={"role": "train"}), NODES) == {"role": "train"}
