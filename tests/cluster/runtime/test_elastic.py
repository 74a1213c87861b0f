"""Runs whose number of workers follows the nodes: which numbers may train, and what the policy asks of the workers."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.placement import Node
from cluster.recipe.preflight import check_batch, place_some, shared_out
from cluster.run.monitor import MonitorClient, MonitorState
from cluster.runtime.elastic import ElasticTrainer, WholeShares
from perceiver.config import UserError
from tests.cluster.recipes import small_tree


def recipe(batch: int = 24, micro: int | None = None, **cluster: Any) -> Recipe:
    tree = small_tree(Path("nowhere"), "nowhere")
    tree["train"] |= {"global_batch": batch, "micro_batch": micro}
    tree["cluster"] = cluster
    return build_recipe(tree)


@pytest.mark.parametrize(
    ("batch", "micro", "cluster", "counts"),
    [
        (24, None, {"workers": 4}, (4,)),
        (24, None, {"workers": 8, "min_workers": 2}, (2, 3, 4, 6, 8)),
        (24, 4, {"workers": 6, "min_workers": 1}, (1, 2, 3, 6)),
        (24, None, {"workers": 6, "min_workers": 5}, (6,)),
    ],
)
def test_only_numbers_that_share_out_the_batch_may_train(
    batch: int, micro: int | None, cluster: dict[str, Any], counts: tuple[int, ...]
) -> None:
    assert shared_out(recipe(batch, micro, **cluster)) == counts


def test_more_at_least_than_at_most_is_refused() -> None:
    with pytest.raises(UserError, match="cluster.min_workers 3 is more than cluster.workers 2: set it to at most that"):
        check_batch(recipe(workers=2, min_workers=3))


def test_a_run_starts_where_only_some_of_its_workers_fit() -> None:
    nodes = [Node("a", {"CPU": 4.0, "slot": 1.0})]
    slots: dict[str, Any] = {"workers": 2, "worker_resources": {"slot": 1}}
    with pytest.raises(UserError, match="with 1 slot each need 2 slot"):
        place_some(recipe(**slots), nodes)
    assert place_some(recipe(**slots, min_workers=1), nodes) == 1.0


class Monitor:
    """Counts what the workers are asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.request_resize = SimpleNamespace(remote=self._count)

    def _count(self) -> None:
        self.asked += 1


def policy(monitor: Monitor) -> WholeShares:
    config = ray.train.ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1, "slot": 1})
    return WholeShares(config, (2, 3, 4, 6, 8), monitor)


@pytest.mark.parametrize(
    ("reserved", "alive", "silent", "count"),
    [(8, 8, 0, 8), (7, 8, 0, 6), (8, 5, 0, 4), (1, 8, 0, 0), (8, 0, 0, 0), (8, 8, 1, 6), (8, 8, 7, 0)],
)
def test_room_is_rounded_down_and_dead_nodes_are_none(
    monkeypatch: pytest.MonkeyPatch, reserved: int, alive: int, silent: int, count: int
) -> None:
    """Ray's autoscaler still counts a node that has just died, and so does Ray for some seconds."""
    each = {"CPU": 2.0, "slot": 1.0}
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = [(gone if number < silent else server).getsockname()[1] for number in range(8)]
        gone.close()
        nodes = [
            {
                "NodeID": str(i),
                "NodeManagerAddress": "127.0.0.1",
                "NodeManagerPort": port,
                "Alive": i < alive,
                "Resources": each,
            }
            for i, port in enumerate(ports)
        ]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        assert policy(Monitor())._count_possible_workers({str(i): each for i in range(reserved)}) == count


@pytest.mark.parametrize(("now", "possible", "asked"), [(4, 8, 1), (4, 2, 0), (4, 4, 0)])
def test_workers_are_asked_to_leave_for_more_and_never_sent_away(
    monkeypatch: pytest.MonkeyPatch, now: int, possible: int, asked: int
) -> None:
    decided = NoopDecision() if now == possible else ResizeDecision(possible, {})
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: decided)
    monitor = Monitor()
    ours = policy(monitor)
    for _ in range(3):  # asked once, not at each look
        found = ours.make_decision_for_running_worker_group(SimpleNamespace(num_workers=now), None)
        assert isinstance(found, NoopDecision)
    assert monitor.asked == asked


def test_the_trainer_hands_its_policy_to_ray_and_leaves_nothing_behind() -> None:
    from ray.train.v2.api import data_parallel_trainer as module

    usual = module.create_scaling_policy  # type: ignore[attr-defined]
    config = ray.train.ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1})
    trainer = ElasticTrainer(lambda: None, scaling_config=config, counts=(2, 4, 8), monitor=Monitor(), own_ray=False)
    with trainer._policy():
        made = module.create_scaling_policy(config)  # type: ignore[attr-defined]
        assert isinstance(made, WholeShares) and made.counts == (2, 4, 8)
    assert module.create_scaling_policy is usual  # type: ignore[attr-defined]


def test_a_worker_learns_that_it_is_to_leave_until_it_has_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    state = MonitorState()
    handle = SimpleNamespace(push=SimpleNamespace(remote=state.push))
    monkeypatch.setattr(ray, "wait", lambda refs, num_returns, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", lambda refs: refs)
    client = MonitorClient(handle, rank=0)
    client.send("progress", {}, urgent=True)
    assert not client.resize_requested()
    state.request_resize()
    client.send("progress", {}, urgent=True)
    assert client.resize_requested() and not client.stop_requested()
    again = MonitorClient(handle, rank=0)
    again.send("ready", {}, urgent=True)
    again.send("progress", {}, urgent=True)
    assert not again.resize_requested()
